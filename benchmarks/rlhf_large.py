"""Rows of `benchmarks/rlhf.py` for an accelerator, in bfloat16: sampling against the memory's bandwidth, a learner's
step against the matrix units', and a whole Online-DPO iteration. Ours alone."""
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rlhf_policy
from benchmarks.measure import Figure, Times, figure, in_turns, matmul_peak
from rlhf_jax.generate import Sampling, generate
from rlhf_jax.models import heads


def name_of(shape: Any) -> str:
    return f'pythia-{shape}' if isinstance(shape, str) else 'tiny'


def roofline(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """Share of the memory's bandwidth that sampling reaches; bytes are those of `rlhf_policy.decode_bytes`.

    The bandwidth is that of the faster of a sum and a copy (read and written) of a large array.
    """
    large, times, figures = sizes.large, {}, []
    prompt, new, mib = large['context'] - large['new'], large['new'], large['read_mib']
    array = jnp.ones(mib * 2 ** 18)
    total, copy = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    memory = {'read': lambda: total(array).block_until_ready(), 'copy': lambda: copy(array).block_until_ready()}
    for shape in large['decode']:
        module = rlhf_policy.policy(shape, bf16=True, param_dtype=jnp.bfloat16, stacked=False)
        params = rlhf_policy.params_on_device(module)
        for batch in large['batches']:
            name = f'{name_of(shape)} x {batch}'
            tokens, mask = jax.device_put(rlhf_policy.prompts(module, batch, prompt))

            def sample(steps):
                out = generate(module, params, tokens, mask, jax.random.key(2), Sampling(steps))
                jax.block_until_ready(out)
            works = {'ours': lambda: sample(new), 'ours, prefill': lambda: sample(1), **memory}
            here = in_turns(works, run.repeats, lambda what: run.progress(f'{name}, {what}'))
            must, moved = rlhf_policy.decode_bytes(module, batch, prompt, new), 4 * array.size
            bandwidth = lambda read, copied: max(moved / read, 2 * moved / copied)
            share = lambda ours, prefill, *m: must / (ours - prefill) / bandwidth(*m)
            peak = bandwidth(*(statistics.median(here[m]) for m in memory))
            figures.append(figure(
                f'decode {name}', share, *(here[n] for n in works), form='.0%',
                note=f'of {peak / 1e12:.3g} TB/s; {batch * new / statistics.median(here["ours"]):.0f} tokens/s with '
                     f'prefill, {prompt} + {new} tokens'))
            times |= {f'{name}: {k}': v for k, v in here.items()}
        params = None
    return times, figures


def learner(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """Share of the matrix units' peak that a DPO step reaches: 3 forwards' worth for the policy, 1 for the reference.

    What is computed again in the backward pass is not counted.
    """
    large, times, figures = sizes.large, {}, []
    peak = matmul_peak(large['gemm'], 'bfloat16')
    for shape in large['learner']:
        made, reference = _policy_and_reference(shape)
        work = rlhf_policy.Learner(made[0], made[1], reference)
        batch = jax.device_put(rlhf_policy.pairs(made[0], large['rows'], large['context'], large['new']))
        name = name_of(shape)
        here = in_turns({'ours': lambda: work.step(batch)}, run.repeats,
                        lambda what: run.progress(f'{name}, {what}'))
        flops = 4 * rlhf_policy.forward_flops(made[0], large['rows'], large['context'], large['new'])
        figures.append(figure(
            f'DPO step {name}', lambda s: flops / s / peak, here['ours'], form='.0%',
            note=f'of {peak / 1e12:.3g} TFLOP/s in bfloat16; {large["rows"]} rows of {large["context"]}, '
                 f'{1e3 * statistics.median(here["ours"]):.4g} ms'))
        times |= {f'{name}: {k}': v for k, v in here.items()}
        work = made = reference = None
    return times, figures


def iteration(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """Seconds of an Online-DPO iteration in series: K = 2 samples a prompt, their rewards, reference and update."""
    large, times, figures = sizes.large, {}, []
    new, rows = large['new'], large['rows']
    prompt = large['context'] - new
    for shape in large['learner']:
        name = name_of(shape)
        (module, params), reference = _policy_and_reference(shape)
        reward = heads.RewardModel(rlhf_policy.policy(shape, bf16=True, param_dtype=jnp.bfloat16))
        reward_params = rlhf_policy.params_on_device(reward)
        score = jax.jit(lambda p, tokens, mask: heads.at_last_token(
            reward.apply({'params': p}, tokens, mask=mask), mask))
        work = rlhf_policy.Learner(module, params, reference)
        params = None
        tokens, mask = jax.device_put(rlhf_policy.prompts(module, rows // 2, prompt))
        twice = lambda x: jnp.repeat(x[:, None], 2, 1)
        held: dict[str, Any] = {}

        def sample():
            held['samples'] = jax.block_until_ready(generate(
                module, work.params, tokens, mask, jax.random.key(3), Sampling(new), num_samples=2))

        def rewards():
            samples = held['samples']
            both = jnp.concatenate([twice(tokens), samples.tokens], -1)
            there = jnp.concatenate([twice(mask), samples.mask], -1)
            scores = score(reward_params, both.reshape(rows, -1), there.reshape(rows, -1))
            held['batch'] = jax.block_until_ready({'tokens': both, 'mask': samples.mask,
                                                   'rewards': scores.reshape(samples.mask.shape[:2])})

        def whole():
            sample(), rewards(), work.step(held['batch'])
        works = {'ours': whole, 'generation': sample, 'rewards': rewards, 'update': lambda: work.step(held['batch'])}
        here = in_turns(works, run.repeats, lambda what: run.progress(f'{name}, {what}'))
        parts = '   '.join(f'{part} {statistics.median(here[part]):.3g}' for part in works if part != 'ours')
        figures.append(figure(f'Online DPO iteration {name}', lambda s: s, here['ours'], form='.3g',
                              note=f's for {rows // 2} prompts x 2 samples, {prompt} + {new} tokens; {parts}'))
        if not np.isfinite(jax.device_get(held['batch']['rewards'])).all():
            raise FloatingPointError(f'{name}: rewards are not finite')
        times |= {f'{name}: {k}': v for k, v in here.items()}
        work = reference = reward_params = None
    return times, figures


def _policy_and_reference(shape: Any) -> tuple[tuple[Any, Any], Any]:
    """Module and float32 parameters of a policy whose blocks are computed again in the backward pass, and the reference
    in bfloat16."""
    module = rlhf_policy.policy(shape, bf16=True, remat='full')
    params = rlhf_policy.params_on_device(module)
    return (module, params), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

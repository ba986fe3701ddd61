"""Rows of `benchmarks/rlhf.py` against PyTorch: sampling, and a DPO step, on the same weights."""
import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import rlhf_policy, torch_gpt_neox
from benchmarks.measure import Disagreement, Figure, Times, agree, figure, in_turns, ratio, sides, spread
from rlhf_jax import convert
from rlhf_jax.generate import Sampling, generate
from rlhf_jax.models.decoder import split_blocks

GREEDY_TOKENS = 16  # compared one by one; the log-probabilities of all drawn tokens are


@dataclasses.dataclass
class Twins:
    """One model three times."""
    module: Any
    params: Any
    torch: torch_gpt_neox.GPTNeoX
    transformers: Any = None


def load(module: Any, params: Any, into: torch.nn.Module, rename: Callable[[str], str] = lambda name: name) -> Any:
    state = convert.to_torch('gpt_neox', module, jax.tree.map(np.asarray, params))
    into.load_state_dict({rename(name): torch.tensor(x) for name, x in state.items()})
    return into.eval()


def twins(shape: Any, length: int, *, with_transformers: bool = False) -> Twins:
    module = rlhf_policy.policy(shape)
    params = rlhf_policy.params_of(module)
    fields = {name: getattr(module, name) for name in
              ('vocab_size', 'width', 'depth', 'num_heads', 'rotary_fraction', 'rope_base', 'eps')}
    made = Twins(module, params, load(module, params, torch_gpt_neox.GPTNeoX(**fields, max_length=length)))
    if with_transformers:
        import transformers
        config = transformers.GPTNeoXConfig(**convert.config_of('gpt_neox', module))
        made.transformers = load(module, params, transformers.GPTNeoXForCausalLM(config),
                                 lambda name: name.replace('embed_out', 'lm_head'))
    return made


@contextlib.contextmanager
def threads() -> Iterator[None]:
    """As many for PyTorch as this process has cores, which it does not find out itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- Decoding --------------------------------------------------------------------------------------------------------


class Decode:
    """Ours, a loop written by hand in PyTorch, and `transformers.generate` with its default cache."""

    def __init__(self, sizes: Any, compiled: bool):
        self.batch, self.prompt, self.new = (sizes.decode[name] for name in ('batch', 'prompt', 'new'))
        self.twins = t = twins(sizes.policy, self.prompt + self.new, with_transformers=True)
        self.tokens, self.mask = rlhf_policy.prompts(t.module, self.batch, self.prompt)
        self.torch_tokens = torch.tensor(self.tokens).long()
        self.split, self.params = split_blocks(t.module, t.params)
        kinds = {'loop': False} | ({'compiled loop': True} if compiled else {})
        if compiled:
            torch._dynamo.reset()
        self.loops = {name: self.loop(1.0, kind) for name, kind in kinds.items()}

    def loop(self, temperature: float, compiled: bool = False) -> torch_gpt_neox.Decoder:
        return torch_gpt_neox.Decoder(self.twins.torch, self.batch, self.prompt, self.new, temperature=temperature,
                                      compiled=compiled)

    def ours(self, temperature: float = 1.0, new: int = 0) -> Any:
        return jax.block_until_ready(generate(self.split, self.params, self.tokens, self.mask, jax.random.key(2),
                                              Sampling(new or self.new, temperature=temperature)))

    @torch.inference_mode()
    def transformers(self, temperature: float = 1.0) -> Any:
        how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else {'do_sample': False}
        out = self.twins.transformers.generate(
            self.torch_tokens, attention_mask=torch.ones_like(self.torch_tokens), max_new_tokens=self.new,
            pad_token_id=0, eos_token_id=None, **how)
        return out[:, self.prompt:]

    def check(self) -> None:
        """Raises `Disagreement` unless greedy tokens are equal and drawn tokens have the same log-probabilities."""
        want = np.asarray(self.ours(temperature=0).tokens)[:, 0, :GREEDY_TOKENS]
        others = {'the loop': self.loop(0.0)(self.torch_tokens)[0], 'transformers.generate': self.transformers(0.0)}
        for name, tokens in others.items():
            got = tokens.numpy()[:, :GREEDY_TOKENS]
            if (got != want).any():
                raise Disagreement(f'greedy tokens of {name}: {int((got != want).sum())} of {want.size} differ from '
                                   'ours; different maths is not timed')
        ours = self.ours()
        agree('log-probabilities of the tokens we drew', ours.logprobs[:, 0], self.torch_logprobs(ours.tokens[:, 0]))
        for name, loop in self.loops.items():
            tokens, logprobs = loop(self.torch_tokens)
            both = np.concatenate([self.tokens, tokens.numpy().astype(np.int32)], 1)
            mine = jax.jit(rlhf_policy.response_logprobs, static_argnums=(0, 3))(
                self.twins.module, self.twins.params, both, self.new)
            agree(f'log-probabilities of the tokens that the {name} drew', mine, logprobs.numpy())

    @torch.inference_mode()
    def torch_logprobs(self, tokens: Any) -> np.ndarray:
        both = torch.cat([self.torch_tokens, torch.tensor(np.asarray(tokens)).long()], 1)
        return torch_gpt_neox.response_logprobs(self.twins.torch, both, self.new).numpy()


def decode(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """Tokens a second against the faster of the hand-written loops, and against `transformers`; and bytes a second."""
    with threads():
        run.progress('building')
        d = Decode(sizes, run.compiled)
        run.progress('checking that all sides agree')
        d.check()
        big = torch.ones(sizes.decode['read_mib'] * 2 ** 18)
        works = {'ours': d.ours, 'ours, prefill': lambda: d.ours(new=1)}
        works |= {name: (lambda loop=loop: loop(d.torch_tokens)) for name, loop in d.loops.items()}
        times = in_turns(works | {'transformers': d.transformers, 'read': big.sum}, run.repeats, run.progress)
    loops = ratio(times, list(d.loops))
    best = times[loops['best_rival']]
    per_second = lambda name: f'{name} {d.batch * d.new / statistics.median(times[name]):.0f} tokens/s'
    tokens = '   '.join(map(per_second, ('ours', *d.loops, 'transformers')))
    must, read = rlhf_policy.decode_bytes(d.twins.module, d.batch, d.prompt, d.new), big.numel() * 4
    share = lambda ours, prefill, reading: must / (ours - prefill) / (read / reading)
    steps = [ours - prefill for ours, prefill in zip(times['ours'], times['ours, prefill'])]
    rate = f'{must / statistics.median(steps) / 1e9:.3g} of {read / statistics.median(times["read"]) / 1e9:.3g} GB/s'
    return times, [
        figure('decode over static-cache loop', lambda theirs, ours: theirs / ours, best, times['ours'], target=2.0,
               note=f'{loops["best_rival"]}; {tokens}'),
        figure('decode over transformers.generate', lambda theirs, ours: theirs / ours, times['transformers'],
               times['ours'], target=4.0),
        figure('decode, share of read bandwidth', share, times['ours'], times['ours, prefill'], times['read'],
               target=0.6, form='.0%', note=f'{rate}, which is torch.sum over {sizes.decode["read_mib"]} MiB; '
                                            'prefill subtracted, only written slots of the cache counted')]


# ---- Training --------------------------------------------------------------------------------------------------------


class DpoStep:
    """Reference and policy forward, backward, AdamW; logits of the response only, on both sides."""

    def __init__(self, sizes: Any, compiled: bool):
        d = sizes.dpo
        self.twins = t = twins(sizes.policy, d['length'])
        self.response = d['response']
        # A reference of its own, so that the loss is not log 2 whatever the weights.
        self.reference = jax.tree.map(lambda x: x * 0.9, t.params)
        self.torch_reference = twins(sizes.policy, d['length']).torch
        load(t.module, self.reference, self.torch_reference).requires_grad_(False)
        self.batch = rlhf_policy.pairs(t.module, d['rows'], d['length'], d['response'])
        self.tokens = torch.tensor(self.batch['tokens']).long()
        self.learner = rlhf_policy.Learner(t.module, t.params, self.reference)
        self.kinds = ('eager', 'compiled') if compiled else ('eager',)
        if compiled:
            torch._dynamo.reset()

    def loss(self, policy: Any, reference: Any) -> torch.Tensor:
        return torch_gpt_neox.dpo_loss(policy, reference, self.tokens, self.response, rlhf_policy.BETA)

    def ours(self) -> None:
        self.learner.step(self.batch)

    def theirs(self, kind: str) -> Callable[[], None]:
        wrap = (lambda m: torch.compile(m, dynamic=False)) if kind == 'compiled' else lambda m: m
        policy, reference = wrap(self.twins.torch), wrap(self.torch_reference)
        optimizer = torch.optim.AdamW(self.twins.torch.parameters(), lr=rlhf_policy.LEARNING_RATE, betas=(0.9, 0.95),
                                      weight_decay=0.01, fused=True)

        def step():
            optimizer.zero_grad(set_to_none=True)
            self.loss(policy, reference).backward()
            optimizer.step()
        return step

    def check(self) -> None:
        """Raises `Disagreement` unless loss and gradients agree."""
        module, params = self.twins.module, self.twins.params
        ref = jax.jit(rlhf_policy.response_logprobs, static_argnums=(0, 3))(module, self.reference,
                                                                            self.batch['tokens'], self.response)
        value, grads = jax.jit(jax.value_and_grad(rlhf_policy.online_dpo_loss, 1), static_argnums=0)(
            module, params, ref, self.batch)
        other = self.loss(self.twins.torch, self.torch_reference)
        other.backward()
        agree('DPO loss', value, other.detach())
        theirs = {name: p.grad for name, p in self.twins.torch.named_parameters()}
        for name, grad in convert.to_torch('gpt_neox', module, jax.tree.map(np.asarray, grads)).items():
            agree(f'gradient of {name}', grad, theirs[name])


def dpo_step(sizes: Any, run: Any) -> tuple[Times, list[Figure]]:
    """A learner's step against the faster of eager and compiled PyTorch."""
    with threads():
        run.progress('building')
        d = DpoStep(sizes, run.compiled)
        run.progress('checking that both sides agree')
        d.check()
        times = in_turns({'ours': d.ours} | {kind: d.theirs(kind) for kind in d.kinds}, run.repeats, run.progress)
    best = ratio(times, d.kinds)['best_rival']
    note = f'{best}; ms a step: ' + '   '.join(f'{side} {spread(times[side])}' for side in sides(times))
    return times, [figure('DPO step over PyTorch', lambda theirs, ours: theirs / ours, times[best], times['ours'],
                          target=1.0, note=note)]

"""Rows of `benchmarks/gpu.py`: what each side runs. A side is built, timed and forgotten in a process of its own.

Both sides of a row do the same work at the same shapes, in bfloat16 over float32 weights where they train, on random
weights and inputs of their own: `tests/test_benchmarks_gpu.py` shows at small size that they compute the same.
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import gpu_sizes, rlhf_policy
from benchmarks.measure import transformer_flops
from configs.dlc import base
from dlc_jax.ssl import masking
from experiments.dlc import encoder as encoder_lib
from experiments.runtime import mesh as mesh_lib
from experiments.train import build
from rlhf_jax.generate import Sampling, generate
from rlhf_jax.models import heads

Step = Callable[[], Any]


@dataclasses.dataclass
class Side:
    """One side of a row.

    Attributes:
        works: by name, calls that launch work; 'step' is the row's. What a call returns is waited for.
        flops: of the matrix products of 'step', without any computed twice.
        bytes: that 'step' less 'prefill' must read, for rows of sampling.
        tokens: that 'step' makes, for rows of sampling.
    """
    works: dict[str, Step]
    flops: float = 0.0
    bytes: float = 0.0
    tokens: int = 0


# ---- Random weights where they are used ------------------------------------------------------------------------------


def random_tree(shapes: Any, std: float = 0.03) -> Any:
    """Weights of about N(0, std), scales of norms about 1, from one pool of draws: no zeros, which would run faster."""
    pool = jax.random.normal(jax.random.key(0), (2 ** 20 + 7,), jnp.float32) * std

    def one(path, s):
        is_scale = str(getattr(path[-1], 'key', '')) in ('scale', 'gain', 'gamma')
        return (jnp.resize(pool, s.shape) + float(is_scale)).astype(s.dtype)
    return jax.tree_util.tree_map_with_path(one, shapes)


def _fresh(shapes: Any) -> Any:
    """Zeros, and keys where there are to be keys."""
    def one(s):
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(s.shape, s.dtype)
    return jax.tree.map(one, shapes)


# ---- Images: training ------------------------------------------------------------------------------------------------


def _config(config: ml_collections.ConfigDict, size: gpu_sizes.Train) -> ml_collections.ConfigDict:
    config.batch_size, config.accumulate, config.num_steps = size.batch, size.parts, 1000
    config.model.dtype = 'bfloat16'
    config.model.update(dict(size.model) | dict(size.ours))
    return config


def _training(config: ml_collections.ConfigDict, arrays: dict[str, Any], flops: float) -> Side:
    """The runner's own step, its state donated, on one device."""
    experiment = build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    shapes = jax.eval_shape(experiment.init, jax.random.key(0))
    state = _fresh(shapes.replace(params=None, ema=None))
    held = [state.replace(params=random_tree(shapes.params),
                          ema=None if shapes.ema is None else random_tree(shapes.ema))]
    batch = jax.device_put({name: np.asarray(arrays[name], spec.dtype).reshape(spec.shape)
                            for name, spec in experiment.batch.items()})
    step = jax.jit(experiment.step, donate_argnums=0)

    def run():
        held[0], metrics = step(held[0], batch)
        return metrics
    return Side({'step': run}, flops)


def _dit_arrays(m: Any, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {'x': rng.standard_normal((batch, m.input_size, m.input_size, m.channels), np.float32),
            'cond': rng.integers(0, m.vocab_size, (batch, m.num_codes)).astype(np.int32)}


def _dit_flops(m: Any, batch: int) -> float:
    return 3 * batch * transformer_flops(m.depth, (m.input_size // m.patch_size) ** 2, m.width)


def dit(size: gpu_sizes.Train) -> Side:
    """Code-conditioned DiT: loss, gradient, AdamW, EMA; noise and dropped conditions drawn inside the step."""
    from experiments.dlc import generator
    config = _config(base.generator(), size)
    m = generator.make_model(config)
    return _training(config, _dit_arrays(m, size.batch), _dit_flops(m, size.batch))


def dit_torch(size: gpu_sizes.Train, device: Any) -> Side:
    from benchmarks import torch_reference, torch_steps
    from experiments.dlc import generator
    m = generator.make_model(_config(base.generator(), size))
    model = torch_reference.DiT(
        input_size=m.input_size, channels=m.channels, patch_size=m.patch_size, width=m.width, depth=m.depth,
        num_heads=m.num_heads, num_codes=m.num_codes, vocab_size=m.vocab_size).to(device)
    torch_steps.scatter(model)
    if device.type == 'cuda':
        torch_steps.compile_blocks(model)
    x, codes = torch_steps.tensors(device, _dit_arrays(m, size.batch).values())
    step = torch_steps.dit(model, torch_reference.GaussianDiffusion(np.arange(1000), device), x, codes.long(),
                           bf16=True, cond_dropout=m.cond_dropout, parts=size.parts)
    return Side({'step': step}, _dit_flops(m, size.batch))


def _sedd_flops(m: Any, batch: int) -> float:
    return 3 * batch * (transformer_flops(m.depth, m.length, m.width) + 2 * m.length * m.width * m.num_states)


def _sedd_codes(m: Any, batch: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, m.vocab_size, (batch, m.length)).astype(np.int32)


def sedd(size: gpu_sizes.Train) -> Side:
    """SEDD on codes: score entropy, gradient, clipping, AdamW, EMA; with dropout."""
    from experiments.dlc import code_model
    config = _config(base.code_model(), size)
    m = code_model.make_model(config)
    return _training(config, {'codes': _sedd_codes(m, size.batch)}, _sedd_flops(m, size.batch))


def sedd_torch(size: gpu_sizes.Train, device: Any) -> Side:
    from benchmarks import torch_reference, torch_steps
    from experiments.dlc import code_model
    m = code_model.make_model(_config(base.code_model(), size))
    model = torch_reference.SEDD(vocab_size=m.vocab_size, length=m.length, width=m.width, depth=m.depth,
                                 num_heads=m.num_heads, cond_dim=m.cond_dim, dropout=m.dropout).to(device)
    torch_steps.scatter(model)
    if device.type == 'cuda':
        torch_steps.compile_blocks(model)
    (codes,) = torch_steps.tensors(device, [_sedd_codes(m, size.batch)])
    step = torch_steps.sedd(model, codes.long(), bf16=True, parts=size.parts)
    return Side({'step': step}, _sedd_flops(m, size.batch))


def _vit_arrays(config: Any, batch: int) -> dict[str, np.ndarray]:
    d, rng = config.data, np.random.default_rng(5)
    blocks = encoder_lib.make_masking(config)
    masks = blocks(rng, 2 * batch)
    indices, weights = masking.pack_masks(masks, blocks.max_masked(2 * batch))
    crops = lambda n, side: rng.standard_normal((batch, n, side, side, d.channels), np.float32)
    return {'global_crops': crops(2, d.global_size), 'local_crops': crops(d.num_local, d.local_size),
            'masks': masks.reshape(batch, 2, -1), 'mask_indices': indices[None], 'mask_weights': weights[None]}


def _vit_flops(config: Any, m: Any, batch: int) -> float:
    """Of the blocks: forward and backward of all crops, and the teacher's forward of the global ones."""
    one = lambda side: transformer_flops(m.depth, 1 + m.num_registers + (side // m.patch_size) ** 2, m.width)
    return batch * (4 * 2 * one(config.data.global_size) + 3 * config.data.num_local * one(config.data.local_size))


def _vit_config(size: gpu_sizes.Train) -> ml_collections.ConfigDict:
    config = _config(base.encoder(), size)
    config.model.drop_path = 0.0
    config.data.update(size.crops)
    config.head.update(size.head)
    return config


def vit(size: gpu_sizes.Train) -> Side:
    """SEM encoder, multi-crop: teacher, student, heads, losses, clipping, AdamW, EMA; without drop paths."""
    config = _vit_config(size)
    return _training(config, _vit_arrays(config, size.batch),
                     _vit_flops(config, encoder_lib.make_model(config), size.batch))


def vit_torch(size: gpu_sizes.Train, device: Any) -> Side:
    from benchmarks import torch_encoder, torch_steps
    config = _vit_config(size)
    m, h = encoder_lib.make_model(config), encoder_lib.make_head(config)

    def twin():
        encoder = torch_encoder.SEMEncoder(
            width=m.width, depth=m.depth, num_heads=m.num_heads, patch_size=m.patch_size,
            num_registers=m.num_registers, pos_grid=m.pos_grid, num_codes=m.num_codes, vocab_size=m.vocab_size,
            channels=config.data.channels)
        both = torch_encoder.SelfDistillation(
            encoder, torch_encoder.DINOHead(m.width, h.hidden, h.bottleneck, h.prototypes)).to(device)
        return torch_steps.scatter(both)
    student, teacher = twin(), twin()
    if device.type == 'cuda':
        torch_steps.compile_blocks(student, teacher)
    arrays = _vit_arrays(config, size.batch)
    batch = dict(zip(arrays, torch_steps.tensors(device, arrays.values())))
    batch['mask_indices'], batch['mask_weights'] = batch['mask_indices'][0].long(), batch['mask_weights'][0]
    step = torch_steps.encoder(student, teacher, batch, bf16=True,
                               temperature=config.loss.teacher_temperature.init, clip=config.optimizer.clip_norm,
                               ema_decay=config.ema.decay)
    return Side({'step': step}, _vit_flops(config, m, size.batch))


# ---- Language --------------------------------------------------------------------------------------------------------


def _decoder(size: gpu_sizes.Language) -> tuple[Any, Any]:
    """A policy as it samples: bfloat16 weights, a tree a block."""
    module = rlhf_policy.policy(size.model, bf16=True, param_dtype=jnp.bfloat16, stacked=False)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    return module, random_tree(shapes)


def decode(size: gpu_sizes.Language) -> Side:
    """`size.new` tokens after prompts, and the first alone."""
    module, params = _decoder(size)
    tokens, mask = jax.device_put(rlhf_policy.prompts(module, size.batch, size.prompt))

    def sample(new):
        return generate(module, params, tokens, mask, jax.random.key(2), Sampling(new))
    return Side({'step': lambda: sample(size.new), 'prefill': lambda: sample(1)},
                bytes=rlhf_policy.decode_bytes(module, size.batch, size.prompt, size.new),
                tokens=size.batch * size.new)


def _torch_policy(size: gpu_sizes.Language, device: Any, dtype: Any) -> Any:
    from benchmarks import torch_gpt_neox, torch_steps
    module = rlhf_policy.policy(size.model)
    fields = {name: getattr(module, name) for name in
              ('vocab_size', 'width', 'depth', 'num_heads', 'rotary_fraction', 'rope_base', 'eps')}
    with device:
        return torch_steps.scatter(torch_gpt_neox.GPTNeoX(**fields, max_length=size.prompt + size.new)).to(dtype)


def decode_torch(size: gpu_sizes.Language, device: Any) -> Side:
    import torch

    from benchmarks import torch_gpt_neox
    module = rlhf_policy.policy(size.model, bf16=True)
    decoder = torch_gpt_neox.GraphDecoder(_torch_policy(size, device, torch.bfloat16), size.batch, size.prompt,
                                          size.new)
    prompts = torch.tensor(rlhf_policy.prompts(module, size.batch, size.prompt)[0], device=device).long()
    return Side({'step': lambda: decoder(prompts), 'prefill': lambda: decoder.prefill(prompts)},
                bytes=rlhf_policy.decode_bytes(module, size.batch, size.prompt, size.new),
                tokens=size.batch * size.new)


def _learner(size: gpu_sizes.Language) -> Any:
    module = rlhf_policy.policy(size.model, bf16=True, **dict(size.ours))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    params = random_tree(shapes)
    reference = jax.tree.map(lambda x: 0.9 * x.astype(jnp.bfloat16), params)
    return module, rlhf_policy.Learner(module, params, reference, parts=size.parts)


def _learner_flops(module: Any, size: gpu_sizes.Language) -> float:
    """Three forwards' worth for the policy, one for the reference."""
    return 4 * rlhf_policy.forward_flops(module, size.batch, size.prompt + size.new, size.new)


def learner(size: gpu_sizes.Language) -> Side:
    """A DPO step on pairs of responses: reference, policy forward and backward, AdamW."""
    module, work = _learner(size)
    batch = jax.device_put(rlhf_policy.pairs(module, size.batch, size.prompt + size.new, size.new))
    return Side({'step': lambda: work.launch(batch)}, _learner_flops(module, size))


def _torch_learner(size: gpu_sizes.Language, device: Any) -> Any:
    import torch

    from benchmarks import torch_steps
    policy, frozen = (_torch_policy(size, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    frozen.requires_grad_(False)
    if device.type == 'cuda':
        torch_steps.compile_blocks(policy, frozen)
    module = rlhf_policy.policy(size.model)
    tokens = rlhf_policy.pairs(module, size.batch, size.prompt + size.new, size.new)['tokens']
    tokens = torch.tensor(tokens, device=device).long()
    return policy, torch_steps.dpo(policy, frozen, tokens, size.new, bf16=True, beta=rlhf_policy.BETA,
                                   learning_rate=rlhf_policy.LEARNING_RATE, parts=size.parts)


def learner_torch(size: gpu_sizes.Language, device: Any) -> Side:
    _, step = _torch_learner(size, device)
    return Side({'step': step}, _learner_flops(rlhf_policy.policy(size.model), size))


def iteration(size: gpu_sizes.Language) -> Side:
    """Online DPO: two samples a prompt, their rewards, reference and update; through the rollout stream.

    'step' is an iteration in series (S = 0), 'asynchronous' one of a threaded stream that is a batch ahead (S = 1),
    publishing included in both.
    """
    from benchmarks import rlhf_rollout
    module, work = _learner(size)
    decoding = rlhf_policy.Decoding(module)
    reward = heads.RewardModel(rlhf_policy.policy(size.model, bf16=True, param_dtype=jnp.bfloat16))
    shapes = jax.eval_shape(reward.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    reward_params = random_tree(shapes)
    score = jax.jit(lambda p, tokens, mask: heads.at_last_token(reward.apply({'params': p}, tokens, mask=mask), mask))
    rows = size.batch
    tokens, mask = jax.device_put(rlhf_policy.prompts(module, rows // 2, size.prompt))
    twice = lambda x: jnp.repeat(x[:, None], 2, 1)

    def make(params, *, index, version):
        samples = generate(decoding.module, params, tokens, mask, jax.random.key(index), Sampling(size.new),
                           num_samples=2)
        both = jnp.concatenate([twice(tokens), samples.tokens], -1)
        visible = jnp.concatenate([twice(mask), samples.mask], -1)
        scores = score(reward_params, both.reshape(rows, -1), visible.reshape(rows, -1)).reshape(rows // 2, 2)
        return jax.device_get({'tokens': both, 'mask': samples.mask, 'logprobs': samples.logprobs, 'rewards': scores})

    def train(params, batch):
        return decoding.convert(work.launch(batch))
    start = decoding.convert(work.params)
    run = lambda s: rlhf_rollout.stream_loop(make, train, start, size.iterations, s)
    return Side({'step': lambda: run(0), 'asynchronous': lambda: run(1)})


def iteration_torch(size: gpu_sizes.Language, device: Any) -> Side:
    """The same in series: graphs for sampling, a compiled reward model, a compiled update."""
    import torch

    from benchmarks import torch_gpt_neox, torch_steps
    policy, update = _torch_learner(size, device)
    sampler, reward = (_torch_policy(size, device, torch.bfloat16) for _ in range(2))
    if device.type == 'cuda':
        torch_steps.compile_blocks(reward)
    decoder = torch_gpt_neox.GraphDecoder(sampler, size.batch // 2, size.prompt, size.new, num_samples=2)
    head = torch.randn(sampler.width, dtype=torch.bfloat16, device=device)
    module = rlhf_policy.policy(size.model)
    prompts = torch.tensor(rlhf_policy.prompts(module, size.batch // 2, size.prompt)[0], device=device).long()
    pairs = [list(model.parameters()) for model in (sampler, policy)]

    def step():
        with torch.no_grad():
            torch._foreach_copy_(*pairs)
            tokens = torch.cat([prompts.repeat(2, 1), decoder(prompts)[0]], 1)
            better = (reward.trunk(tokens)[:, -1] @ head).view(2, -1)
            first = better[0] >= better[1]  # the better sample of each prompt comes first
            halves = tokens.view(2, -1, tokens.shape[1])
            order = torch.where(first[:, None], halves[0], halves[1]), torch.where(first[:, None], halves[1], halves[0])
        update(torch.stack(order, 1))
    return Side({'step': step})

"""The rows of `benchmarks/dlc.py`: each builds both sides on the same weights, and the check that they agree."""
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch

from benchmarks import measure, torch_encoder, torch_steps
from benchmarks import torch_reference as reference
from benchmarks.dlc_sizes import Sizes
from benchmarks.measure import Row, random_params, transformer_flops
from configs.dlc import base
from dlc_jax import convert
from dlc_jax.ssl import masking
from experiments.dlc import code_model, encoder, generator
from experiments.runtime import mesh as mesh_lib
from experiments.train import build

GUIDANCE = 1.4


class Side:
    """Where and in what precision a row runs."""

    def __init__(self, bf16: bool):
        self.bf16 = bf16
        self.cuda = bf16 and torch.cuda.is_available()
        self.device = torch.device('cuda' if self.cuda else 'cpu')

    def config(self, config: ml_collections.ConfigDict, batch: int, model: dict) -> ml_collections.ConfigDict:
        config.batch_size, config.num_steps = batch, 1000
        config.model.update(model)
        if self.bf16:
            config.model.dtype, config.model.attention_impl = 'bfloat16', 'cudnn' if self.cuda else 'xla'
        return config

    def tensors(self, *arrays: Any) -> list[torch.Tensor]:
        return [torch.tensor(np.asarray(a), device=self.device) for a in arrays]

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def blocking(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` under this precision, waiting for the device."""
        def run():
            with self.autocast():
                out = work()
            if self.cuda:
                torch.cuda.synchronize()
            return out
        return run

    def load(self, module: torch.nn.Module, kind: str, ours: Any, params: Any) -> torch.nn.Module:
        state = convert.to_torch(kind, ours, jax.tree.map(np.asarray, params))
        module.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
        return module.to(self.device)

    def agree(self, what: str, ours: Any, theirs: torch.Tensor) -> None:
        """Relative to the largest entry: 1e-4 in float32, 5 % in bfloat16 (a sum of that many roundings).

        Raises:
            Disagreement: the two differ by more.
        """
        measure.agree(what, ours, theirs.detach().float().cpu().numpy(), 5e-2 if self.bf16 else 1e-4)


# ---- DiT -------------------------------------------------------------------------------------------------------------


class _DiT:
    def __init__(self, sizes: Sizes, side: Side, batch: int):
        self.side, self.batch = side, batch
        self.config = side.config(base.generator(), batch, sizes.dit)
        self.experiment = build(self.config, mesh_lib.make_mesh({}, jax.devices()[:1]))
        self.model, self.diffusion = generator.make_model(self.config), generator.make_diffusion(self.config)
        self.params = random_params(jax.eval_shape(self.experiment.init, jax.random.key(0)).params)
        m = self.model
        self.torch = side.load(reference.DiT(
            input_size=m.input_size, channels=m.channels, patch_size=m.patch_size, width=m.width, depth=m.depth,
            num_heads=m.num_heads, num_codes=m.num_codes, vocab_size=m.vocab_size), 'dit', m, self.params)
        rng = np.random.default_rng(1)
        self.x, self.noise = rng.standard_normal((2, batch, m.input_size, m.input_size, m.channels), np.float32)
        self.t = rng.integers(0, 1000, batch).astype(np.int32)
        self.codes = rng.integers(0, m.vocab_size, (batch, m.num_codes)).astype(np.int32)
        self.forward_flops = transformer_flops(m.depth, (m.input_size // m.patch_size) ** 2, m.width) * batch

    def apply(self, params, x, t, codes, drop=None):
        return self.model.apply({'params': params}, x, t, codes, drop=drop)


def _rivals(eager: Any, compiled: bool, make: Callable[[Any], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    rivals = {'eager': make(eager)}
    if compiled:
        torch._dynamo.reset()
        rivals['compiled'] = make(torch.compile(eager))
    return rivals


def dit_forward(sizes: Sizes, *, bf16: bool, compiled: bool) -> Row:
    side = Side(bf16)
    d = _DiT(sizes, side, sizes.batch['dit_forward'])
    run = jax.jit(d.apply)
    args = jax.device_put((d.x, d.t, d.codes))
    inputs = side.tensors(d.x, d.t, d.codes.astype(np.int64))

    def theirs(model):
        return side.blocking(torch.inference_mode()(lambda: model(*inputs)))
    return Row(lambda: jax.block_until_ready(run(d.params, *args)), _rivals(d.torch, compiled, theirs),
               lambda: side.agree('DiT forward', run(d.params, *args), theirs(d.torch)()), d.forward_flops)


def dit_sampling(sizes: Sizes, *, bf16: bool, compiled: bool) -> Row:
    side, steps = Side(bf16), sizes.steps['dit']
    d = _DiT(sizes, side, sizes.batch['dit_sampling'])
    d.config.sampler.update(dict(num_steps=steps, guidance=GUIDANCE))
    run = jax.jit(lambda params, key, codes: generator.sample(d.config, params, key, d.batch, codes))
    codes, key = jax.device_put(d.codes), jax.random.key(2)
    x, tcodes = side.tensors(d.x, d.codes.astype(np.int64))
    process = reference.GaussianDiffusion(d.diffusion.respaced(steps).timesteps, side.device)

    def check():
        # A short chain on the same draws: ours are `fold_in(step_key, index)`, as `GaussianDiffusion.sample` documents.
        few = d.diffusion.respaced(3)
        _, step_key = jax.random.split(key)
        noises = side.tensors(*(jax.random.normal(jax.random.fold_in(step_key, i), d.x.shape) for i in range(3)))
        model_fn = generator.gaussian.guided(functools.partial(d.apply, d.params), codes, scale=GUIDANCE)
        ours = jax.jit(lambda noise: few.sample(model_fn, key, d.x.shape, noise=noise))(d.x)
        theirs = reference.GaussianDiffusion(few.timesteps, side.device)
        with side.autocast():
            side.agree('guided sampling', ours, theirs.sample(d.torch, x, tcodes, GUIDANCE, noises))
    return Row(lambda: jax.block_until_ready(run(d.params, key, codes)),
               _rivals(d.torch, compiled, lambda m: side.blocking(
                   lambda: process.sample(m, torch.randn_like(x), tcodes, GUIDANCE))),
               check, 2 * steps * d.forward_flops)


def dit_training(sizes: Sizes, *, bf16: bool, compiled: bool) -> Row:
    """Loss, gradient, AdamW, EMA; cond dropout and noise drawn inside the step."""
    side = Side(bf16)
    d = _DiT(sizes, side, sizes.batch['dit_training'])
    init = jax.jit(d.experiment.init)(jax.random.key(0))
    held = [init.replace(params=jax.tree.map(jnp.copy, d.params), ema=jax.tree.map(jnp.copy, d.params))]
    step = jax.jit(d.experiment.step, donate_argnums=0)
    batch = jax.device_put({'x': d.x, 'cond': d.codes})

    def ours():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0].step, metrics))

    x0, noise, index, codes = side.tensors(d.x, d.noise, d.t.astype(np.int64), d.codes.astype(np.int64))
    process = reference.GaussianDiffusion(np.arange(1000), side.device)
    trained = torch_steps.trained(d.torch)
    fresh = [p.detach().clone() for p in trained]

    def theirs(model):
        return side.blocking(torch_steps.dit(model, process, x0, codes, bf16=side.bf16,
                                             cond_dropout=d.model.cond_dropout))

    def check():
        def loss(params):
            terms = d.diffusion.losses(lambda x, t: d.apply(params, x, t, d.codes), d.x, d.t, d.noise)
            return terms['mse'].mean() + terms['vb'].mean()
        value, grads = jax.jit(jax.value_and_grad(loss))(d.params)
        with side.autocast():
            other = process.loss(d.torch, x0, index, noise, codes)
        other.backward()
        side.agree('training loss', value, other)
        theirs_by_name = {name: p.grad for name, p in d.torch.named_parameters() if p.grad is not None}
        for name, grad in convert.to_torch('dit', d.model, jax.tree.map(np.asarray, grads)).items():
            if name in theirs_by_name:
                side.agree(f'gradient of {name}', grad, theirs_by_name[name])
        with torch.no_grad():
            torch._foreach_copy_(trained, fresh)
    return Row(ours, _rivals(d.torch, compiled, theirs), check, 3 * d.forward_flops)


# ---- SEDD ------------------------------------------------------------------------------------------------------------


def sedd_sampling(sizes: Sizes, *, bf16: bool, compiled: bool) -> Row:
    """Analytic sampler, absorbing process."""
    side, steps, batch = Side(bf16), sizes.steps['sedd'], sizes.batch['sedd_sampling']
    config = side.config(base.code_model(), batch, sizes.sedd)
    config.sampler.update(dict(name='analytic', num_steps=steps))
    model, process = code_model.make_model(config), code_model.make_diffusion(config)
    experiment = build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    params = random_params(jax.eval_shape(experiment.init, jax.random.key(0)).params)
    theirs = side.load(reference.SEDD(
        vocab_size=model.vocab_size, length=model.length, width=model.width, depth=model.depth,
        num_heads=model.num_heads, cond_dim=model.cond_dim), 'sedd', model, params)
    run = jax.jit(lambda params, key: code_model.sample(config, params, key, batch))
    key = jax.random.key(3)

    def check():
        rng = np.random.default_rng(4)
        x = rng.integers(0, model.vocab_size + 1, (batch, model.length)).astype(np.int32)
        t, dt = 0.7, 0.1
        sigma = jnp.full(batch, process.sigma(t))
        score = jax.jit(model.apply)({'params': params}, x, sigma)
        move = process.jumps(score, x, t, dt)
        with side.autocast(), torch.inference_mode():
            other = theirs(*side.tensors(x.astype(np.int64), sigma))
        weights, stay = reference.jumps(other, model.vocab_size, t, dt)
        side.agree('log scores', score, other)
        side.agree('chances of each token', jnp.exp(move.log_weights), weights)
        side.agree('chance to stay', move.stay, stay)
    return Row(lambda: jax.block_until_ready(run(params, key)),
               _rivals(theirs, compiled, lambda m: side.blocking(lambda: reference.sample_codes(
                   m, batch, model.length, model.vocab_size, steps, side.device))),
               check, (steps + 1) * batch * (transformer_flops(model.depth, model.length, model.width)
                                             + 2 * model.length * model.width * model.num_states))


# ---- Encoder ---------------------------------------------------------------------------------------------------------


def encoder_training(sizes: Sizes, *, bf16: bool, compiled: bool) -> Row:
    """Multi-crop step: teacher, student, heads, losses, clipping, AdamW, EMA; without drop paths."""
    side, batch = Side(bf16), sizes.batch['encoder_training']
    config = side.config(base.encoder(), batch, sizes.encoder | dict(drop_path=0.0))
    config.data.update(sizes.crops)
    config.head.update(sizes.head)
    experiment = build(config, mesh_lib.make_mesh({}, jax.devices()[:1]))
    model, head = encoder.make_model(config), encoder.make_head(config)
    start = jax.jit(experiment.init)(jax.random.key(0))
    params = random_params(start.params)
    put = lambda: start.replace(params=jax.tree.map(jnp.copy, params), ema=jax.tree.map(jnp.copy, params),
                                opt_state=jax.tree.map(jnp.copy, start.opt_state), step=jnp.int32(0),
                                extra=jax.tree.map(jnp.copy, start.extra), rng=jnp.copy(start.rng))
    rng = np.random.default_rng(5)
    block_masking = encoder.make_masking(config)
    masks = block_masking(rng, 2 * batch)
    indices, weights = masking.pack_masks(masks, block_masking.max_masked(2 * batch))
    arrays = {name: rng.standard_normal(s.shape, np.float32) for name, s in experiment.batch.items() if 'crops' in name}
    arrays |= dict(masks=masks.reshape(batch, 2, -1), mask_indices=indices[None], mask_weights=weights[None])
    ours_batch = jax.device_put(arrays)
    step = jax.jit(experiment.step, donate_argnums=0)
    held = [put()]

    def ours():
        held[0], metrics = step(held[0], ours_batch)
        jax.block_until_ready((held[0].step, metrics))

    def twin():
        made = torch_encoder.SEMEncoder(
            width=model.width, depth=model.depth, num_heads=model.num_heads, patch_size=model.patch_size,
            num_registers=model.num_registers, pos_grid=model.pos_grid, num_codes=model.num_codes,
            vocab_size=model.vocab_size, channels=config.data.channels)
        state = convert.to_torch('sem', model, jax.tree.map(np.asarray, params['encoder']))
        made.load_state_dict({k: torch.tensor(v) for k, v in state.items() if not k.startswith('sem_cls_norm')})
        top = torch_encoder.DINOHead(model.width, head.hidden, head.bottleneck, head.prototypes)
        side.load(top, 'dino_head', head, params['dino_head'])
        return torch_encoder.SelfDistillation(made, top).to(side.device)

    names = ('global_crops', 'local_crops', 'masks', 'mask_indices', 'mask_weights')
    tensors = dict(zip(names, side.tensors(*(arrays[n] for n in names))))
    tensors['mask_indices'], tensors['mask_weights'] = tensors['mask_indices'][0].long(), tensors['mask_weights'][0]
    temperature = config.loss.teacher_temperature.init
    student, teacher = twin(), twin()

    def theirs(wrap):
        return side.blocking(torch_steps.encoder(
            wrap(student), wrap(teacher), tensors, bf16=side.bf16, temperature=temperature,
            clip=config.optimizer.clip_norm, ema_decay=config.ema.decay))

    def check():
        state = put()
        value, grads = jax.jit(jax.value_and_grad(
            lambda p: experiment.loss(p, state, ours_batch, jax.random.key(6))[0]))(params)
        with side.autocast():
            other = torch_encoder.loss(student, teacher, tensors, temperature)
        other.backward()
        side.agree('encoder loss', value, other)
        converted = {kind: convert.to_torch(kind, module, jax.tree.map(np.asarray, grads[key]))
                     for kind, module, key in (('sem', model, 'encoder'), ('dino_head', head, 'dino_head'))}
        for part, mine in ((student.encoder, converted['sem']), (student.head, converted['dino_head'])):
            for name, p in part.named_parameters():
                side.agree(f'gradient of {name}', mine[name], p.grad)

    wrap = {'eager': lambda m: m} | ({'compiled': lambda m: torch.compile(m, dynamic=False)} if compiled else {})
    tokens = lambda size: 1 + model.num_registers + (size // model.patch_size) ** 2
    one_pass = lambda size: transformer_flops(model.depth, tokens(size), model.width)
    large, small = 2 * one_pass(config.data.global_size), config.data.num_local * one_pass(config.data.local_size)
    return Row(ours, {name: theirs(w) for name, w in wrap.items()}, check, batch * (4 * large + 3 * small))

"""The image generator: a DiT conditioned on a code, a class, a continuous embedding or nothing
(arXiv 2507.12318 §4)."""
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dlc_jax.diffusion import gaussian
from dlc_jax.models import dit
from experiments.dlc.data.codestore import open_code_store
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, optim, placement
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from experiments.runtime.stream import ArrayBatches

CONDITION_ARRAY = {'code': 'codes', 'class': 'labels', 'embedding': 'embeddings'}


def make_model(config: ml_collections.ConfigDict) -> dit.DiT:
    return modules.build(dit.DiT, dit.SIZES, config.model)


def make_diffusion(config: ml_collections.ConfigDict) -> gaussian.GaussianDiffusion:
    return modules.build_dataclass(gaussian.GaussianDiffusion, 'diffusion', config.diffusion)


def condition_spec(config: ml_collections.ConfigDict, batch: int) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of the conditioning array, or None for an unconditional model."""
    m = config.model
    return {'code': jax.ShapeDtypeStruct((batch, m.num_codes), jnp.int32),
            'class': jax.ShapeDtypeStruct((batch,), jnp.int32),
            'embedding': jax.ShapeDtypeStruct((batch, m.embedding_dim), jnp.float32), 'none': None}[m.condition]


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    model, diffusion = make_model(config), make_diffusion(config)
    m, shards = config.model, mesh_lib.batch_shards(mesh)
    decay = optim.ema_decay(config.ema, config.num_steps)
    batch_spec = {'x': jax.ShapeDtypeStruct((config.batch_size, m.input_size, m.input_size, m.channels), jnp.float32)}
    if m.condition != 'none':
        batch_spec['cond'] = condition_spec(config, config.batch_size)

    def init_params(key):
        spec = jax.tree.map(lambda s: jnp.zeros((1, *s.shape[1:]), s.dtype), batch_spec)
        return model.init(key, spec['x'], jnp.zeros(1, jnp.int32), spec.get('cond'))['params']

    tx = optim.adamw(config.optimizer, jax.eval_shape(init_params, jax.random.key(0)), config.num_steps)

    def init(key):
        key, carried = jax.random.split(key)
        params = init_params(key)
        return TrainState(jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.copy, params), carried)

    def loss(params, state, batch, rng):
        noise_key, drop_key = jax.random.split(rng)
        predict = lambda x, t: model.apply(
            {'params': params}, x, t, batch.get('cond'), train=True, rngs={'dropout': drop_key})
        return diffusion.loss(predict, noise_key, batch['x'])

    def step(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        (value, metrics), grads = optim.value_and_grad(
            lambda p, b, r: loss(p, state, b, r), state.params, batch, rng, config.accumulate, shards)
        params, opt_state, norm = optim.apply(tx, grads, state)
        ema = optim.ema_update(state.ema, params, decay(state.step + 1))
        return (state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema),
                metrics | {'loss': value, 'grad_norm': norm})

    def sample_once(params, key):
        spec = condition_spec(config, config.batch_size)
        cond = None if spec is None else jnp.zeros(spec.shape, spec.dtype)
        return sample(config, params, key, config.batch_size, cond)

    return Experiment(init, loss, step, dit.PARTITION_RULES, batch_spec,
                      lambda: open_batches(config, placement.share_of(mesh)), sampler=sample_once)


def open_batches(config: ml_collections.ConfigDict, share: placement.Share = placement.WHOLE) -> ArrayBatches:
    """Latents (as stored) or images (scaled to [-1, 1]) with their condition, from a code store.

    Raises:
        ValueError: the store lacks what the model needs, or holds codes of another L x V.
    """
    m = config.model
    expect = dict(num_codes=m.num_codes, vocab_size=m.vocab_size) if m.condition == 'code' else {}
    store = open_code_store(config.data.path, **expect)
    arrays = {'x': store.array(config.data.target)}
    want = (m.input_size, m.input_size, m.channels)
    if arrays['x'].shape[1:] != want:
        raise ValueError(f'{config.data.path}: {config.data.target} are {arrays["x"].shape[1:]} but the model takes '
                         f'{want}; set model.input_size and model.channels')
    if m.condition != 'none':
        arrays['cond'] = store.array(CONDITION_ARRAY[m.condition])
    if m.condition == 'embedding' and arrays['cond'].shape[1] != m.embedding_dim:
        raise ValueError(f'{config.data.path}: embeddings have {arrays["cond"].shape[1]} dimensions but '
                         f'model.embedding_dim={m.embedding_dim}')
    casts = {'x': to_model_range, 'cond': np.float32 if m.condition == 'embedding' else np.int32}
    return ArrayBatches(arrays, config.batch_size, seed=config.seed, share=share, casts=casts)


def to_model_range(x: np.ndarray) -> np.ndarray:
    """uint8 images -> [-1, 1]; latents as they are. float32."""
    return x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x.astype(np.float32)


def sample(config: ml_collections.ConfigDict, params: Any, key: jax.Array, num: int,
           cond: jax.Array | None) -> jax.Array:
    """`num` samples [num, H, W, C] in model range, by `config.sampler`; pure, so that it can be jitted whole."""
    model, s = make_model(config), config.sampler
    diffusion = make_diffusion(config).respaced(s.num_steps)
    predict = lambda x, t, c, drop: model.apply({'params': params}, x, t, c, drop=drop)
    model_fn = gaussian.guided(predict, cond, scale=s.guidance if config.model.condition != 'none' else 1.0,
                               channels=s.guidance_channels or None, interval=tuple(s.guidance_interval),
                               num_timesteps=config.diffusion.num_timesteps)
    shape = (num, config.model.input_size, config.model.input_size, config.model.channels)
    return diffusion.sample(model_fn, key, shape, sampler=s.name, eta=s.ddim_eta)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator on its EMA weights."""
    config: ml_collections.ConfigDict
    params: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike) -> 'Generator':
        return cls(*modules.load(workdir, 'generator', build))

    def sample(self, key: jax.Array, cond: np.ndarray | None, num: int, *, batch_size: int = 256, progress: Any = None,
               **sampler: Any) -> np.ndarray:
        """float32 [num, H, W, C] in model range. `sampler` overrides fields of `config.sampler`.

        Args:
            key: typed key; batch b uses `fold_in(key, b)`.
            cond: [num, ...] condition, or None.
            num: how many.
            batch_size: samples at once.
            progress: called with the number done after each batch.
        """
        run = self._compiled(min(batch_size, num), tuple(sorted(sampler.items())))
        return run(key, cond, num, progress)

    @functools.lru_cache(maxsize=4)
    def _compiled(self, batch_size: int, sampler: tuple) -> modules.Batched:
        config = modules.with_sampler(self.config, dict(sampler))
        return modules.Batched(lambda p, k, c: sample(config, p, k, batch_size, c), self.params, batch_size)

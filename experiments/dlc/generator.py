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
from experiments.runtime import checks, modules, placement, runs
from experiments.runtime.experiment import Experiment
from experiments.runtime.stream import ArrayBatches
from experiments.runtime.training import training

CONDITION_ARRAY = {'code': 'codes', 'class': 'labels', 'embedding': 'embeddings'}


def make_model(config: ml_collections.ConfigDict) -> dit.DiT:
    return modules.build(dit.DiT, dit.SIZES, config.model)


def make_diffusion(config: ml_collections.ConfigDict) -> gaussian.GaussianDiffusion:
    return modules.build_dataclass(gaussian.GaussianDiffusion, 'diffusion', config.diffusion)


def sample_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """Height, width and channels of one sample."""
    model = config.model
    return model.input_size, model.input_size, model.channels


def condition_spec(config: ml_collections.ConfigDict, batch: int) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of the conditioning array, or None for an unconditional model.

    Raises:
        ValueError: an unknown condition.
    """
    model = config.model
    checks.choice('model.condition', model.condition, dit.CONDITIONS)
    return {'code': jax.ShapeDtypeStruct((batch, model.num_codes), jnp.int32),
            'class': jax.ShapeDtypeStruct((batch,), jnp.int32),
            'embedding': jax.ShapeDtypeStruct((batch, model.embedding_dim), jnp.float32),
            'none': None}[model.condition]


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    model, diffusion = make_model(config), make_diffusion(config)
    batch_spec = {'x': jax.ShapeDtypeStruct((config.batch_size, *sample_shape(config)), jnp.float32)}
    if config.model.condition != 'none':
        batch_spec['cond'] = condition_spec(config, config.batch_size)

    def init_params(key):
        batch = jax.tree.map(lambda spec: jnp.zeros((1, *spec.shape[1:]), spec.dtype), batch_spec)
        return model.init(key, batch['x'], jnp.zeros(1, jnp.int32), batch.get('cond'))['params']

    def loss(params, state, batch, rng):
        noise_key, drop_key = jax.random.split(rng)
        predict = lambda x, t: model.apply(
            {'params': params}, x, t, batch.get('cond'), train=True, rngs={'dropout': drop_key})
        return diffusion.loss(predict, noise_key, batch['x'])

    def sample_once(params, key):
        spec = condition_spec(config, config.batch_size)
        cond = None if spec is None else jnp.zeros(spec.shape, spec.dtype)
        return sample(config, params, jax.random.split(key, config.batch_size), config.batch_size, cond)

    trained = training(config, mesh, init_params, loss)
    return Experiment(trained.init, loss, trained.step, dit.PARTITION_RULES, batch_spec,
                      lambda: open_batches(config, placement.share_of(mesh)), sampler=sample_once)


def open_batches(config: ml_collections.ConfigDict, share: placement.Share = placement.WHOLE) -> ArrayBatches:
    """Latents (as stored) or images (scaled to [-1, 1]) with their condition, from a code store.

    Raises:
        ValueError: the store lacks what the model needs, holds codes of another L x V, or labels of other classes: a
            label of `model.num_classes` would be the null class, one beyond it NaN.
    """
    model = config.model
    expect = dict(num_codes=model.num_codes, vocab_size=model.vocab_size) if model.condition == 'code' else {}
    store = open_code_store(config.data.path, **expect)
    arrays = {'x': store.array(config.data.target)}
    if arrays['x'].shape[1:] != sample_shape(config):
        raise ValueError(f'{config.data.path}: {config.data.target} are {arrays["x"].shape[1:]} but the model takes '
                         f'{sample_shape(config)}; set model.input_size and model.channels')
    if model.condition != 'none':
        arrays['cond'] = (store.labels(model.num_classes) if model.condition == 'class' else
                          store.array(CONDITION_ARRAY[model.condition]))
    if model.condition == 'embedding' and arrays['cond'].shape[1] != model.embedding_dim:
        raise ValueError(f'{config.data.path}: embeddings have {arrays["cond"].shape[1]} dimensions but '
                         f'model.embedding_dim={model.embedding_dim}')
    casts = {'x': to_model_range, 'cond': np.float32 if model.condition == 'embedding' else np.int32}
    return ArrayBatches(arrays, config.batch_size, seed=config.seed, share=share, casts=casts)


def to_model_range(x: np.ndarray) -> np.ndarray:
    """uint8 images -> [-1, 1]; latents as they are. float32."""
    return x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x.astype(np.float32)


def sample(config: ml_collections.ConfigDict, params: Any, key: jax.Array, num: int,
           cond: jax.Array | None) -> jax.Array:
    """`num` samples [num, H, W, C] in model range, by `config.sampler`; pure, so that it can be jitted whole.

    `key`: one, or one a row.
    """
    model, sampler = make_model(config), config.sampler
    diffusion = make_diffusion(config).respaced(sampler.num_steps)
    predict = lambda x, t, c, drop: model.apply({'params': params}, x, t, c, drop=drop)
    model_fn = gaussian.guided(predict, cond, scale=sampler.guidance if config.model.condition != 'none' else 1.0,
                               channels=sampler.guidance_channels or None, interval=tuple(sampler.guidance_interval),
                               num_timesteps=config.diffusion.num_timesteps)
    return diffusion.sample(model_fn, key, (num, *sample_shape(config)), sampler=sampler.name, eta=sampler.ddim_eta)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator on its EMA weights."""
    config: ml_collections.ConfigDict
    params: Any

    @classmethod
    def load(cls, workdir: str | os.PathLike, step: int | None = None) -> 'Generator':
        """The run in `workdir`, as its newest checkpoint has it, or that of `step`."""
        return cls(*runs.load(workdir, 'generator', build, step=step))

    def sample(self, key: jax.Array, cond: np.ndarray | None, num: int, *, part: range | None = None,
               batch_size: int = 256, progress: Any = None, **sampler: Any) -> np.ndarray:
        """float32 [num, H, W, C] in model range, or those rows that `part` says. `sampler` overrides fields of
        `config.sampler`.

        Sample i is a function of `fold_in(key, i)` and its condition, whatever the batches.

        Args:
            key: typed key.
            cond: [num, ...] condition, or None; of the rows in `part`.
            num: how many there are in all.
            part: which of them to make; None: all.
            batch_size: samples a device at once.
            progress: called with the number done after each batch.
        """
        part = range(num) if part is None else part
        run = self._compiled(modules.Unit.of(batch_size, num), tuple(sorted(sampler.items())))
        return run({'keys': modules.row_keys(key, part), 'cond': cond}, len(part), progress)

    @functools.lru_cache(maxsize=4)
    def _compiled(self, unit: modules.Unit, sampler: tuple) -> modules.Batched:
        config = modules.with_sampler(self.config, dict(sampler))

        def one(params, rows):
            keys = jax.random.wrap_key_data(rows['keys'])
            return sample(config, params, keys, len(keys), rows['cond'])
        return modules.Batched(one, self.params, unit)

"""The frozen generator in a rollout: codes in, the images that rewards look at out."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dlc_jax.models.vae import SCALING_FACTOR, AutoencoderKL
from experiments.dlc import generator as generator_lib
from experiments.dlc.generator import Generator
from experiments.dlc.latents import LatentDecoder
from experiments.dlc.weights import reading
from experiments.runtime import config_files, exchange, modules, placement
from experiments.runtime import mesh as mesh_lib

Config = ml_collections.ConfigDict


def sampler_fields(section: Config) -> dict[str, Any]:
    """What `config.generator.sampler` sets; what is '' or 0 there stays as the generator's own config has it."""
    return {name: value for name, value in section.sampler.items() if value}


def with_sampler(config: Config, section: Config) -> Config:
    """The generator's `config` with the sampler that rollouts use; those of a released one for images from codes."""
    recipe = dict(config.get('recipes', {}).get('images', {}))
    return modules.with_sampler(config, recipe | sampler_fields(section))


def check(generator: Config, config: Config, where: str) -> None:
    """Raises a ValueError unless the generator of config `generator` draws the codes that `config.model` writes."""
    theirs, ours = generator.model, config.model
    if theirs.condition != 'code':
        raise ValueError(f'{where}: the generator is conditioned on {theirs.condition!r}, not on codes')
    if (theirs.num_codes, theirs.vocab_size) != (ours.num_codes, ours.vocab_size):
        raise ValueError(f'{where}: the generator takes codes of {theirs.num_codes} x {theirs.vocab_size}, but '
                         f'model.num_codes x model.vocab_size are {ours.num_codes} x {ours.vocab_size}; use models '
                         'trained on the same code store')
    if theirs.channels not in (1, 3) and not config.generator.vae:
        raise ValueError(f'generator.vae is empty, but the generator makes latents of {theirs.channels} channels; give '
                         'the folder of the autoencoder')
    generator_lib.make_diffusion(generator).respaced(generator.sampler.num_steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Painter:
    """Codes -> images, as one program over a mesh.

    Attributes:
        config: of the generator, with the sampler that is used.
        vae: module of the autoencoder whose latents the generator makes; None: it makes pixels.
        params: {'generator': ..., 'vae': ... or absent}; shapes where nothing has been loaded.
        batch_size: images at once; 0: all.
    """
    config: Config
    vae: Any
    params: Any
    batch_size: int

    @classmethod
    def load(cls, config: Config) -> 'Painter':
        """The models that `config.generator` names.

        Raises:
            ValueError, OSError: they are not there, or do not belong to the codes that are written.
        """
        section = config.generator
        if not section.path:
            raise ValueError('generator.path is empty: give the work directory of a generator, or its released weights')
        generator = reading.load(Generator, section.path)
        of_run = with_sampler(generator.config, section)
        check(of_run, config, f'generator.path={section.path}')
        params, vae = {'generator': generator.params}, None
        if section.vae:
            decoder = LatentDecoder.load(section.vae)
            vae, params['vae'] = decoder.module, decoder.params
        return cls(of_run, vae, params, section.batch_size)

    @classmethod
    def shapes(cls, config: Config) -> 'Painter':
        """The same without weights, for compile checks: of the config file `generator.config` where no path is given.

        Raises:
            ValueError: neither is given.
        """
        section = config.generator
        if section.path:
            return cls.load(config)
        if not section.config:
            raise ValueError('generator.path is empty, and so is generator.config, which would say how large it is')
        of_file = with_sampler(config_files.load(section.config), section)
        needs_vae = of_file.model.channels not in (1, 3)
        check(of_file, config if not needs_vae else _with_vae(config), f'generator.config={section.config}')
        shape = generator_lib.sample_shape(of_file)
        one = jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32), jnp.zeros((1, config.model.num_codes), jnp.int32)
        model, vae = generator_lib.make_model(of_file), AutoencoderKL() if needs_vae else None
        params = {'generator': jax.eval_shape(lambda key: model.init(key, *one)['params'], jax.random.key(0))}
        if vae is not None:
            side = shape[0] * vae.stride
            params['vae'] = jax.eval_shape(
                lambda key: vae.init(key, jnp.zeros((1, side, side, vae.image_channels)))['params'], jax.random.key(0))
        return cls(of_file, vae, params, section.batch_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = generator_lib.sample_shape(self.config)
        if self.vae is None:
            return height, width, channels
        return height * self.vae.stride, width * self.vae.stride, self.vae.image_channels

    def paint(self, params: Any, codes: jax.Array, keys: jax.Array) -> jax.Array:
        """Images float32 [N, H, W, C] in [0, 1] of codes int32 [N, L], each with the noise of its own key [N]; pure."""
        x = generator_lib.sample(self.config, params['generator'], keys, len(codes), codes)
        if self.vae is not None:
            x = self.vae.apply({'params': params['vae']}, x / SCALING_FACTOR, method='decode')
        return jnp.clip((x.astype(jnp.float32) + 1) / 2, 0.0, 1.0)

    def on(self, mesh: Mesh) -> Any:
        """(codes int32 [N, L], data of keys [N]) -> images, on the devices of `mesh`, each with a copy of the weights;
        as many at once as `batch_size` says."""
        params = placement.place_tree(self.params, mesh_lib.replicated(mesh))
        run = jax.jit(self._paint_rows, out_shardings=mesh_lib.batch_sharding(mesh))
        shards = mesh_lib.batch_shards(mesh)

        def paint(codes: np.ndarray, keys: np.ndarray) -> np.ndarray:
            size = self.batch_size or len(codes)
            size += -size % shards
            out = []
            for start in range(0, len(codes), size):
                rows = [x[start:start + size] for x in (codes, keys)]
                rows = [np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)]) for x in rows]  # one size to compile
                out.append(run(params, *placement.place_tree(rows, mesh_lib.batch_sharding(mesh))))
            return np.concatenate(exchange.fetch(out))[:len(codes)]
        return paint

    def _paint_rows(self, params: Any, codes: jax.Array, keys: jax.Array) -> jax.Array:
        return self.paint(params, codes, jax.random.wrap_key_data(keys))


def noise_keys(seed: int, draws: np.ndarray, num_samples: int, *, share: bool) -> np.ndarray:
    """Data of the keys [B, K, ...] of the noise that images begin with: a function of seed, draw and completion, or
    (`share`) of seed and draw, so that the images of a caption differ by their codes alone."""
    key = jax.random.fold_in(jax.random.key(seed), 0x1A6E)  # apart from the keys that codes are drawn with
    of_draw = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(draws, jnp.uint32))
    place = jnp.zeros(num_samples, jnp.uint32) if share else jnp.arange(num_samples, dtype=jnp.uint32)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_draw, place)
    return np.asarray(jax.random.key_data(keys))


def _with_vae(config: Config) -> Config:
    config = config.copy_and_resolve_references().unlock()
    config.generator.vae = 'released'
    return config

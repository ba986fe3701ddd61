"""The toy mixture of arXiv 2507.12318 figure 2: diffusion on more and more modes, alone or on the index of a mode.

Gaussians of one variance stand on a square grid. A small network learns to denoise draws of their mixture, once without
a condition and once conditioned on which of them a draw came from (the paper's oracle). What is measured is
KL(mixture || samples) in nats, the samples' density by a Gaussian kernel estimate.

The kernel has Silverman's bandwidth for one mode, from its deviation and its share of the samples: with that of the
whole sample all modes would be blurred into one. The same estimate on exact draws is the floor of what can be reached.
"""
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from tqdm import tqdm

from dlc_jax.diffusion.gaussian import GaussianDiffusion
from dlc_jax.models.layers import sinusoidal_embedding
from experiments.runtime import stages, storage
from experiments.runtime.statistics import spread

Array = jax.Array
CONDITIONS = ('none', 'index')
CHUNK = 500  # steps between two looks at whether a signal has come, at most
BLOCK = 256  # rows whose kernel estimate is computed at once


@dataclasses.dataclass(frozen=True)
class Mixture:
    """`modes` equally likely Gaussians in the plane, on a square grid about the origin.

    Attributes:
        modes: a square number.
        variance: of a mode, along each axis.
        spacing: between neighbours of the grid.
    """
    modes: int
    variance: float = 0.1
    spacing: float = 1.0

    @property
    def centers(self) -> np.ndarray:
        """float32 [modes, 2]."""
        side = math.isqrt(self.modes)
        line = self.spacing * (np.arange(side) - (side - 1) / 2)
        return np.stack(np.meshgrid(line, line, indexing='ij'), -1).reshape(-1, 2).astype(np.float32)

    @property
    def deviation(self) -> float:
        """Of the whole mixture along each axis."""
        return math.sqrt(self.variance + self.spacing ** 2 * (self.modes - 1) / 12)

    def draw(self, key: Array, num: int) -> tuple[Array, Array]:
        """Points float32 [num, 2] and the modes int32 [num] that they come from."""
        index_key, noise_key = jax.random.split(key)
        index = jax.random.randint(index_key, (num,), 0, self.modes)
        noise = math.sqrt(self.variance) * jax.random.normal(noise_key, (num, 2))
        return jnp.asarray(self.centers)[index] + noise, index

    def log_density(self, x: Array) -> Array:
        """[N, 2] -> [N]."""
        return kernel_log_density(x, jnp.asarray(self.centers), math.sqrt(self.variance))


def kernel_log_density(x: Array, points: Array, bandwidth: float) -> Array:
    """Log-density at `x` [N, 2] of equally likely Gaussians of deviation `bandwidth` at `points` [M, 2]: [N]."""
    def one(x):
        squares = jnp.square(x - points).sum(-1)
        return jax.nn.logsumexp(-0.5 * squares / bandwidth ** 2)
    norm = math.log(2 * math.pi * bandwidth ** 2) + math.log(len(points))
    return jax.lax.map(one, x, batch_size=BLOCK) - norm


def bandwidth(mixture: Mixture, num: int) -> float:
    """Silverman's rule in the plane for the `num / modes` samples of a mode: `deviation count^(-1/6)`."""
    return math.sqrt(mixture.variance) * max(num / mixture.modes, 1) ** (-1 / 6)


def divergence(mixture: Mixture, key: Array, samples: Array) -> Array:
    """KL(mixture || kernel estimate of `samples` [M, 2]) in nats, over as many exact draws."""
    x, _ = mixture.draw(key, len(samples))
    return (mixture.log_density(x) - kernel_log_density(x, samples, bandwidth(mixture, len(samples)))).mean()


class Denoiser(nn.Module):
    """`depth` dense layers of `width` that predict noise and variance logits [B, 4] of points [B, 2].

    Attributes:
        modes: values of the index that it is conditioned on; 0: none.
    """
    width: int
    depth: int
    modes: int = 0

    @nn.compact
    def __call__(self, x: Array, t: Array, index: Array | None = None) -> Array:
        h = nn.Dense(self.width, name='input')(x) + nn.Dense(self.width, name='time')(sinusoidal_embedding(t, 64))
        if self.modes:
            h = h + nn.Embed(self.modes, self.width, name='index')(index)
        for i in range(self.depth):
            h = nn.Dense(self.width, name=f'layer{i}')(nn.silu(h))
        return nn.Dense(4, kernel_init=nn.initializers.zeros, name='output')(nn.silu(h))


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for what would fail, or mean nothing, once the runs have begun."""
    if not config.modes or len({*config.modes}) < len(config.modes):
        raise ValueError(f'config.modes={tuple(config.modes)}: one number or more, each once')
    for modes in config.modes:
        if modes < 1 or math.isqrt(modes) ** 2 != modes:
            raise ValueError(f'config.modes: {modes} is not a square number; modes stand on a square grid')
    for name in ('variance', 'spacing', 'learning_rate'):
        if not 0 < config[name] < math.inf:
            raise ValueError(f'config.{name}={config[name]} must be positive')
    for name in ('width', 'depth', 'batch_size', 'num_steps', 'num_samples'):
        if config[name] < 1:
            raise ValueError(f'config.{name}={config[name]} must be at least 1')
    if not 2 <= config.sample_steps <= GaussianDiffusion().num_timesteps:
        raise ValueError(f'config.sample_steps={config.sample_steps} must lie in '
                         f'2..{GaussianDiffusion().num_timesteps}')
    if len(config.seeds) < 2 or len({*config.seeds}) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f'config.seeds={tuple(config.seeds)}: two or more, each once and none negative, for a spread')


def compare(config: ml_collections.ConfigDict, workdir: str | pathlib.Path,
            progress: Callable[..., tqdm] = functools.partial(tqdm, dynamic_ncols=True)) -> dict[str, Any]:
    """Makes those runs that `workdir` does not hold yet, all seeds of a run at once, and writes `metrics.json`.

    Returns:
        {'none', 'index', 'floor': {modes: {'kl', 'kl_std'}}}: KL of samples without and with the index, and of exact
        draws; mean and deviation over seeds.

    Raises:
        ValueError: `check`, or `workdir` holds a comparison with another config.
        FloatingPointError: a run diverged.
    """
    check(config)
    workdir = stages.claim(config, workdir)
    keys = jnp.stack([jax.random.key(seed) for seed in config.seeds])
    metrics: dict[str, Any] = {name: {} for name in (*CONDITIONS, 'floor')}
    with progress(total=len(config.modes) * len(CONDITIONS) * config.num_steps, unit='step', desc='mixture') as bar:
        for modes in config.modes:
            mixture = Mixture(modes, config.variance, config.spacing)
            floor = stages.once(workdir / f'floor_{modes}.npz', lambda: floor_of(config, mixture, keys))
            metrics['floor'][str(modes)] = spread(floor)
            for condition in CONDITIONS:
                before = bar.n
                found = stages.once(workdir / f'{condition}_{modes}.npz',
                                    lambda: run(config, mixture, condition, keys, bar.update))
                bar.update(config.num_steps - (bar.n - before))
                metrics[condition][str(modes)] = spread({'kl': found['kl']})
    storage.write_json(workdir / 'metrics.json', metrics)
    return metrics


def floor_of(config: ml_collections.ConfigDict, mixture: Mixture, keys: Array) -> dict[str, np.ndarray]:
    """`kl` [seeds] of exact draws."""
    def one(key):
        drawn, _ = mixture.draw(jax.random.fold_in(key, 3), config.num_samples)
        return divergence(mixture, jax.random.fold_in(key, 2), drawn)
    return {'kl': np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))}


def run(config: ml_collections.ConfigDict, mixture: Mixture, condition: str, keys: Array,
        update: Callable[[int], Any]) -> dict[str, np.ndarray]:
    """Trains a denoiser for each of `keys` [S], samples and measures: `kl` [S], `samples` [S, num_samples, 2]; `update`
    hears of every chunk of steps."""
    program = Program(config, mixture, condition)
    chunk = max(n for n in range(1, min(CHUNK, config.num_steps) + 1) if config.num_steps % n == 0)
    state = jax.jit(jax.vmap(program.init))(keys)
    advance = jax.jit(jax.vmap(functools.partial(program.advance, num_steps=chunk)))
    for _ in range(config.num_steps // chunk):
        state, loss = advance(state, keys)
        if not np.isfinite(loss).all():
            raise FloatingPointError(f'{mixture.modes} modes, condition {condition!r}: the loss is not finite; lower '
                                     'config.learning_rate')
        update(chunk)

    def measured(pair):
        params, key = pair
        samples = program.sample(params, key)
        return {'kl': divergence(mixture, jax.random.fold_in(key, 2), samples), 'samples': samples}
    # One seed after the other: together they would take S times the memory.
    return jax.device_get(jax.jit(lambda *pairs: jax.lax.map(measured, pairs))(state[0], keys))


class Program:
    """Training and sampling of one denoiser; coordinates are divided by the mixture's deviation for the network."""

    def __init__(self, config: ml_collections.ConfigDict, mixture: Mixture, condition: str):
        self._config, self._mixture, self._on_index = config, mixture, condition == 'index'
        self._model = Denoiser(config.width, config.depth, mixture.modes if self._on_index else 0)
        self._process = GaussianDiffusion()
        self._optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))

    def init(self, key: Array) -> tuple[Any, Any, Array]:
        """Parameters, the optimizer's state and the number of steps taken."""
        params = self._model.init(jax.random.fold_in(key, 0), jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32),
                                  jnp.zeros(1, jnp.int32))['params']
        return params, self._optimizer.init(params), jnp.int32(0)

    def _predict(self, params: Any, index: Array) -> Callable[[Array, Array], Array]:
        return lambda x, t: self._model.apply({'params': params}, x, t, index)

    def advance(self, state: tuple[Any, Any, Array], key: Array, *, num_steps: int) -> tuple[Any, Array]:
        """`num_steps` updates, each on fresh draws; and the mean loss."""
        def step(state, _):
            params, moments, count = state
            draw_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), count))
            x, index = self._mixture.draw(draw_key, self._config.batch_size)
            loss = lambda params: self._process.loss(self._predict(params, index), loss_key,
                                                     x / self._mixture.deviation)[0]
            value, grads = jax.value_and_grad(loss)(params)
            updates, moments = self._optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments, count + 1), value
        state, losses = jax.lax.scan(step, state, length=num_steps)
        return state, losses.mean()

    def sample(self, params: Any, key: Array) -> Array:
        """[num_samples, 2]; an index is drawn first, as the mixture draws it."""
        index_key, noise_key = jax.random.split(jax.random.fold_in(key, 4))
        index = jax.random.randint(index_key, (self._config.num_samples,), 0, self._mixture.modes)
        process = self._process.respaced(self._config.sample_steps)
        x = process.sample(self._predict(params, index), noise_key, (self._config.num_samples, 2))
        return x * self._mixture.deviation

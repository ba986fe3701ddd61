"""Gaussian diffusion with learned variance (arXiv 2102.09672) and the samplers that run on it.

Matches `diffusion/gaussian_diffusion.py` and `respace.py` of openai/guided-diffusion, as facebookresearch/DiT and
lavoiems/DiscreteLatentCode use them: linear schedule, noise prediction, a variance between its two bounds, the
variational term unscaled and in bits. Time is an integer index, 0 next to the data and `num_timesteps - 1` at the
prior.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import row_keys

Array = jax.Array
ModelFn = Callable[[Array, Array], Array]

VARIANCES = ('learned_range', 'fixed_large', 'fixed_small')


class Posterior(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t): `mean` and `log_variance` of it, and the image `x0` that the mean aims at."""
    mean: Array
    log_variance: Array
    x0: Array


class _Tables(NamedTuple):
    """Per-index constants; computed in float64, kept in float32 on the host until a trace picks them up."""
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip: np.ndarray
    sqrt_recip_minus_one: np.ndarray
    log_betas: np.ndarray
    log_betas_large: np.ndarray
    posterior_log_variance: np.ndarray
    posterior_x0: np.ndarray
    posterior_xt: np.ndarray


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """The process, and what a network that predicts its noise is trained on and sampled with.

    `model_fn(x [B, ...C], t [B] int32) -> [B, ...2C]` (noise, then variance logits; [B, ...C] for a fixed variance) is
    called with timesteps of the unrespaced process.

    Attributes:
        num_timesteps: of the unrespaced process.
        beta_start, beta_end: ends of the linear schedule.
        variance: 'learned_range', or 'fixed_large' (beta) or 'fixed_small' (posterior variance).
        steps: ascending timesteps kept by `respaced`; None is all of them.
    """
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    variance: str = 'learned_range'
    steps: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.variance not in VARIANCES:
            raise ValueError(f'variance={self.variance!r} is not one of {VARIANCES}')
        if self.num_timesteps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f'need num_timesteps >= 2 and 0 < beta_start <= beta_end < 1, got {self.num_timesteps}, '
                             f'{self.beta_start}, {self.beta_end}')

    def __len__(self) -> int:
        return self.num_timesteps if self.steps is None else len(self.steps)

    def respaced(self, num_steps: int) -> 'GaussianDiffusion':
        """The process restricted to `num_steps` of its timesteps, evenly spread with both ends kept
        (arXiv 2102.09672 §4).

        Always counted from the full process, so respacing twice is respacing once.
        """
        if not 2 <= num_steps <= self.num_timesteps:
            raise ValueError(f'num_steps={num_steps} must lie in [2, {self.num_timesteps}]')
        stride, at, steps = (self.num_timesteps - 1) / (num_steps - 1), 0.0, []
        for _ in range(num_steps):  # summed, not multiplied: the original's rounding at ties
            steps.append(round(at))
            at += stride
        return dataclasses.replace(self, steps=tuple(steps))

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """Variances of the steps that are kept, float64."""
        betas = np.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=np.float64)
        if self.steps is None:
            return betas
        kept = np.cumprod(1 - betas)[list(self.steps)]
        return 1 - kept / np.append(1.0, kept[:-1])

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """Timestep that the network sees for each kept step, int32."""
        return np.arange(self.num_timesteps, dtype=np.int32) if self.steps is None else np.asarray(self.steps, np.int32)

    @functools.cached_property
    def _tables(self) -> _Tables:
        betas = self.betas
        cumprod = np.cumprod(1 - betas)
        prev = np.append(1.0, cumprod[:-1])
        variance = betas * (1 - prev) / (1 - cumprod)
        tables = _Tables(
            betas, cumprod, prev, np.sqrt(cumprod), np.sqrt(1 - cumprod), np.sqrt(1 / cumprod),
            np.sqrt(1 / cumprod - 1),
            log_betas=np.log(betas),
            # The true variance is 0 at index 0; its logarithm is replaced by that of index 1.
            log_betas_large=np.log(np.append(variance[1], betas[1:])),
            posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
            posterior_x0=betas * np.sqrt(prev) / (1 - cumprod),
            posterior_xt=(1 - prev) * np.sqrt(1 - betas) / (1 - cumprod))
        return _Tables(*(x.astype(np.float32) for x in tables))

    def _at(self, name: str, index: Array, ndim: int) -> Array:
        """Table `name` at `index` [B], shaped to broadcast against [B, ...] of rank `ndim`."""
        return jnp.asarray(getattr(self._tables, name))[index].reshape((-1,) + (1,) * (ndim - 1))

    def corrupt(self, x0: Array, index: Array, noise: Array) -> Array:
        """A draw from q(x_t | x0): `sqrt(abar) x0 + sqrt(1 - abar) noise`. `index` [B] counts kept steps."""
        chex.assert_equal_shape((x0, noise))
        chex.assert_shape(index, x0.shape[:1])
        return (self._at('sqrt_alphas_cumprod', index, x0.ndim) * x0
                + self._at('sqrt_one_minus_alphas_cumprod', index, x0.ndim) * noise)

    def posterior(self, output: Array, x: Array, index: Array, *, clip_denoised: bool = False) -> Posterior:
        """Computes p(x_{t-1} | x_t) from a network's output at `x` = x_t.

        Learned variance (arXiv 2102.09672 eq. 15): `log variance = f log beta + (1 - f) log beta~`, `f = (v + 1) / 2`.
        """
        at = functools.partial(self._at, index=index, ndim=x.ndim)
        noise, logits = self._split(output, x)
        small = at('posterior_log_variance')
        if logits is not None:
            share = (logits + 1) / 2
            log_variance = share * at('log_betas') + (1 - share) * small
        else:
            log_variance = jnp.broadcast_to(at('log_betas_large') if self.variance == 'fixed_large' else small, x.shape)
        x0 = at('sqrt_recip') * x - at('sqrt_recip_minus_one') * noise
        if clip_denoised:
            x0 = jnp.clip(x0, -1, 1)
        return Posterior(at('posterior_x0') * x0 + at('posterior_xt') * x, log_variance, x0)

    def _split(self, output: Array, x: Array) -> tuple[Array, Array | None]:
        channels = x.shape[-1]
        want = 2 * channels if self.variance == 'learned_range' else channels
        if output.shape != (*x.shape[:-1], want):
            raise ValueError(f'the network returned {output.shape} for input {x.shape}; variance={self.variance!r} '
                             f'wants {want} channels (learn_sigma)')
        return output[..., :channels], output[..., channels:] if want > channels else None

    def losses(self, model_fn: ModelFn, x0: Array, index: Array, noise: Array) -> dict[str, Array]:
        """Terms of the training loss [B], at given noise: `mse` of the noise, and with a learned variance `vb`.

        `vb` is the variational term in bits a dimension, KL(q(x_{t-1} | x_t, x0) || p), or at index 0 the negative
        log-likelihood of a Gaussian discretised in bins of 2 / 255; it trains the variance only.
        """
        xt = self.corrupt(x0, index, noise)
        output = model_fn(xt, jnp.asarray(self.timesteps)[index]).astype(jnp.float32)
        predicted, logits = self._split(output, xt)
        terms = {'mse': _mean(jnp.square(noise - predicted))}
        if logits is not None:
            p = self.posterior(jnp.concatenate([jax.lax.stop_gradient(predicted), logits], -1), xt, index)
            at = functools.partial(self._at, index=index, ndim=x0.ndim)
            mean = at('posterior_x0') * x0 + at('posterior_xt') * xt
            kl = _normal_kl(mean, at('posterior_log_variance'), p.mean, p.log_variance)
            nll = -_discretised_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
            terms['vb'] = jnp.where(index == 0, _mean(nll), _mean(kl)) / math.log(2.0)
        return terms

    def loss(self, model_fn: ModelFn, key: Array, x0: Array) -> tuple[Array, dict[str, Array]]:
        """Loss `mean(mse + vb)` over the batch, at uniformly drawn steps (code of arXiv 2212.09748: VB unscaled).

        Args:
            model_fn: see the class.
            key: typed key.
            x0: [B, H, W, C] float32 data.

        Returns:
            scalar loss and `{'mse', 'vb'}` scalars.
        """
        index_key, noise_key = jax.random.split(key)
        index = jax.random.randint(index_key, x0.shape[:1], 0, len(self))
        terms = self.losses(model_fn, x0, index, jax.random.normal(noise_key, x0.shape, x0.dtype))
        metrics = {name: value.mean() for name, value in terms.items()}
        total: Any = sum(metrics.values())
        return total, metrics

    def sample(self, model_fn: ModelFn, key: Array, shape: tuple[int, ...], *, sampler: str = 'ddpm', eta: float = 0.0,
               clip_denoised: bool = False, noise: Array | None = None) -> Array:
        """Samples of `shape`, all kept steps in one loop; call it inside jit.

        Args:
            model_fn: see the class; `guided` makes one with classifier-free guidance.
            key: typed key, for the first noise and the steps; or keys [B], from which each row draws alone.
            shape: [B, H, W, C].
            sampler: 'ddpm' (ancestral) or 'ddim' (arXiv 2010.02502).
            eta: of DDIM; 0 is deterministic given the first noise, 1 has the ancestral sampler's variance.
            clip_denoised: clip the predicted image to [-1, 1] at every step (pixels, not latents).
            noise: first noise, instead of drawing it.

        Returns:
            float32 `shape`.
        """
        if sampler not in ('ddpm', 'ddim'):
            raise ValueError(f"sampler={sampler!r} is not one of ('ddpm', 'ddim')")
        first_key, step_key = row_keys.split(key)
        x = row_keys.draw(jax.random.normal, first_key, shape) if noise is None else jnp.asarray(noise, jnp.float32)
        if x.shape != tuple(shape):
            raise ValueError(f'noise has shape {x.shape} but shape={tuple(shape)} was asked for')
        move = self._ddpm_step if sampler == 'ddpm' else functools.partial(self._ddim_step, eta=eta)
        timesteps = jnp.asarray(self.timesteps)

        def body(count, x):
            index = len(self) - 1 - count
            output = model_fn(x, jnp.broadcast_to(timesteps[index], shape[:1])).astype(jnp.float32)
            p = self.posterior(output, x, index[None], clip_denoised=clip_denoised)
            return move(p, x, index, row_keys.fold_in(step_key, index))

        return jax.lax.fori_loop(0, len(self), body, x)

    def _ddpm_step(self, p: Posterior, x: Array, index: Array, key: Array) -> Array:
        noise = row_keys.draw(jax.random.normal, key, x.shape)
        return p.mean + jnp.where(index > 0, jnp.exp(0.5 * p.log_variance), 0.0) * noise

    def _ddim_step(self, p: Posterior, x: Array, index: Array, key: Array, eta: float) -> Array:
        t = self._tables
        now, before = jnp.asarray(t.alphas_cumprod)[index], jnp.asarray(t.alphas_cumprod_prev)[index]
        noise = (jnp.asarray(t.sqrt_recip)[index] * x - p.x0) / jnp.asarray(t.sqrt_recip_minus_one)[index]
        sigma = eta * jnp.sqrt((1 - before) / (1 - now) * (1 - now / before))  # 0 at index 0, where before = 1
        x = jnp.sqrt(before) * p.x0 + jnp.sqrt(jnp.maximum(1 - before - sigma ** 2, 0.0)) * noise
        return x if eta == 0 else x + sigma * row_keys.draw(jax.random.normal, key, x.shape)


def guided(predict: Callable[[Array, Array, Array | None, Array | None], Array], cond: Array | None, *, scale: float,
           channels: int | None = None, interval: tuple[float, float] = (0.0, 1.0),
           num_timesteps: int = 1000) -> ModelFn:
    """Classifier-free guidance (arXiv 2207.12598) as a `model_fn`: `noise = n0 + scale (n1 - n0)`, n0 on the null, n1
    on `cond`.

    Both come from one call on a batch of twice the size; the variance logits are the conditional ones. Outside
    `interval` (arXiv 2404.07724) and with `scale` 1 the network runs on `cond` alone.

    Args:
        predict: `(x, t, cond, drop) -> output`; rows where `drop` [B] bool holds are conditioned on the null. `drop` is
            None where no row is.
        cond: [B, ...], or None for a model without a condition (never guided).
        scale: 1 is no guidance.
        channels: guide the first so many noise channels (arXiv 2212.09748's code: 3); None is all.
        interval: share of `num_timesteps`, both ends included; `(0, t / num_timesteps)` guides up to timestep t.
        num_timesteps: of the unrespaced process.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f'interval={interval}: need 0 <= low <= high <= 1')
    if channels is not None and channels < 1:
        raise ValueError(f'channels={channels}: guide at least one channel, or None for all')
    plain = lambda x, t: predict(x, t, cond, None)
    if cond is None or scale == 1:
        return plain
    # A hair of slack, so that t / num_timesteps given as a float includes t.
    first, last = math.ceil(low * num_timesteps - 1e-6), math.floor(high * num_timesteps + 1e-6)
    # Rows are paired (cond, null, cond, null, ...): a batch sharded over devices stays where it is.
    twice = functools.partial(jnp.repeat, repeats=2, axis=0)

    def both(x, t):
        rows = x.shape[0]
        drop = jnp.tile(jnp.array([False, True]), rows)
        out = predict(twice(x), twice(t), twice(cond), drop)
        out = out.reshape(rows, 2, *out.shape[1:])
        with_cond, without = out[:, 0], out[:, 1]
        k = x.shape[-1] if channels is None else min(channels, x.shape[-1])
        inside = ((t >= first) & (t <= last)).reshape((-1,) + (1,) * (x.ndim - 1))
        noise = without[..., :k] + scale * (with_cond[..., :k] - without[..., :k])
        return jnp.concatenate([jnp.where(inside, noise, with_cond[..., :k]), with_cond[..., k:]], -1)

    if first <= 0 and last >= num_timesteps - 1:
        return both
    return lambda x, t: jax.lax.cond(jnp.any((t >= first) & (t <= last)), both, plain, x, t)


def to_uint8(x: Array) -> Array:
    """Grey levels from [-1, 1] to [0, 255] by `127.5 x + 128`, cut off, not rounded, as the original's scripts do."""
    return jnp.clip(127.5 * x + 128, 0, 255).astype(jnp.uint8)


def _mean(x: Array) -> Array:
    return x.mean(tuple(range(1, x.ndim)))


def _normal_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL(N1 || N2) in nats, elementwise."""
    return 0.5 * (-1 + log_variance2 - log_variance1 + jnp.exp(log_variance1 - log_variance2)
                  + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def _normal_cdf(x: Array) -> Array:
    """Standard normal CDF in the tanh approximation that the original uses."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def _discretised_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
    """Log-mass of the bin of half-width 1 / 255 around `x`; the outermost bins of [-1, 1] reach to infinity."""
    inverse = jnp.exp(-log_scale)
    above, below = _normal_cdf(inverse * (x - mean + 1 / 255)), _normal_cdf(inverse * (x - mean - 1 / 255))
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))

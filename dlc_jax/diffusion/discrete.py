"""Discrete diffusion by score entropy (arXiv 2310.16834): two processes, two noise schedules, the loss, the samplers.

Time runs from 0, the data, to 1, noise. A token is destroyed at rate sigma'(t), independently of the others: the
absorbing process turns it into the mask, whose index is V; the uniform process draws it anew from 0..V-1. A network
gives `log s(x, sigma)[b, l, y]`, the log-ratio of the marginals of (x with y at position l) and x, zero where y already
is.

Follows `graph_lib.py`, `noise_lib.py`, `losses.py` and `sampling.py` of louaaron/SEDD and lavoiems/DiscreteLatentCode.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dlc_jax.diffusion import row_keys
from rlhf_jax.inversion import invert

Array = jax.Array
ScoreFn = Callable[[Array, Array], Array]

PROCESSES = ('absorbing', 'uniform')
NOISES = ('loglinear', 'geometric')
TIMES = ('uniform', 'antithetic', 'stratified')
SAMPLERS = {'absorbing': ('analytic', 'euler', 'remasking', 'first_hitting'), 'uniform': ('analytic', 'euler')}


class Jumps(NamedTuple):
    """Jumps that each position may make in one reverse step, without the (B, L, V + 1) matrix of it.

    Attributes:
        log_weights: [B, L, V] log-probability of each token; -inf at the one that is there.
        stay: [B, L] probability of no jump. Below 0 where the network's ratios do not add up; it then never wins.
    """
    log_weights: Array
    stay: Array


def network_calls(sampler: str, length: int, *, num_steps: int, tokens_per_call: int = 1) -> int:
    """Number of times that `DiscreteDiffusion.sample` calls the network."""
    return -(-length // tokens_per_call) if sampler == 'first_hitting' else num_steps + 1


@dataclasses.dataclass(frozen=True)
class DiscreteDiffusion:
    """The process, and what a network of its scores is trained on and sampled with.

    `score_fn(tokens int32 [B, L], sigma float32 [B]) -> log_score float32 [B, L, num_states]`.

    Attributes:
        vocab_size: V, without the mask.
        process: 'absorbing' or 'uniform'.
        noise: 'loglinear', sigma(t) = -log(1 - (1 - eps) t): a token is destroyed with probability (1 - eps) t; or
            'geometric', sigma(t) = sigma_min^(1 - t) sigma_max^t.
        eps: share of tokens that log-linear noise leaves at t = 1; keeps sigma finite.
        sigma_min, sigma_max: of the geometric noise.
        time_sampling: of the training times in a batch: 'uniform', independent as in the original; 'antithetic', pairs
            (u, 1 - u); 'stratified', evenly spaced with one common random offset.
        min_time: training times lie in [min_time, 1].
        final_time: samplers step down to this time and denoise from there.
    """
    vocab_size: int
    process: str = 'absorbing'
    noise: str = 'loglinear'
    eps: float = 1e-3
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    time_sampling: str = 'uniform'
    min_time: float = 1e-3
    final_time: float = 1e-5

    def __post_init__(self) -> None:
        for name, choices in (('process', PROCESSES), ('noise', NOISES), ('time_sampling', TIMES)):
            if getattr(self, name) not in choices:
                raise ValueError(f'diffusion.{name}={getattr(self, name)!r} is not one of {choices}')
        for name in ('eps', 'min_time', 'final_time'):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f'diffusion.{name}={getattr(self, name)} must lie between 0 and 1')
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f'diffusion.sigma_min={self.sigma_min} must be positive and below '
                             f'sigma_max={self.sigma_max}')
        if self.vocab_size < 1:
            raise ValueError(f'diffusion.vocab_size={self.vocab_size} must be positive')

    @property
    def num_states(self) -> int:
        return self.vocab_size + (self.process == 'absorbing')

    # ---- Noise -----------------------------------------------------------------------------------------------------
    # In float32, 1 - (1 - eps) t loses its digits at t = 1 and log(1 - x) loses them at t = 0; hence the forms below.

    def sigma(self, t: ArrayLike) -> Array:
        """Total noise at time t, any shape."""
        t = jnp.asarray(t, jnp.float32)
        if self.noise == 'geometric':
            return self.sigma_min * jnp.exp(t * self._log_range)
        return jnp.where(t < 0.5, -jnp.log1p(-(1 - self.eps) * t), -jnp.log(self._kept(t)))

    def dsigma(self, t: ArrayLike) -> Array:
        """Rate of noise sigma'(t), any shape."""
        t = jnp.asarray(t, jnp.float32)
        return self._log_range * self.sigma(t) if self.noise == 'geometric' else (1 - self.eps) / self._kept(t)

    def sigma_increment(self, t: ArrayLike, dt: ArrayLike) -> Array:
        """Noise between two times, sigma(t) - sigma(t - dt), exact for small dt."""
        t, dt = jnp.asarray(t, jnp.float32), jnp.asarray(dt, jnp.float32)
        if self.noise == 'geometric':
            return -self.sigma(t) * jnp.expm1(-dt * self._log_range)
        return jnp.log1p((1 - self.eps) * dt / self._kept(t))

    def _kept(self, t: Array) -> Array:
        return (1 - t) + self.eps * t

    @property
    def _log_range(self) -> Array:
        return jnp.log(self.sigma_max / self.sigma_min)

    # ---- Training --------------------------------------------------------------------------------------------------

    def sample_times(self, key: Array, num: int) -> Array:
        """Training times float32 [num] in [min_time, 1]."""
        if self.time_sampling == 'uniform':
            u = jax.random.uniform(key, (num,))
        elif self.time_sampling == 'antithetic':
            half = jax.random.uniform(key, ((num + 1) // 2,))
            u = jnp.concatenate([half, 1 - half])[:num]
        else:
            u = (jax.random.uniform(key) + jnp.arange(num) / num) % 1.0
        return self.min_time + (1 - self.min_time) * u

    def corrupt(self, key: Array, x0: Array, t: Array) -> Array:
        """Codes `x0` int [B, L] at time `t` [B]: int32, each token destroyed with probability 1 - exp(-sigma(t))."""
        chex.assert_shape(t, x0.shape[:1])
        move_key, value_key = jax.random.split(key)
        moved = jax.random.bernoulli(move_key, -jnp.expm1(-self.sigma(t))[:, None], x0.shape, mode='high')
        if self.process == 'absorbing':
            return jnp.where(moved, self.vocab_size, x0).astype(jnp.int32)
        return jnp.where(moved, jax.random.randint(value_key, x0.shape, 0, self.vocab_size), x0).astype(jnp.int32)

    def score_entropy(self, log_score: Array, xt: Array, x0: Array, sigma: Array) -> Array:
        """Denoising score entropy (arXiv 2310.16834, eq. 9) of each position, [B, L] float32, not negative.

        H = sum over y != x_t of Q(y -> x_t) (e^{s_y} - r_y s_y + r_y (log r_y - 1)), r_y = p(y | x_0) / p(x_t | x_0).
        For the absorbing process that is sum_{y < V} e^{s_y} - r s_{x_0} + r (log r - 1) at masked positions,
        r = 1 / (e^sigma - 1), and 0 elsewhere.

        Args:
            log_score: [B, L, num_states].
            xt, x0: int [B, L].
            sigma: [B].
        """
        chex.assert_equal_shape((xt, x0))
        chex.assert_shape(log_score, (*xt.shape, self.num_states))
        chex.assert_shape(sigma, xt.shape[:1])
        log_score, v = log_score.astype(jnp.float32), self.vocab_size
        if self.process == 'absorbing':
            log_r = -jnp.log(jnp.expm1(sigma))[:, None]
            # With e^s factored as r e^d no large numbers cancel, however small sigma is.
            d = log_score[..., :v] - log_r[..., None]
            at_x0 = jnp.take_along_axis(d, x0[..., None], -1)[..., 0]
            return jnp.where(xt == v, jnp.exp(log_r) * (jnp.exp(d).sum(-1) - 1 - at_x0), 0.0)
        states = jnp.arange(v)
        log_other = jnp.log(-jnp.expm1(-sigma) / v)[:, None]
        log_same = jnp.logaddexp(-sigma[:, None], log_other)
        log_r = (jnp.where(states == x0[..., None], log_same[..., None], log_other[..., None])
                 - jnp.where(xt == x0, log_same, log_other)[..., None])
        d = log_score - log_r
        terms = jnp.exp(log_r) * (jnp.exp(d) - 1 - d)
        return jnp.where(states == xt[..., None], 0.0, terms).sum(-1) / v

    def example_loss(self, log_score: Array, xt: Array, x0: Array, t: Array) -> Array:
        """Loss of each code, sigma'(t) times its score entropy summed over positions: [B] float32."""
        return self.dsigma(t) * self.score_entropy(log_score, xt, x0, self.sigma(t)).sum(-1)

    def loss(self, score_fn: ScoreFn, key: Array, x0: Array) -> tuple[Array, dict[str, Array]]:
        """Bound on -log p(x0) in nats, summed over a code's positions and averaged over the batch, at random times.

        Returns:
            The scalar, and {'corrupted': share of tokens that the noise changed}.
        """
        time_key, noise_key = jax.random.split(key)
        t = self.sample_times(time_key, x0.shape[0])
        xt = self.corrupt(noise_key, x0, t)
        loss = self.example_loss(score_fn(xt, self.sigma(t)), xt, x0, t).mean()
        return loss, {'corrupted': jnp.mean(xt != x0, dtype=jnp.float32)}

    # ---- One reverse step ------------------------------------------------------------------------------------------

    def jumps(self, log_score: Array, x: Array, t: ArrayLike, dt: ArrayLike, *, sampler: str = 'analytic',
              eta: ArrayLike = 0.0, parity: bool = False) -> Jumps:
        """Jumps from time `t` to `t - dt` (scalars); in the absorbing process, those of positions that are masked.

        'analytic' is Tweedie tau-leaping (arXiv 2310.16834, §4), exact for exact scores of one position; 'euler' takes
        the rate at t for the whole step; 'remasking' unmasks so much more that remasking each token with probability
        `eta` leaves the expected share of masks unchanged (arXiv 2503.00307, eq. 8).

        Args:
            parity: 'remasking' as the original `corrector` computes it: its step in time is dt + eta (1 - t), and the
                added mass eta (1 - P_mask) is given to the mask, and taken from the likeliest token where that beats
                it.
        """
        s, v = log_score.astype(jnp.float32), self.vocab_size
        step = self.sigma_increment(t, dt)
        if self.process == 'uniform':
            here = x[..., None] == jnp.arange(v)
            ratio = jnp.where(here, 1.0, jnp.exp(s))
            if sampler == 'euler':
                weights = dt * self.dsigma(t) / v * ratio
                stay = 1 - jnp.where(here, 0.0, weights).sum(-1)
            else:
                back = jnp.exp(step) * ratio - jnp.expm1(step) / v * ratio.sum(-1, keepdims=True)
                weights = -jnp.expm1(-step) / v * back
                stay = ((jnp.exp(-step) - jnp.expm1(-step) / v) * jnp.where(here, back, 0.0).sum(-1))
            return Jumps(jnp.log(jnp.where(here, 0.0, jnp.maximum(weights, 0.0))), stay)
        if sampler == 'euler':
            factor = dt * self.dsigma(t)
        elif sampler == 'remasking' and parity:
            factor = jnp.expm1(self.sigma_increment(t, dt + eta * (1 - t)))
        else:
            factor = jnp.expm1(step) + eta
        log_weights = s[..., :v] + jnp.log(factor)
        total = jnp.exp(log_weights).sum(-1)
        if not (sampler == 'remasking' and parity):
            return Jumps(log_weights, 1 - total)
        weights, stay, moved = jnp.exp(log_weights), 1 - total, eta * total
        best = weights.argmax(-1)
        cut = jnp.where(weights.max(-1) >= stay, moved, 0.0)[..., None] * (best[..., None] == jnp.arange(v))
        return Jumps(jnp.log(jnp.maximum(weights - cut, 0.0)), stay + moved)

    def transition_probs(self, log_score: Array, x: Array, t: ArrayLike, dt: ArrayLike, *, sampler: str = 'analytic',
                         eta: ArrayLike = 0.0, parity: bool = False) -> Array:
        """The whole rows of one step, [B, L, num_states]; see `jumps`. For inspection: samplers do not build them.

        Rows may fail to add up to 1, or have a negative entry where x is, if the scores are inconsistent.
        """
        log_weights, stay = self.jumps(log_score, x, t, dt, sampler=sampler, eta=eta, parity=parity)
        here = (x[..., None] == jnp.arange(self.num_states)).astype(jnp.float32)
        if self.process == 'uniform':
            return jnp.exp(log_weights) + stay[..., None] * here
        mask = self.vocab_size
        remasked = (jnp.arange(self.num_states) == mask).astype(jnp.float32)
        kept = (1 - eta) * here + eta * remasked
        return jnp.where(x[..., None] == mask, jnp.concatenate([jnp.exp(log_weights), stay[..., None]], -1), kept)

    # ---- Sampling --------------------------------------------------------------------------------------------------

    def prior(self, key: Array, shape: tuple[int, int]) -> Array:
        """Codes at time 1: all masks, or uniform tokens. int32 of `shape` [B, L]."""
        if self.process == 'absorbing':
            return jnp.full(shape, self.vocab_size, jnp.int32)
        draw = lambda one, shape: jax.random.randint(one, shape, 0, self.vocab_size, jnp.int32)
        return row_keys.draw(draw, key, shape)

    def sample(self, score_fn: ScoreFn, key: Array, shape: tuple[int, int], *, sampler: str = 'analytic',
               num_steps: int = 1024, eta: float = 0.01, window: tuple[float, float] = (0.3, 0.55),
               parity: bool = False, tokens_per_call: int = 1, temperature: float = 1.0) -> Array:
        """Codes int32 of `shape` [B, L] in 0..V-1, by one loop on the device; call it inside jit.

        'analytic', 'euler' and 'remasking' take `num_steps` even steps in time and a last one that denoises:
        num_steps + 1 network calls. 'first_hitting' (absorbing; arXiv 2409.02908, §4) makes L calls: it draws
        the times at which positions unmask, then the token at each. It is the limit of 'analytic' for infinitely many
        steps, exactly, when the scores at a masked position sum to 1 / (e^sigma - 1), which the loss drives them to.

        Args:
            score_fn: see the class.
            key: typed key, of the first codes and the steps; or keys [B], from which each row draws alone.
            shape: [B, L].
            sampler: one of `SAMPLERS` of the process.
            num_steps: see above.
            eta, window: 'remasking' remasks tokens with probability `eta` a step while window[0] < t < window[1].
            parity: see `jumps`.
            tokens_per_call: 'first_hitting' unmasks so many a call, in ceil(L / tokens_per_call) calls; above 1
                the tokens of one call are drawn independently of each other.
            temperature: of the choice among tokens, not of when they change; 1 samples the model.

        Raises:
            ValueError: a sampler that this process does not have, a shape that is not [B, L], or an argument out of
                range.
        """
        if len(shape) != 2:
            raise ValueError(f'shape={tuple(shape)}: give (number of codes, length of a code)')
        if sampler not in SAMPLERS[self.process]:
            raise ValueError(f'sampler={sampler!r}: the {self.process} process has {SAMPLERS[self.process]}')
        for name, value in (('num_steps', num_steps), ('tokens_per_call', tokens_per_call)):
            if value < 1:
                raise ValueError(f'{name}={value} must be at least 1')
        if not 0 <= eta <= 1:
            raise ValueError(f'eta={eta} is a probability; choose it between 0 and 1')
        if temperature <= 0:
            raise ValueError(f'temperature={temperature} must be positive')
        prior_key, key = row_keys.split(key)
        x = self.prior(prior_key, shape)
        if sampler == 'first_hitting':
            return self._first_hitting(score_fn, key, x, tokens_per_call, temperature)

        times = jnp.linspace(1.0, self.final_time, num_steps + 1)
        dt = (1.0 - self.final_time) / num_steps

        def body(i: Array, x: Array) -> Array:
            t = times[i]
            rate: ArrayLike = 0.0
            if sampler == 'remasking':
                # More than this cannot be made up for by unmasking everything else.
                most = jnp.expm1(self.sigma(t)) - jnp.expm1(self.sigma_increment(t, dt))
                rate = jnp.where((window[0] < t) & (t < window[1]), jnp.minimum(eta, most), 0.0)
            move = self.jumps(self._scores(score_fn, x, t), x, t, dt, sampler=sampler, eta=rate, parity=parity)
            return self._step(row_keys.fold_in(key, i), x, move, rate, temperature)

        x = jax.lax.fori_loop(0, num_steps, body, x)
        t = self.final_time
        # All noise is taken away. Geometric noise is sigma_min at time 0 and none only at time -inf; to the absorbing
        # process, where every mask jumps, it does not matter.
        dt = math.inf if (self.process, self.noise) == ('uniform', 'geometric') else t
        move = self.jumps(self._scores(score_fn, x, t), x, t, dt)
        if self.process == 'absorbing':
            move = move._replace(stay=jnp.zeros_like(move.stay))
        return self._step(row_keys.fold_in(key, num_steps), x, move, 0.0, temperature)

    def _scores(self, score_fn: ScoreFn, x: Array, t: ArrayLike) -> Array:
        return score_fn(x, jnp.full(x.shape[:1], self.sigma(t), jnp.float32))

    def _step(self, key: Array, x: Array, move: Jumps, remask: ArrayLike, temperature: float) -> Array:
        """Draws whether each position jumps, and only then where to.

        One categorical draw over tokens and "stay" would have to resolve probabilities of 1e-6 and less, where float32
        Gumbel noise is cut off and acts as a lower temperature (arXiv 2409.02908, §5; the original draws in float64). A
        Bernoulli draw on 46 bits and a categorical one among the tokens alone have no such tail.
        """
        jump_key, value_key, remask_key = row_keys.split(key, 3)
        total, stay = jnp.exp(move.log_weights).sum(-1), jnp.maximum(move.stay, 0.0)
        chance = jnp.where(stay > 0, total / (total + stay), 1.0)  # 1 even where `total` has underflowed
        value = _draw(value_key, move.log_weights, temperature)
        jumped = jnp.where(row_keys.bernoulli(jump_key, chance), value, x)
        if self.process == 'uniform':
            return jumped
        back = row_keys.bernoulli(remask_key, jnp.broadcast_to(jnp.float32(remask), x.shape))
        return jnp.where(x == self.vocab_size, jumped, jnp.where(back, self.vocab_size, x))

    def _first_hitting(self, score_fn: ScoreFn, key: Array, x: Array, tokens: int, temperature: float) -> Array:
        length, v = x.shape[1], self.vocab_size
        calls = network_calls('first_hitting', length, num_steps=0, tokens_per_call=tokens)
        time_key, value_key = row_keys.split(key)
        # Going back in time a position is still masked at t with probability (1 - e^-sigma(t)) / (1 - e^-sigma(1)):
        # setting that to a uniform draw and solving for sigma gives the noise level at which it unmasks.
        u = row_keys.draw(jax.random.uniform, time_key, x.shape)
        order = jnp.argsort(-u, axis=1).astype(jnp.int32)
        hit = -jnp.log1p(jnp.take_along_axis(u, order, 1) * jnp.expm1(-self.sigma(1.0)))
        hit = jnp.maximum(hit, self.sigma(self.final_time))  # u can be 0
        order = jnp.pad(order, ((0, 0), (0, calls * tokens - length)), constant_values=length)

        def body(i: Array, x: Array) -> Array:
            first = i * tokens
            sigma = jax.lax.dynamic_index_in_dim(hit, first, 1, keepdims=False)
            where = jax.lax.dynamic_slice_in_dim(order, first, tokens, 1)  # [B, tokens]; past the end: index `length`
            log_score = jnp.take_along_axis(score_fn(x, sigma)[..., :v], jnp.minimum(where, length - 1)[..., None], 1)
            value = _draw(row_keys.fold_in(value_key, i), log_score.astype(jnp.float32), temperature)
            return jax.vmap(lambda row, at, new: row.at[at].set(new, mode='drop'))(x, where, value)

        return jax.lax.fori_loop(0, calls, body, x)


def _draw(key: Array, log_weights: Array, temperature: float) -> Array:
    """One index a row, int32, with probability proportional to exp(log_weights / temperature); 0 if all are -inf.

    Inverted in two stages, see `invert`: random numbers for every entry would be most of what a step costs beside the
    network.
    """
    x = log_weights / temperature
    top = x.max(-1, keepdims=True)
    weights = jnp.exp(x - jnp.where(jnp.isfinite(top), top, 0.0))
    size = math.isqrt(weights.shape[-1] - 1) + 1
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % size)])
    weights = weights.reshape(*weights.shape[:-1], -1, size)
    block_key, entry_key = row_keys.split(key)
    block_share, entry_share = (row_keys.draw(jax.random.uniform, one, weights.shape[:-2])
                                for one in (block_key, entry_key))
    block = invert(weights.sum(-1), block_share)
    entries = jnp.take_along_axis(weights, block[..., None, None], -2)[..., 0, :]
    return block * size + invert(entries, entry_share)

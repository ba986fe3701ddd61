"""Sampling of a masked-diffusion model: a row of masks is filled, some positions a step, in any order.

    codes, filled_at, logprobs = fill(logits_of, keys, sampling, vocab_size=256)

The sampler of LLaDA (arXiv 2502.09992 §2.4): each step draws a token for every position and commits a few of them; the
others are masked again. It knows nothing of the network, which `dlc_jax.text_to_code.sample` brings. SEDD's samplers,
which follow the reverse process of `discrete.py`, are there.
"""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

REMASKING = ('low_confidence', 'random')


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the sampler that fills masks.

    Attributes:
        length: L, of a code.
        steps: network calls, all blocks together; a multiple of the number of blocks. 0: one a position.
        block_length: the code is filled block by block, from the left; 0: one block of all of it (the original).
        remasking: what a step commits: the positions where the drawn token is likeliest ('low_confidence' are masked
            again; the paper), or a random choice of them ('random'; the released commands).
        temperature: tokens are drawn from softmax(logits / temperature); 0: the likeliest. Confidence is that of the
            logits as they are.
        guidance: w in `logits = unconditional + (w + 1) (conditional - unconditional)`, which takes a second row per
            code, whose prompt is masks. 0: none.
    """
    length: int
    steps: int = 0
    block_length: int = 0
    remasking: str = 'low_confidence'
    temperature: float = 1.0
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f'sampling.length={self.length} must be positive')
        if self.remasking not in REMASKING:
            raise ValueError(f'sampling.remasking={self.remasking!r} is not one of {REMASKING}')
        if self.temperature < 0:
            raise ValueError(f'sampling.temperature={self.temperature} must not be negative')
        if self.block_length < 0 or self.length % self.block:
            raise ValueError(f'sampling.block_length={self.block_length} does not divide length={self.length}')
        if self.steps < 0 or self.num_steps % self.num_blocks or self.num_steps > self.length:
            raise ValueError(f'sampling.steps={self.steps} is not a multiple of the {self.num_blocks} blocks up to '
                             f'length={self.length}; further steps would have nothing to fill')

    @property
    def block(self) -> int:
        return self.block_length or self.length

    @property
    def num_blocks(self) -> int:
        return self.length // self.block

    @property
    def num_steps(self) -> int:
        return self.steps or self.length

    @property
    def schedule(self) -> tuple[int, ...]:
        """Positions that each step of a block fills: as even as it goes, the larger numbers first."""
        steps = self.num_steps // self.num_blocks
        return tuple(self.block // steps + (i < self.block % steps) for i in range(steps))


class Samples(NamedTuple):
    """What the sampler drew.

    Attributes:
        codes: int32 [B, L] in 0..V-1.
        filled_at: int32 [B, L] in 0..steps-1, the step at which each position was filled.
        logprobs: float32 [B, L] of each token in the distribution that it was drawn from, temperature and guidance
            included; 0 at temperature 0.
    """
    codes: Array
    filled_at: Array
    logprobs: Array


def fill(logits_of: Callable[[Array, Array], Array], keys: Array, sampling: Sampling, vocab_size: int) -> Samples:
    """Draws codes, a row for each key, by one loop on the device.

    Args:
        logits_of: (codes int32 [B, L] in 0..V with V a mask, first position int32 []) -> float32 [B, block, V], of the
            block that begins there.
        keys: typed keys [B]; a row draws from its own alone.
        vocab_size: V.
    """
    block, counts = sampling.block, jnp.array(sampling.schedule, jnp.int32)
    codes = jnp.full((len(keys), sampling.length), vocab_size, jnp.int32)

    def body(i: Array, carry: Samples) -> Samples:
        start, step = i // len(counts) * block, i % len(counts)
        of_block = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, 1)
        logits = logits_of(carry.codes, start)
        gumbel, priority = step_noise(keys, i, block, vocab_size)
        value, confidence = propose(logits, gumbel, priority if sampling.remasking == 'random' else None,
                                    sampling.temperature)
        old = of_block(carry.codes)
        new = commit(old, value, confidence, counts[step], most=sampling.schedule[0], mask=vocab_size)
        drawn = new != old
        filled = Samples(new, jnp.where(drawn, i, of_block(carry.filled_at)),
                         jnp.where(drawn, drawn_logprobs(logits, value, sampling.temperature),
                                   of_block(carry.logprobs)))
        return Samples(*(jax.lax.dynamic_update_slice_in_dim(x, part, start, 1) for x, part in zip(carry, filled)))

    empty = Samples(codes, jnp.full_like(codes, -1), jnp.zeros(codes.shape, jnp.float32))
    return jax.lax.fori_loop(0, sampling.num_steps, body, empty)


def drawn_logprobs(logits: Array, value: Array, temperature: float) -> Array:
    """Log-probability float32 [...] of `value` under softmax(logits [..., V] / temperature); 0 at temperature 0."""
    if not temperature:
        return jnp.zeros(value.shape, jnp.float32)
    logits = logits / temperature
    return jnp.take_along_axis(logits, value[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)


def propose(logits: Array, gumbel: Array, priority: Array | None, temperature: float) -> tuple[Array, Array]:
    """Draws a token for every position, and says how much the step would like to commit it.

    The original takes argmax of exp(logits) / (-log u)^temperature in float64. Its logarithm is what is computed here,
    logits + temperature gumbel with gumbel = -log(-log u): no exponential that overflows. What float64 was for are
    tokens of probability below 1e-7, which float32 noise cannot reach; among V codes there are hardly any.

    Args:
        logits: float32 [..., V].
        gumbel: of the same shape; not read at temperature 0.
        priority: [...]: random numbers to commit by; None: by the probability of the token under `logits`.

    Returns:
        int32 [...] in 0..V-1 and float32 [...].
    """
    chex.assert_equal_shape((logits, gumbel))
    value = jnp.argmax(logits + temperature * gumbel if temperature else logits, -1).astype(jnp.int32)
    if priority is not None:
        return value, priority
    picked = jnp.take_along_axis(logits, value[..., None], -1)[..., 0]
    return value, jnp.exp(picked - jax.nn.logsumexp(logits, -1))


def commit(codes: Array, value: Array, confidence: Array, count: Array, *, most: int, mask: int) -> Array:
    """Fills the `count` masked positions of highest confidence with `value`; of equals the first.

    Args:
        codes, value: int32 [B, W].
        confidence: float32 [B, W].
        count: int32 [], at most `most`, and at most the masks that a row has.
        mask: the value of `codes` that is a mask.
    """
    chex.assert_equal_shape((codes, value, confidence))
    confidence = jnp.where(codes == mask, confidence, -jnp.inf)
    where = jax.lax.top_k(confidence, most)[1]
    where = jnp.where(jnp.arange(most) < count, where, codes.shape[1])  # past the end: dropped
    new = jnp.take_along_axis(value, jnp.minimum(where, codes.shape[1] - 1), 1)
    return jax.vmap(lambda row, at, x: row.at[at].set(x, mode='drop'))(codes, where, new)


def step_noise(keys: Array, step: Array, width: int, num_codes: int) -> tuple[Array, Array]:
    """Gumbel noise [B, width, V] and uniform numbers [B, width] of a step, float32; `keys` [B], one a row."""
    def row(key: Array) -> tuple[Array, Array]:
        gumbel_key, priority_key = jax.random.split(jax.random.fold_in(key, step))
        return (jax.random.gumbel(gumbel_key, (width, num_codes), mode='high'),
                jax.random.uniform(priority_key, (width,)))

    return jax.vmap(row)(keys)

"""Categorical draws by inversion: one uniform number a row, where Gumbel noise takes one for every entry."""
import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def invert(weights: Array, uniform: Array) -> Array:
    """First index, of those with weight, at which the cumulated weights exceed the share `uniform` of all.

    Large categories are drawn in two stages, first a block of entries by the blocks' sums, then an entry of it: that
    resolves 2^-23 within the block rather than within the whole.

    Args:
        weights: [..., n] float32, not negative; they need not sum to 1.
        uniform: [...] float32 in [0, 1).

    Returns:
        int32 [...]; 0 where no entry has weight.
    """
    chex.assert_shape(uniform, weights.shape[:-1])
    # Where an entry has no weight its cumulated one counts as 0: rounding may raise it above the entry before.
    cumulated = jnp.where(weights > 0, jnp.cumsum(weights, -1), 0)
    exceeds = cumulated > uniform[..., None] * cumulated.max(-1, keepdims=True)
    return jnp.argmax(exceeds, -1).astype(jnp.int32)

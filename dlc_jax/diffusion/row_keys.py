"""Random numbers of a batch, from one key or from a key a row.

A sampler that is given keys [B] draws each row from its own key alone: what a row becomes does not depend on the rows
beside it, nor on how many there are at once. With one key the numbers of the whole batch are drawn together.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def are_rows(key: Array) -> bool:
    """Whether `key` is a key a row [B], rather than one for all."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim > (0 if typed else 1)


def split(key: Array, num: int = 2) -> tuple[Array, ...]:
    """`num` keys, or keys [B], made of `key`."""
    if not are_rows(key):
        return tuple(jax.random.split(key, num))
    return tuple(jax.vmap(lambda row: jax.random.split(row, num), out_axes=1)(key))


def fold_in(key: Array, data: Array | int) -> Array:
    """`jax.random.fold_in` of the key, or of each row's."""
    return jax.vmap(jax.random.fold_in, (0, None))(key, data) if are_rows(key) else jax.random.fold_in(key, data)


def draw(sampler: Callable[[Array, tuple[int, ...]], Array], key: Array, shape: tuple[int, ...]) -> Array:
    """`sampler(key, shape)`, or row by row of keys [B]; `shape` begins with B.

    Raises:
        ValueError: as many keys as there are no rows.
    """
    if not are_rows(key):
        return sampler(key, shape)
    if len(key) != shape[0]:
        raise ValueError(f'{len(key)} keys for {shape[0]} rows; give one key, or one a row')
    return jax.vmap(lambda row: sampler(row, shape[1:]))(key)


def bernoulli(key: Array, p: Array) -> Array:
    """bool [B, ...], true with probability `p` [B, ...]; drawn on all bits (`mode='high'`)."""
    sampler = lambda one, chance: jax.random.bernoulli(one, chance, mode='high')
    return jax.vmap(sampler)(key, p) if are_rows(key) else sampler(key, p)

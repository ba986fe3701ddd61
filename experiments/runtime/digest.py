"""Digests of arrays: a number that changes with any bit of them, whatever devices or processes hold their shards.

Each element's bits are mixed with the element's place and the results are added up modulo 2^32. A sum has no order, so
the digest of an array is that of its values alone, not of its layout, and a checkpoint can be checked on another mesh
than it was saved from. The mixing is a bijection of the bits at a given place: one changed element always changes the
digest, and any other damage goes unnoticed with a chance of 2^-32. It is no defence against forgery.

The sum is taken where the array is, at the speed of its memory, and four bytes an array come to the host.
"""
import contextlib
import hashlib
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime import placement
from experiments.runtime.partition import flatten


def digests(tree: Any) -> dict[str, str]:
    """{path: eight hexadecimal digits} of the arrays of any pytree, whatever mesh the caller has set. All processes
    that have devices of theirs call it together."""
    sums = {}
    for name, x in flatten(tree).items():
        with jax.set_mesh(placement.mesh_of(x)) if isinstance(x, jax.Array) else contextlib.nullcontext():
            sums[name] = _sum(x)
    return {name: f'{int(value):08x}' for name, value in jax.device_get(sums).items()}


def json_digest(value: Any) -> str:
    """Eight hexadecimal digits of a JSON value; the order of keys does not matter."""
    return f'{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}'


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """uint32 scalar of an array of any shape and dtype, random keys included."""
    bits = _bits(x)
    # The place in row-major order modulo 2^32, built from one counter an axis so that it is sharded as the array is.
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2 ** 32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(_mix(place) ^ bits), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """`x` as uint32; what is wider than that gets a trailing axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits that spreads each of them over all (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)  # bfloat16 is no buffer
    return digest.hexdigest()[:16]

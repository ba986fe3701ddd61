"""Attention of one new token over a cache, as one kernel for NVIDIA GPUs (Pallas, lowered through Triton).

A decode step is bound by reading keys and values. As separate operations its two products and the softmax each pass
over the scores, and read the whole cache; here each pair of row and head reads the slots written so far, once.
"""
import functools
import math

import jax
import jax.numpy as jnp

from rlhf_jax.models import attention

Array = jax.Array

BLOCK = 64  # slots read at a time
_LEAST = -1e30  # below any score; finite, so that no difference of two is NaN


def takes(q: Array, keys: Array) -> bool:
    """Whether the kernel computes this call where it is traced for: one token, on one NVIDIA GPU."""
    platform, kind = attention.target()
    alone = jax.sharding.get_abstract_mesh().size <= 1
    return (q.shape[1] == 1 and platform == 'gpu' and 'NVIDIA' in kind and alone and 16 <= q.shape[-1] <= 256
            and q.shape[2] // keys.shape[1] <= 8 and keys.dtype in (jnp.bfloat16, jnp.float16))


def decode_attention(q: Array, keys: Array, values: Array, visible: Array, ends: Array, *,
                     interpret: bool = False) -> Array:
    """Softmax attention of one query a row.

    Args:
        q: [B, 1, H, D].
        keys, values: [B, Hkv, S, D]; each is read by H / Hkv queries.
        visible: bool [B, S], the slots that a row sees.
        ends: int32 [B], no slot from here on is read.
        interpret: run it as plain JAX, on any platform.

    Returns:
        [B, 1, H, D] in the dtype of `q`; sums are float32. Zeros in a row that sees no slot.
    """
    import jax.experimental.pallas as pl
    from jax.experimental.pallas import triton as plgpu
    rows, _, heads, dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    queries = heads // kv_heads
    kernel = functools.partial(_kernel, slots=slots, dim=dim, queries=queries, load=plgpu.load, store=plgpu.store)
    whole = lambda *shape: pl.BlockSpec((None, None, *shape), lambda row, head: (row, head, 0, 0))
    out = pl.pallas_call(
        kernel, grid=(rows, kv_heads), out_shape=jax.ShapeDtypeStruct((rows, kv_heads, queries, dim), q.dtype),
        in_specs=[pl.BlockSpec((None,), lambda row, head: (row,)), whole(queries, dim), whole(slots, dim),
                  whole(slots, dim), pl.BlockSpec((None, slots), lambda row, head: (row, 0))],
        out_specs=whole(queries, dim), compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret, name='decode_attention',
    )(ends, q.reshape(rows, kv_heads, queries, dim), keys, values, visible.astype(jnp.int8))
    return out.reshape(q.shape)


def _kernel(end_ref, q_ref, k_ref, v_ref, visible_ref, out_ref, *, slots, dim, queries, load, store):
    # Sizes of what is computed with must be powers of two; what is beyond the head's width is masked out.
    columns = jnp.arange(1 << (dim - 1).bit_length())
    inside = columns < dim
    q = [load(q_ref.at[i, columns], mask=inside, other=0).astype(jnp.float32) * dim ** -0.5 for i in range(queries)]

    def body(number, carry):
        at = number * BLOCK + jnp.arange(BLOCK)
        seen = load(visible_ref.at[at], mask=at < slots, other=0) != 0
        both = (at < slots)[:, None] & inside[None, :]
        read = lambda ref: load(ref.at[at[:, None], columns[None, :]], mask=both, other=0).astype(jnp.float32)
        k, v = read(k_ref), read(v_ref)
        out = []
        for i, (highest, total, sums) in enumerate(carry):
            scores = jnp.where(seen, jnp.sum(k * q[i][None, :], 1), _LEAST)
            higher = jnp.maximum(highest, jnp.max(scores))
            weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
            shrink = jnp.exp(highest - higher)
            out.append((higher, total * shrink + jnp.sum(weights),
                        sums * shrink + jnp.sum(weights[:, None] * v, 0)))
        return tuple(out)

    start = (jnp.float32(_LEAST), jnp.float32(0), jnp.zeros(columns.shape, jnp.float32))
    blocks = jnp.minimum((end_ref[...] + BLOCK - 1) // BLOCK, math.ceil(slots / BLOCK))
    for i, (_, total, sums) in enumerate(jax.lax.fori_loop(0, blocks, body, (start,) * queries)):
        store(out_ref.at[i, columns], (sums / jnp.maximum(total, 1e-30)).astype(out_ref.dtype), mask=inside)

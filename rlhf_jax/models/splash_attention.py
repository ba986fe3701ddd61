"""Softmax attention by JAX's splash attention (Pallas) on TPUs: scores stay in a core's vector memory.

XLA knows nothing of the kernel, so it cannot split a call over devices: here each device computes the rows and heads
that lie on it, as the logical axis rules in context (`flax.linen.logical_axis_rules`) lay out 'batch' and 'heads'.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import layers

Array = jax.Array

LANES = 128  # a block's length is a multiple of it
# Tokens of a row from which on 'auto' takes the kernel. For 16 rows of 16 heads on v5e, forward and backward, the
# compiler expects 3.7 ms instead of 6.1 at 562 tokens (causal, packed), but 0.7 instead of 0.5 at 256.
LEAST = 512
BLOCK = 640  # queries, and keys, of a block at the most
PADDING = -1  # segment of what is added behind a row; no sequence has it


def layout(q: Array, k: Array) -> tuple[P, ...] | None:
    """How queries [B, T, H, D] lie on the devices of the mesh in context, and [B, T] with them; None where that is not
    known, or the rows do not divide.

    Args:
        q: queries.
        k: keys [B, S, Hkv, D].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return P(), P()
    batch, batch_parts = layers.mesh_axes('batch')
    heads, head_parts = layers.mesh_axes('heads')
    if batch is None or q.shape[0] % batch_parts:
        return None
    if q.shape[2] % head_parts or k.shape[2] % head_parts:
        heads = None
    return P(batch, None, heads, None), P(batch, None)


def block_length(length: int) -> int:
    """Length of the blocks that a row of `length` is cut into: as few as `BLOCK` allows, as short as hold the row."""
    count = -(-length // BLOCK)
    return -(-length // (count * LANES)) * LANES


def splash_attention(q: Array, k: Array, v: Array, *, segments: Array | None = None, causal: bool = False,
                     interpret: bool = False) -> Array:
    """Softmax attention.

    Args:
        q: [B, T, H, D].
        k, v: [B, S, Hkv, D]; each is read by H / Hkv queries.
        segments: int32 [B, T], not negative: a query sees the keys of its own segment alone (T = S). None: all.
        causal: and no later ones (T = S).
        interpret: run it as plain JAX, on any platform.

    Returns:
        [B, T, H, D] in the dtype of `q`; sums and softmax are float32.

    Raises:
        ValueError: a layout over the mesh that is not known, see `layout`.
    """
    specs = layout(q, k)
    if specs is None:
        raise ValueError(f"attention_impl='splash' of {q.shape[0]} rows: the mesh in context cannot divide them, or no "
                         "logical axis rules say how 'batch' lies on it; 'auto' takes another path there")
    local = functools.partial(_on_one_device, causal=causal, interpret=interpret)
    rows = () if segments is None else (segments,)
    if specs[0] != P():
        local = jax.shard_map(local, in_specs=(*specs[:1] * 3, *specs[1:] * len(rows)), out_specs=specs[0],
                              check_vma=False)
    return local(q, k, v, *rows)


def _on_one_device(q: Array, k: Array, v: Array, segments: Array | None = None, *, causal: bool,
                   interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    length, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    block_q, block_k = block_length(length), block_length(keys)
    sizes = splash.BlockSizes(block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
                              use_fused_bwd_kernel=True)
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = (_padded(x, block).swapaxes(1, 2) for x, block in ((q, block_q), (k, block_k), (v, block_k)))
    shape = q.shape[2], k.shape[2]
    mask = (splash.CausalMask if causal else splash.FullMask)(shape)
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([mask] * heads), block_sizes=sizes,
                                                  interpret=interpret)
    of_queries = of_keys = segments
    if segments is None and not causal and shape[1] > keys:  # a causal query does not see what is added behind it
        of_queries, of_keys = (jnp.zeros((q.shape[0], n), jnp.int32) for n in (length, keys))
    if of_queries is None or of_keys is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = splash.SegmentIds(_padded(of_queries, block_q, PADDING), _padded(of_keys, block_k, PADDING))
        out = jax.vmap(kernel)(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :length]


def _padded(x: Array, block: int, value: int = 0) -> Array:
    """[B, T, ...] with `value` behind T up to a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2), constant_values=value)

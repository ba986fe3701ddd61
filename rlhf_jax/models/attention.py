"""Fused attention: which kernel a platform has for it, and how a call is brought into the kernel's shape.

`fused` computes softmax attention without ever writing the [B, H, T, S] scores to memory, where there is a kernel for
the call; elsewhere it returns None and the caller computes the plain formula.
"""
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import splash_attention as splash

Array = jax.Array

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'splash')


def target() -> tuple[str, str]:
    """Platform ('cpu', 'gpu', 'tpu') and kind of the devices that a program is traced for.

    Those of the mesh in whose context it is traced (`jax.set_mesh`), so that a program compiled here for a machine
    elsewhere is that machine's; without one, of the default backend.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
    if device is not None:
        return device.platform, device.device_kind
    device = jax.devices()[0]
    return device.platform, device.device_kind


def cudnn_takes(q: Array) -> bool:
    """Whether cuDNN's flash attention has queries of this dtype and head width, backward pass included."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= _widest_head()


def _widest_head() -> int:
    """256 on the GPUs of this machine where they are Hopper or later, else 128: JAX asks the machine itself."""
    if jax.default_backend() != 'gpu':
        return 128
    return 256 if float(getattr(jax.devices()[0], 'compute_capability', 0)) >= 9 else 128


def choose(impl: str, q: Array) -> str:
    """'xla', 'cudnn' or 'splash' for queries [B, T, H, D].

    Args:
        impl: 'auto' takes the fused kernel where the target has one for this call: in half precision cuDNN on NVIDIA
            GPUs, and on TPUs splash attention for rows of `LEAST` tokens or more. The others take what they name.

    Raises:
        ValueError: `impl` is not one of `IMPLEMENTATIONS`, 'cudnn' for what cuDNN does not compute, or 'splash' where
            there is no TPU.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'attention_impl={impl!r} is not one of {IMPLEMENTATIONS}')
    if impl == 'cudnn' and not cudnn_takes(q):
        raise ValueError(f"attention_impl='cudnn' wants bfloat16 or float16 and heads of a multiple of 8 up to "
                         f"{_widest_head()}, got {q.dtype} and heads of {q.shape[-1]}; 'auto' takes another path there")
    platform, kind = target()
    if impl == 'splash' and platform != 'tpu':
        raise ValueError(f"attention_impl='splash' is a kernel for TPUs, and these devices are of platform "
                         f"{platform!r}; 'auto' takes what they have")
    if impl != 'auto':
        return impl
    if platform == 'tpu' and q.dtype == jnp.bfloat16 and q.shape[1] >= splash.LEAST:
        return 'splash'
    return 'cudnn' if platform == 'gpu' and 'NVIDIA' in kind and cudnn_takes(q) else 'xla'


def fused(q: Array, k: Array, v: Array, *, mask: Array | None = None, segments: Array | None = None,
          causal: bool = False, impl: str = 'auto') -> Array | None:
    """Softmax attention by a fused kernel; None where the plain formula is to be computed.

    Args:
        q: [B, T, H, D].
        k, v: [B, S, Hkv, D]; each is read by H / Hkv queries.
        mask: bool [B, 1, T, S] or broadcast to it, which keys a query sees; None: all.
        segments: int32 [B, T], where they say the same as `mask` (T = S): a query sees the keys of its own segment.
        causal: and no later ones (T = S).
        impl: see `choose`.

    Returns:
        [B, T, H, D] in the dtype of `v`. A query that sees no key gets something finite.

    Raises:
        ValueError: see `choose`; or 'splash' for a mask that is none of segments.
    """
    kernel = choose(impl, q)
    if kernel == 'xla':
        return None
    if kernel == 'splash':
        # Without a mesh in context the rows of a call may lie on several devices all the same, unknown here.
        unknown = splash.layout(q, k) is None or jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1
        if impl == 'auto' and (unknown or mask is not None and segments is None):
            return None
        if mask is not None and segments is None:
            raise ValueError("attention_impl='splash' has no window over tokens that are masked one by one; 'auto' "
                             'takes another path there')
        return splash.splash_attention(q, k, v, segments=segments, causal=causal)
    length, keys = q.shape[1], k.shape[1]
    q, k, v = (even(x) for x in (q, k, v))
    how: dict[str, Any] = dict(is_causal=causal, implementation='cudnn')
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
        how['mask'] = jnp.pad(mask, ((0, 0), (0, 0), (0, length % 2), (0, keys % 2)))
    elif keys % 2 and not causal:  # a causal query does not see the key that was added behind it
        how['query_seq_lengths'] = jnp.full(q.shape[0], length, jnp.int32)
        how['key_value_seq_lengths'] = jnp.full(q.shape[0], keys, jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, **how)[:, :length]


def even(x: Array) -> Array:
    """[B, T, H, D] with a row of zeros behind an odd T: what is trained cuDNN wants of even length."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) if x.shape[1] % 2 else x

"""Layers that the vision transformer, the DiT and SEDD share.

Every module takes `dtype` (compute) and `param_dtype` (storage). Normalisation
statistics, softmax and rotary angles are float32 whatever `dtype` is.
"""
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import fused
from rlhf_jax.models.functions import gelu, layer_norm, softmax
from rlhf_jax.models.layers import rope, rope_frequencies, rotary

Array = jax.Array
Initializer = Callable[..., Array]

ROPE_BASE = 10000.0


class LayerNorm(nn.Module):
    """Layer norm over the last axis. `eps` has no default: the papers disagree (1e-6 and 1e-5)."""
    eps: float
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (width,), self.param_dtype) if self.use_scale else None
        bias = self.param('bias', nn.initializers.zeros, (width,), self.param_dtype) if self.use_bias else None
        return layer_norm(x, scale, bias, eps=self.eps).astype(self.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Modulates as in adaLN: `x (1 + scale) + shift`, with `x` [B, N, D] and the others [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def modulated_layer_norm(x: Array, shift: Array, scale: Array, *, eps: float, dtype: Any = jnp.float32) -> Array:
    """Computes `modulate(layer_norm(x), shift, scale)`, the norm without scale and bias, in float32; gives `dtype`."""
    shift, scale = shift.astype(jnp.float32)[:, None], scale.astype(jnp.float32)[:, None]
    return layer_norm(x, 1 + scale, shift, eps=eps).astype(dtype)


def attention(q: Array, k: Array, v: Array, *, impl: str = 'auto') -> Array:
    """Full bidirectional softmax attention.

    Args:
        q, k, v: [B, N, H, D].
        impl: 'auto', 'xla', 'cudnn' or 'splash', see `rlhf_jax.models.attention.choose`.

    Returns:
        [B, N, H, D] in the dtype of `v`.
    """
    out = fused(q, k, v, impl=impl)
    if out is not None:
        return out
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum('bhqd,bhkd->bhqk', q, k, preferred_element_type=jnp.float32)
    probs = softmax(logits * q.shape[-1] ** -0.5).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum('bhqk,bhkd->bhqd', probs, v), 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, with rotary positions if `use_rope`.

    Parameters: `qkv` kernel [D, 3, H, D/H], `proj` kernel [H, D/H, D].
    """
    num_heads: int
    use_bias: bool = True
    use_rope: bool = False
    attention_impl: str = 'auto'
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f'width {width} is not divisible by num_heads {self.num_heads}')
        dense = functools.partial(nn.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype,
                                  param_dtype=self.param_dtype, kernel_init=self.kernel_init)
        qkv = dense((3, self.num_heads, width // self.num_heads), name='qkv')(x)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        if self.use_rope:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            angles = rotary(positions, rope_frequencies(width // self.num_heads, ROPE_BASE))
            q, k = rope(q, angles), rope(k, angles)
        return dense(width, axis=(-2, -1), name='proj')(attention(q, k, v, impl=self.attention_impl))


class Mlp(nn.Module):
    """Two dense layers, `fc1` and `fc2`, around a GELU (exact, or its tanh approximation)."""
    hidden: int
    approximate_gelu: bool = True
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype,
                                  kernel_init=self.kernel_init)
        h = gelu(dense(self.hidden, name='fc1')(x), self.approximate_gelu)
        return dense(x.shape[-1], name='fc2')(h)


def sinusoidal_embedding(t: Array, dim: int = 256, *, max_period: float = 10000.0) -> Array:
    """Features [cos, sin] of a scalar: frequency k is `max_period ** (-k / (dim / 2))`. `t`: [B] -> [B, dim]."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)

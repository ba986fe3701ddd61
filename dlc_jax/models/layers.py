"""Layers that the vision transformer, the DiT and SEDD share.

Every module takes `dtype` (compute) and `param_dtype` (storage). Normalisation
statistics, softmax and rotary angles are float32 whatever `dtype` is.

GELU, layer norm and softmax carry derivative rules of their own: the same derivatives, arranged so that the backward
pass needs one array of each, not every intermediate of its formula. `computed_once` is the one place where platforms
differ.
"""
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models.layers import rope, rope_frequencies, rotary

Array = jax.Array
Initializer = Callable[..., Array]

ROPE_BASE = 10000.0


def computed_once(x: Any) -> Any:
    """Marks arrays `x` that the forward pass computes and the backward pass reads; returns them.

    XLA's CPU compiler would recompute them, a tanh or an exponential an element, in every fusion that reads them; a
    barrier keeps it from that. For other platforms this is nothing at all: there recomputing is often cheaper than
    memory. Decided when the program is lowered, so that compiling for a TPU on a CPU machine gives the TPU's program.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: Array, approximate: bool = True) -> Array:
    """GELU (arXiv 1606.08415), by its tanh approximation or exact; keeps its slope for the backward pass."""
    return jax.nn.gelu(x, approximate=approximate)


@gelu.defjvp
def _gelu_jvp(approximate, primals, tangents):
    (x,), (dx,) = primals, tangents
    y, slope = jax.jvp(functools.partial(jax.nn.gelu, approximate=approximate), (x,), (jnp.ones_like(x),))
    return y, computed_once(slope) * dx


@jax.custom_jvp
def softmax(x: Array) -> Array:
    """Softmax over the last axis; keeps its result for the backward pass."""
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    p = computed_once(softmax(x))
    return p, p * (dx - jnp.sum(p * dx, -1, keepdims=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: Array, eps: float) -> Array:
    """Standardizes, `(x - mean) / sqrt(variance + eps)`, over the last axis in float32.

    Keeps its result for the backward pass.
    """
    return _standardize(x, eps)[0]


def _standardize(x: Array, eps: float) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return x * inverse, inverse


@standardize.defjvp
def _standardize_jvp(eps, primals, tangents):
    (x,), (dx,) = primals, tangents
    y, inverse = computed_once(_standardize(x, eps))
    dx = dx.astype(jnp.float32)
    return y, inverse * (dx - dx.mean(-1, keepdims=True) - y * jnp.mean(y * dx, -1, keepdims=True))


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
    """Layer norm over the last axis, computed in float32, returned in float32."""
    x = standardize(x, eps)
    if scale is not None:
        x = x * scale.astype(jnp.float32)
    return x if bias is None else x + bias.astype(jnp.float32)


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
    return modulate(layer_norm(x, eps=eps), shift.astype(jnp.float32), scale.astype(jnp.float32)).astype(dtype)


def attention(q: Array, k: Array, v: Array, *, impl: str = 'xla') -> Array:
    """Full bidirectional softmax attention.

    Args:
        q, k, v: [B, N, H, D].
        impl: 'xla', or 'cudnn' on an NVIDIA GPU in bf16 or fp16.

    Returns:
        [B, N, H, D] in the dtype of `v`.
    """
    if impl != 'xla':
        return jax.nn.dot_product_attention(q, k, v, implementation=cast(Any, impl))
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
    attention_impl: str = 'xla'
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

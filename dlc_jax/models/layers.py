"""Layers that the vision transformer, the DiT and SEDD share.

Every module takes `dtype` (compute) and `param_dtype` (storage). Normalisation
statistics, softmax and rotary angles are float32 whatever `dtype` is.

GELU, layer norm and softmax carry derivative rules of their own: the same derivatives, arranged so that the backward
pass needs one array of each, not every intermediate of its formula. Where platforms differ, in `computed_once` and
`gelu`, is decided when the program is lowered.
"""
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import fused
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


computed_anew = jax.lax.optimization_barrier  # what follows in the backward pass is not taken from the forward pass


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def gelu(x: Array, approximate: bool = True) -> Array:
    """GELU (arXiv 1606.08415), by its tanh approximation or exact.

    Keeps for the backward pass its slope on a CPU, and `x` elsewhere, where computing the slope anew costs less than
    writing it.
    """
    return jax.nn.gelu(x, approximate=approximate)


@gelu.defjvp
def _gelu_jvp(approximate, primals, tangents):
    (x,), (dx,) = primals, tangents

    def slope(x):
        return jax.jvp(functools.partial(jax.nn.gelu, approximate=approximate), (x,), (jnp.ones_like(x),))[1]

    kept = jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.optimization_barrier(slope(x)), default=lambda x: x)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(kept, dx):
        return jax.lax.platform_dependent(kept, dx, cpu=lambda slope_x, dx: slope_x * dx,
                                          default=lambda x, dx: slope(computed_anew(x)) * dx)
    return gelu(x, approximate), tangent(kept, dx)


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


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
    """`(x - mean) / sqrt(variance + eps) scale + bias` over the last axis, computed and returned in float32.

    Keeps `x` as it is, and mean and 1 / deviation of each row, for the backward pass.

    Args:
        x: [..., D].
        scale, bias: broadcast against `x`; None: none.
        eps: added to the variance.
    """
    return _layer_norm(x, scale, bias, eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array | None, bias: Array | None, eps: float) -> Array:
    return _affine(_standardized(x, *_moments(x, eps)), scale, bias)


def _moments(x: Array, eps: float) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


def _standardized(x: Array, mean: Array, inverse: Array) -> Array:
    return (x.astype(jnp.float32) - mean) * inverse


def _affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    y = y if scale is None else y * scale.astype(jnp.float32)
    return y if bias is None else y + bias.astype(jnp.float32)


@_layer_norm.defjvp
def _layer_norm_jvp(eps, primals, tangents):
    x, scale, bias = primals
    mean, inverse = _moments(x, eps)

    # From `x` and the moments, which are kept, not from a float32 copy of the output.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(x, mean, inverse, scale, dx, dscale, dbias):
        y, dx = _standardized(computed_anew(x), mean, inverse), dx.astype(jnp.float32)
        dy = inverse * (dx - dx.mean(-1, keepdims=True) - y * jnp.mean(y * dx, -1, keepdims=True))
        out = _affine(dy, scale, dbias)
        return out if scale is None else out + y * dscale.astype(jnp.float32)

    return (_affine(_standardized(x, mean, inverse), scale, bias),
            tangent(x, mean, inverse, scale, *tangents))


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

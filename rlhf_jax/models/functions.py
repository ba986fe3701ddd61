"""Activations, norms and softmax that keep one array each for the backward pass.

The derivatives are those of the plain formulas, arranged so that the backward pass needs one array of each function and
not every intermediate of its formula. Where platforms differ, in `computed_once` and `elementwise`, is decided when the
program is lowered.
"""
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def computed_once(x: Any) -> Any:
    """Marks arrays `x` that the forward pass computes and the backward pass reads; returns them.

    XLA's CPU compiler would recompute them, a tanh or an exponential an element, in every fusion that reads them; a
    barrier keeps it from that. For other platforms this is nothing at all: there recomputing is often cheaper than
    memory. Decided when the program is lowered, so that compiling for a TPU on a CPU machine gives the TPU's program.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


computed_anew = jax.lax.optimization_barrier  # what follows in the backward pass is not taken from the forward pass


# ---- Activations -----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def elementwise(f: Callable[[Array], Array], x: Array) -> Array:
    """Applies `f`, a function of each element by itself, in float32; returns the dtype of `x`.

    Keeps for the backward pass its slope on a CPU, and `x` elsewhere, where computing the slope anew costs less than
    writing it.

    Args:
        f: hashable; one object for all calls, since each is traced anew.
    """
    return f(_wide(x)).astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@elementwise.defjvp
def _elementwise_jvp(f, primals, tangents):
    (x,), (dx,) = primals, tangents

    def slope(x):
        x = _wide(x)
        return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

    kept = jax.lax.platform_dependent(
        x, cpu=lambda x: jax.lax.optimization_barrier(slope(x).astype(x.dtype)), default=lambda x: x)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(kept, dx):
        return jax.lax.platform_dependent(kept, dx, cpu=lambda slope_x, dx: slope_x * dx,
                                          default=lambda x, dx: (slope(computed_anew(x)) * dx).astype(x.dtype))
    return elementwise(f, x), tangent(kept, dx)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_exact(x: Array) -> Array:
    """By erf, one function of a GPU; by erfc, as in JAX, XLA splits it over two passes through memory."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5 ** 0.5))


def gelu(x: Array, approximate: bool = True) -> Array:
    """GELU (arXiv 1606.08415), by its tanh approximation or exact."""
    return elementwise(_gelu_tanh if approximate else _gelu_exact, x)


def silu(x: Array) -> Array:
    """SiLU, `x sigmoid(x)`."""
    return elementwise(jax.nn.silu, x)


# ---- Softmax ---------------------------------------------------------------------------------------------------------


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


# ---- Norms -----------------------------------------------------------------------------------------------------------


def layer_norm(x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float) -> Array:
    """`(x - mean) / sqrt(variance + eps) scale + bias` over the last axis, computed and returned in float32.

    Keeps `x` as it is, and mean and 1 / deviation of each row, for the backward pass.

    Args:
        x: [..., D].
        scale, bias: broadcast against `x`; None: none.
        eps: added to the variance.
    """
    return _norm(x, scale, bias, eps, True)


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) scale` over the last axis, computed and returned in float32.

    Keeps `x` as it is, and 1 / root mean square of each row, for the backward pass.

    Args:
        x: [..., D].
        scale: broadcast against `x`.
        eps: added to the mean square.
    """
    return _norm(x, scale, None, eps, False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _norm(x: Array, scale: Array | None, bias: Array | None, eps: float, centered: bool) -> Array:
    return _affine(_standardized(x, *_moments(x, eps, centered)), scale, bias)


def _moments(x: Array, eps: float, centered: bool) -> tuple[Array | None, Array]:
    """Mean of each row, None where it is not taken off, and 1 / deviation."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True) if centered else None
    return mean, jax.lax.rsqrt(jnp.square(x if mean is None else x - mean).mean(-1, keepdims=True) + eps)


def _standardized(x: Array, mean: Array | None, inverse: Array) -> Array:
    x = x.astype(jnp.float32)
    return (x if mean is None else x - mean) * inverse


def _affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    y = y if scale is None else y * scale.astype(jnp.float32)
    return y if bias is None else y + bias.astype(jnp.float32)


@_norm.defjvp
def _norm_jvp(eps, centered, primals, tangents):
    x, scale, bias = primals
    mean, inverse = _moments(x, eps, centered)

    # From `x` and the moments, which are kept, not from a float32 copy of the output.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(x, mean, inverse, scale, dx, dscale, dbias):
        y, dx = _standardized(computed_anew(x), mean, inverse), dx.astype(jnp.float32)
        dy = dx - y * jnp.mean(y * dx, -1, keepdims=True)
        out = _affine(inverse * (dy if mean is None else dy - dx.mean(-1, keepdims=True)), scale, dbias)
        return out if scale is None else out + y * dscale.astype(jnp.float32)

    return (_affine(_standardized(x, mean, inverse), scale, bias),
            tangent(x, mean, inverse, scale, *tangents))

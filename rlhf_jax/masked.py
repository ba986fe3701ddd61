"""Mean, variance and whitening of the entries of an array that a mask keeps. float32 inside."""
import jax
import jax.numpy as jnp

Array = jax.Array


def zeroed(x: Array, mask: Array) -> Array:
    """`x` in at least float32, with zeros where `mask` is False: what lies there (NaN included) reaches no gradient."""
    x = jnp.asarray(x)
    return jnp.where(jnp.asarray(mask) > 0, x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0)


def total(x: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Sum of `x` where `mask`."""
    return zeroed(x, mask).sum(axis)


def mean(x: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Mean of `x` where `mask`; 0 if the mask keeps nothing."""
    return total(x, mask, axis) / jnp.maximum(_count(mask, axis), 1)


def variance(x: Array, mask: Array) -> Array:
    """Variance of `x` over all of `mask`, with Bessel's correction n / (n - 1); 0 of fewer than two entries."""
    centered = zeroed(x - mean(x, mask), mask)
    return (centered * centered).sum() / jnp.maximum(_count(mask) - 1, 1)


def whiten(x: Array, mask: Array, *, shift_mean: bool = True) -> Array:
    """`(x - mean) / sqrt(variance + 1e-8)`, the statistics over `mask`; without `shift_mean` the mean is put back.

    Every entry is transformed, those outside the mask as well; the caller zeroes them.
    """
    center = mean(x, mask)
    white = (x - center) * jax.lax.rsqrt(variance(x, mask) + 1e-8)
    return white if shift_mean else white + center


def _count(mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    return (jnp.asarray(mask) > 0).sum(axis).astype(jnp.float32)

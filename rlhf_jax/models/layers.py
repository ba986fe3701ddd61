"""Layers that the language models share; repeated blocks and rotary positions serve the image models too.

Every module takes `dtype` (compute) and `param_dtype` (storage). Normalisation statistics, softmax and rotary angles
are float32 whatever `dtype` is.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import functions

Array = jax.Array

REMAT_POLICIES = {
    'full': None,  # save block inputs only
    'dots': jax.checkpoint_policies.checkpoint_dots,
    'dots_no_batch': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu': functools.partial(functions.gelu, approximate=False),
    'gelu_tanh': functools.partial(functions.gelu, approximate=True),
    'relu': nn.relu,
    'silu': functions.silu,
}


def mesh_axes(name: str) -> tuple[Any, int]:
    """Axes of the mesh in context along which the logical axis `name` lies (`flax.linen.logical_axis_rules`), None
    where no rule says, and into how many parts they split it."""
    axes = (nn.logical_to_mesh_axes((name,)) or (None,))[0]
    shape = jax.sharding.get_abstract_mesh().shape
    return axes, math.prod(shape.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def scan_blocks(block: Callable[..., nn.Module], depth: int, *, remat: str = 'none', unroll: bool = False,
                num_broadcast: int = 0) -> Callable[..., nn.Module]:
    """Runs `depth` copies of `block` in sequence, their parameters stacked on a leading axis.

    One traced block instead of `depth` keeps compile time flat in depth; `unroll` trades that back for scheduling
    across blocks, on the same parameters.

    Args:
        block: module whose `__call__(x, *broadcast)` returns `(x, y)`; the `y` of all blocks are stacked.
        depth: number of blocks.
        remat: 'none', or a key of `REMAT_POLICIES`.
        unroll: emit the blocks one after another rather than as a loop.
        num_broadcast: how many arguments after `x` every block receives unchanged.

    Raises:
        ValueError: an unknown `remat`.
    """
    if remat != 'none':
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r}: choose 'none' or one of {sorted(REMAT_POLICIES)}")
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    return nn.scan(block, length=depth, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
                   in_axes=(nn.broadcast,) * num_broadcast, unroll=depth if unroll else 1)


class Dense(nn.Module):
    """Linear map of the last `inputs` axes to `features`. Parameters: `kernel` [*in, *features], `bias` [*features].

    Where the parameters also hold `lora_a` [*in, r], `lora_b` [r, *features] and `lora_scale` [] (see `lora.py`), the
    output is `x (kernel + lora_scale lora_a lora_b)`, computed without ever forming that sum; where they hold a
    `lora_key` as well, the adapter reads `x` with some of its entries dropped (`lora.with_dropout`).
    """
    features: int | tuple[int, ...]
    inputs: int = 1
    use_bias: bool = True
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        shape = (*x.shape[-self.inputs:], *features)
        kernel = self.param('kernel', nn.initializers.normal(self.init_std), shape, self.param_dtype)
        y = self._contract(x, kernel, self.inputs)
        if self.has_variable('params', 'lora_a'):
            a: Array = self.get_variable('params', 'lora_a')
            b: Array = self.get_variable('params', 'lora_b')
            scale: Array = self.get_variable('params', 'lora_scale')
            read = x
            if self.has_variable('params', 'lora_key'):
                read = dropped(x, self.get_variable('params', 'lora_key'), self.get_variable('params', 'lora_keep'))
            y += self._contract(self._contract(read, a, self.inputs), b, 1) * jnp.asarray(scale, self.dtype)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, features, self.param_dtype).astype(self.dtype)
        return y

    def _contract(self, x: Array, kernel: Array, axes: int) -> Array:
        return jnp.tensordot(x.astype(self.dtype), jnp.asarray(kernel, self.dtype), axes)


def dropped(x: Array, key: Array, keep: Array) -> Array:
    """`x` with each entry kept, and divided by `keep`, with probability `keep` [], else 0. `key`: data of a key."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), keep, x.shape)
    return jnp.where(kept, x / keep.astype(x.dtype), 0)


def logits(x: Array, kernel: Array, *, transposed: bool = False, dtype: Any) -> Array:
    """Output head `x kernel`, operands in `dtype`, sums and result in float32.

    A bfloat16 logit of size 30 is off by 0.1: log-probabilities summed over a response would be off by tenths of a nat.

    Args:
        x: [..., D].
        kernel: [D, V], or an embedding table [V, D] with `transposed`.
    """
    contract = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x.astype(dtype), jnp.asarray(kernel, dtype), contract,
                               preferred_element_type=jnp.float32)


def embed(table: Array, tokens: Array, *, dtype: Any) -> Array:
    """Rows of `table` [V, D]. A token outside the vocabulary reads NaN, so that a wrong one cannot train unnoticed."""
    return jnp.asarray(table).at[tokens].get(mode='fill', fill_value=jnp.nan).astype(dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with scale and bias; float32 inside."""
    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return functions.layer_norm(x, scale, bias, eps=self.eps).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, `x / sqrt(mean(x^2) + eps) scale` over the last axis; float32 inside."""
    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], self.param_dtype)
        return functions.rms_norm(x, scale, eps=self.eps).astype(self.dtype)


class Mlp(nn.Module):
    """Two dense layers, `up` and `down`, around an activation (a key of `ACTIVATIONS`)."""
    hidden: int
    activation: str
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(Dense, init_std=self.init_std, dtype=self.dtype, param_dtype=self.param_dtype)
        h = ACTIVATIONS[self.activation](dense(self.hidden, name='up')(x))
        h = nn.with_logical_constraint(h, ('batch', 'tokens', 'mlp'))
        return dense(x.shape[-1], name='down')(h)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies, slowed for contexts longer than those of pretraining.

    Attributes:
        kind: 'linear' divides all frequencies by `factor`; 'llama3' only those whose wavelength is long.
        low_freq_factor, high_freq_factor: 'llama3' divides wavelengths above original_length / low_freq_factor, keeps
            those below original_length / high_freq_factor, and interpolates between (Llama 3.1: 1 and 4).
        original_length: context of pretraining, tokens.
    """
    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ('linear', 'llama3'):
            raise ValueError(f"rope scaling: kind={self.kind!r} is neither 'linear' nor 'llama3'")


def rope_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a token of each of the `dim / 2` planes, float32."""
    freqs = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is not None and scaling.kind == 'linear':
        freqs = freqs / scaling.factor
    elif scaling is not None:
        turns = scaling.original_length * freqs / (2 * math.pi)  # within the context of pretraining
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / scaling.factor
    return freqs.astype(np.float32)


def rotary(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosines and sines, float32 [B, T, 1, dim / 2], of int `positions` [B, T]."""
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Rotates the first `dim` of the last axis, halves against each other (GPT-NeoX order); the rest stays.

    Args:
        x: [B, T, H, D].
        cos_sin: of `rotary`; D may be larger than the `dim` there (partial rotary).
    """
    cos, sin = cos_sin
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], -1)

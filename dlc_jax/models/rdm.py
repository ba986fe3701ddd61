"""The network of RCG's representation diffusion model (arXiv 2312.03701 §3.2): residual blocks on one vector.

It draws the continuous embeddings that a generator of images is conditioned on: the rival of drawing codes. Layers and
sizes follow `latentmlp.py` of LTH14/rcg. What it predicts is the process's: noise with `GaussianDiffusion` (the
original predicts the clean embedding).
"""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dlc_jax.models import layers
from rlhf_jax.models.layers import scan_blocks

Array = jax.Array

SIZES = {
    'L12': dict(width=1536, depth=12),  # simplemlp_l12_w1536, for embeddings of MoCo v3
}

PARTITION_RULES = (
    (r'input/kernel', P(None, 'fsdp')),
    (r'time_embed/fc\d/kernel', P()),
    (r'blocks/fc1/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/time/kernel', P(None, None, 'tensor')),
    (r'blocks/(fc1|time)/bias', P(None, 'tensor')),
    (r'blocks/norm2/(scale|bias)', P(None, 'tensor')),
    (r'blocks/fc2/kernel', P(None, 'tensor', 'fsdp')),
    (r'output/kernel', P('fsdp', None)),
    (r'.*/(bias|scale)', P()),
)

_EPS = 1e-5


class Block(nn.Module):
    """Residual block `x += fc2(silu(LN(fc1(silu(LN x)) + time(c))))`, `c` [B, C] the time's embedding; starts as the
    identity."""
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, c: Array) -> tuple[Array, None]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = functools.partial(nn.Dense, x.shape[-1], **types)
        norm = functools.partial(layers.LayerNorm, _EPS, **types)
        h = dense(name='fc1')(nn.silu(norm(name='norm1')(x))) + dense(name='time')(c)
        h = dense(kernel_init=nn.initializers.zeros, name='fc2')(nn.silu(norm(name='norm2')(h)))
        return x + h, None


class RDM(nn.Module):
    """Predicts the noise of a noisy embedding.

    Attributes:
        embedding_dim: D.
        width, depth: see `SIZES`.
        time_dim: width of the time's embedding, whose features are as many as `width`.
        remat, unroll: see `scan_blocks`.
        dtype, param_dtype: compute and storage.
    """
    embedding_dim: int
    width: int
    depth: int
    time_dim: int = 256
    remat: str = 'none'
    unroll: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, t: Array) -> Array:
        """One network call.

        Args:
            x: [B, D] noisy embeddings, of coordinates of about unit variance.
            t: [B] timesteps of the unrespaced process.

        Returns:
            float32 [B, D].

        Raises:
            ValueError: embeddings of another size, or not one timestep a row.
        """
        if x.ndim != 2 or x.shape[1] != self.embedding_dim:
            raise ValueError(f'x has shape {x.shape} but embedding_dim={self.embedding_dim}; pass [B, embedding_dim]')
        if t.shape != x.shape[:1]:
            raise ValueError(f't has shape {t.shape} but x is a batch of {x.shape[0]}; pass one timestep a row')
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        c = TimeEmbedder(self.width, self.time_dim, name='time_embed', **types)(t)
        h = nn.Dense(self.width, name='input', **types)(x)
        h, _ = scan_blocks(Block, self.depth, remat=self.remat, unroll=self.unroll, num_broadcast=1)(
            name='blocks', **types)(h, c)
        h = nn.silu(layers.LayerNorm(1e-6, name='norm', **types)(h))
        return nn.Dense(self.embedding_dim, kernel_init=nn.initializers.zeros, name='output', dtype=jnp.float32,
                        param_dtype=self.param_dtype)(h)


class TimeEmbedder(nn.Module):
    """Embeds timesteps: [cos, sin] features, then Linear, SiLU, Linear and the SiLU that every block would begin with.
    [B] -> [B, time_dim]."""
    num_features: int
    time_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Array:
        dense = functools.partial(nn.Dense, self.time_dim, dtype=self.dtype, param_dtype=self.param_dtype)
        features = layers.sinusoidal_embedding(t, self.num_features)
        return nn.silu(dense(name='fc2')(nn.silu(dense(name='fc1')(features))))

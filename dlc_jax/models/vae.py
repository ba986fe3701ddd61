"""Stable Diffusion's KL autoencoder (arXiv 2112.10752, App. G; `AutoencoderKL` of the released sd-vae-ft-* weights).

Frozen here: it turns images into the latents the generator models, and back.
"""
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlc_jax.models import layers

Array = jax.Array

SCALING_FACTOR = 0.18215  # latents times this have about unit variance; that is what generators are trained on

# 335 MB in float32 and never trained: every device holds all of it, and no step waits for a gather.
PARTITION_RULES = ((r'.*', PartitionSpec()),)


def sample_posterior(key: Array, mean: Array, logvar: Array) -> Array:
    """One draw from N(mean, exp(logvar)), element by element; any shape, float32."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)


def _group_norm(groups: int, dtype: Any, param_dtype: Any, name: str) -> nn.GroupNorm:
    # The two-pass variance: activations of this model reach magnitudes where E[x^2] - E[x]^2 loses digits.
    return nn.GroupNorm(num_groups=groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype,
                        name=name)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, plus the input (through a 1x1 convolution where the width changes)."""
    width: int
    num_groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kw = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = x
        for i in (1, 2):
            h = nn.silu(_group_norm(self.num_groups, **kw, name=f'norm{i}')(h))
            h = nn.Conv(self.width, (3, 3), **kw, name=f'conv{i}')(h)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), **kw, name='shortcut')(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head as wide as the features, plus the input."""
    num_groups: int
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        kw = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        h = _group_norm(self.num_groups, **kw, name='norm')(x)
        q, k, v = (nn.Dense(channels, **kw, name=name)(h).reshape(batch, height * width, 1, channels)
                   for name in ('query', 'key', 'value'))
        h = layers.attention(q, k, v, impl=self.attention_impl).reshape(x.shape)
        return x + nn.Dense(channels, **kw, name='proj')(h)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.resnet(x.shape[-1], name='resnet_0')(x)
        x = self.attention(name='attention')(x)
        return self.resnet(x.shape[-1], name='resnet_1')(x)


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution: 'down', 'up' or None."""
    width: int
    depth: int
    resample: str | None
    resnet: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.depth):
            x = self.resnet(self.width, name=f'resnet_{i}')(x)
        if self.resample == 'down':
            # Padded on the bottom and right only, as the original does; 'SAME' would agree on even sizes alone.
            x = self.conv(self.width, strides=2, padding=((0, 1), (0, 1)), name='downsample')(x)
        if self.resample == 'up':
            x = self.conv(self.width, name='upsample')(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


class Tower(nn.Module):
    """Half of the autoencoder: `Encoder` with `up=False`, decoder with `up=True`.

    The encoder runs its levels, then the middle block; the decoder the middle block, then its levels, widest first and
    one residual block deeper.
    """
    widths: Sequence[int]
    depth: int
    out_channels: int
    up: bool
    num_groups: int
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kw = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        conv: Any = functools.partial(nn.Conv, kernel_size=(3, 3), **kw)
        resnet = functools.partial(ResnetBlock, num_groups=self.num_groups, **kw)
        attention = functools.partial(AttentionBlock, self.num_groups, self.attention_impl, **kw)
        middle = MiddleBlock(resnet, attention, name='middle')
        widths = self.widths[::-1] if self.up else self.widths
        last = len(widths) - 1

        x = conv(widths[0], name='conv_in')(x)
        if self.up:
            x = middle(x)
        for i, width in enumerate(widths):
            resample = None if i == last else 'up' if self.up else 'down'
            x = Level(width, self.depth + self.up, resample, resnet, conv, name=f'level_{i}')(x)
        if not self.up:
            x = middle(x)
        x = nn.silu(_group_norm(self.num_groups, **kw, name='norm_out')(x))
        return conv(self.out_channels, name='conv_out')(x)


class AutoencoderKL(nn.Module):
    """The autoencoder; the defaults are the released configuration (83 653 863 parameters, one latent per 8x8 pixels).

    Use `apply({'params': p}, images, method='encode')` and `method='decode'`. Latents are unscaled in and out: multiply
    by `SCALING_FACTOR` what is stored or modelled, divide before decoding.

    Fields:
        widths: features of each resolution, highest first; each must be divisible by `num_groups`.
        depth: residual blocks a resolution in the encoder; the decoder has one more.
        latent_channels, image_channels, num_groups, attention_impl, dtype, param_dtype: as named.
    """
    widths: Sequence[int] = (128, 256, 512, 512)
    depth: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    num_groups: int = 32
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        bad = [w for w in self.widths if w % self.num_groups]
        if bad:
            raise ValueError(f'AutoencoderKL.widths: {bad[0]} is not divisible by num_groups={self.num_groups}')
        kw = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        tower: Any = functools.partial(Tower, tuple(self.widths), self.depth, num_groups=self.num_groups,
                                       attention_impl=self.attention_impl, **kw)
        self.encoder = tower(2 * self.latent_channels, up=False)
        self.decoder = tower(self.image_channels, up=True)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), **kw)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), **kw)

    @property
    def stride(self) -> int:
        """Pixels along an edge of the square that one latent stands for."""
        return 2 ** (len(self.widths) - 1)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Posterior of the latents.

        Args:
            images: float [B, H, W, image_channels] in [-1, 1]; H and W divisible by `stride`.

        Returns:
            (mean, logvar), float32 [B, H / stride, W / stride, latent_channels] each; logvar is within [-30, 20].

        Raises:
            ValueError: images of another rank, channel count or size.
        """
        if images.ndim != 4 or images.shape[-1] != self.image_channels:
            raise ValueError(
                f'AutoencoderKL.encode: images must be [B, H, W, {self.image_channels}], got {images.shape}')
        height, width = images.shape[1:3]
        if height % self.stride or width % self.stride:
            raise ValueError(f'AutoencoderKL.encode: image size {height}x{width} is not divisible by {self.stride}; '
                             'resize or crop first')
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f'AutoencoderKL.encode: images must be float in [-1, 1], got {images.dtype}')
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Array) -> Array:
        """Images float32 [B, H, W, image_channels], about [-1, 1] but not clipped, of unscaled latents [B, h, w, C].

        Raises:
            ValueError: latents of another rank or channel count.
        """
        if latents.ndim != 4 or latents.shape[-1] != self.latent_channels:
            raise ValueError(
                f'AutoencoderKL.decode: latents must be [B, h, w, {self.latent_channels}], got {latents.shape}')
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Reconstruction of `images` through the mean latent."""
        return self.decode(self.encode(images)[0])

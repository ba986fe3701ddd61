"""The Inception v3 behind FID, sFID and the Inception Score (arXiv 1512.00567; the TensorFlow graph of 2015-12-05).

It differs from the Inception v3 of later model zoos: 1008 logits, average pools that do not count their padding, a max
pool in the last block, and TensorFlow 1's bilinear resize. Those four change FID by whole points. Layer names are those
of the released weights (pytorch-fid, torch-fidelity), so that a paper or a bug report can be followed here by name.
"""
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Array = jax.Array

# 96 MB in float32 and never trained: every device holds all of it.
PARTITION_RULES = ((r'.*', PartitionSpec()),)


class Conv(NamedTuple):
    """One convolution, batch norm and ReLU. Stride 1 pads to keep the size, stride 2 does not pad."""
    name: str
    width: int
    kernel: tuple[int, int]
    stride: int = 1


AVERAGE, MAX, MAX_STRIDE_2 = 'average', 'max', 'max_stride_2'

# A block is a tuple of branches, concatenated; a branch is a sequence of pools, `Conv`s, and pairs of `Conv`s that read
# the same input and are concatenated.


def _block_35(pool_width: int) -> tuple:
    return (
        (Conv('branch1x1', 64, (1, 1)),),
        (Conv('branch5x5_1', 48, (1, 1)), Conv('branch5x5_2', 64, (5, 5))),
        (Conv('branch3x3dbl_1', 64, (1, 1)), Conv('branch3x3dbl_2', 96, (3, 3)), Conv('branch3x3dbl_3', 96, (3, 3))),
        (AVERAGE, Conv('branch_pool', pool_width, (1, 1))),
    )


def _block_17(width: int) -> tuple:
    return (
        (Conv('branch1x1', 192, (1, 1)),),
        (Conv('branch7x7_1', width, (1, 1)), Conv('branch7x7_2', width, (1, 7)), Conv('branch7x7_3', 192, (7, 1))),
        (Conv('branch7x7dbl_1', width, (1, 1)), Conv('branch7x7dbl_2', width, (7, 1)),
         Conv('branch7x7dbl_3', width, (1, 7)), Conv('branch7x7dbl_4', width, (7, 1)),
         Conv('branch7x7dbl_5', 192, (1, 7))),
        (AVERAGE, Conv('branch_pool', 192, (1, 1))),
    )


def _block_8(pool: str) -> tuple:
    return (
        (Conv('branch1x1', 320, (1, 1)),),
        (Conv('branch3x3_1', 384, (1, 1)), (Conv('branch3x3_2a', 384, (1, 3)), Conv('branch3x3_2b', 384, (3, 1)))),
        (Conv('branch3x3dbl_1', 448, (1, 1)), Conv('branch3x3dbl_2', 384, (3, 3)),
         (Conv('branch3x3dbl_3a', 384, (1, 3)), Conv('branch3x3dbl_3b', 384, (3, 1)))),
        (pool, Conv('branch_pool', 192, (1, 1))),
    )


_REDUCE_35_TO_17 = (
    (Conv('branch3x3', 384, (3, 3), 2),),
    (Conv('branch3x3dbl_1', 64, (1, 1)), Conv('branch3x3dbl_2', 96, (3, 3)), Conv('branch3x3dbl_3', 96, (3, 3), 2)),
    (MAX_STRIDE_2,),
)

_REDUCE_17_TO_8 = (
    (Conv('branch3x3_1', 192, (1, 1)), Conv('branch3x3_2', 320, (3, 3), 2)),
    (Conv('branch7x7x3_1', 192, (1, 1)), Conv('branch7x7x3_2', 192, (1, 7)), Conv('branch7x7x3_3', 192, (7, 1)),
     Conv('branch7x7x3_4', 192, (3, 3), 2)),
    (MAX_STRIDE_2,),
)

# In order; the numbers in the names are the edges in pixels of a 299-pixel image there.
BLOCKS = {
    'Mixed_5b': _block_35(32), 'Mixed_5c': _block_35(64), 'Mixed_5d': _block_35(64),
    'Mixed_6a': _REDUCE_35_TO_17,
    'Mixed_6b': _block_17(128), 'Mixed_6c': _block_17(160), 'Mixed_6d': _block_17(160), 'Mixed_6e': _block_17(192),
    'Mixed_7a': _REDUCE_17_TO_8,
    # The last block has a max pool where every other description of the network has an average; it is in the graph.
    'Mixed_7b': _block_8(AVERAGE), 'Mixed_7c': _block_8(MAX),
}
SPATIAL_BLOCK, SPATIAL_CHANNELS = 'Mixed_6d', 7  # `mixed_6/conv` in the graph is the first branch of Mixed_6d


@flax.struct.dataclass
class InceptionOutput:
    """All float32. FID, precision and recall read `pool`, sFID `spatial`, the Inception Score `unbiased_logits`."""
    pool: Array  # [B, 2048]
    spatial: Array  # [B, h * w * 7]; 2023 at 299 pixels
    logits: Array  # [B, 1008]
    unbiased_logits: Array  # [B, 1008], the last layer without its bias


def resize_bilinear(images: Array, size: int) -> Array:
    """TensorFlow 1's `resize_bilinear`: output pixel i samples the input at `i * in / out`, no half-pixel shift.

    Args:
        images: float [B, H, W, C].
        size: height and width of the result.

    Returns:
        [B, size, size, C]; no antialiasing, as in the original.
    """
    def along(x: Array, axis: int) -> Array:
        length = x.shape[axis]
        position = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = position.astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        weight = np.expand_dims(position - low.astype(np.float32), [a for a in range(x.ndim) if a != axis])
        below = jnp.take(x, low, axis=axis)
        return below + (jnp.take(x, high, axis=axis) - below) * weight

    return along(along(images, 2), 1)


class FrozenBatchNorm(nn.Module):
    """Batch norm with its running statistics as parameters, in float32."""
    eps: float = 1e-3
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        scale = self.param('scale', nn.initializers.ones, (width,), self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, (width,), self.param_dtype)
        mean = self.param('mean', nn.initializers.zeros, (width,), self.param_dtype)
        var = self.param('var', nn.initializers.ones, (width,), self.param_dtype)
        scale, bias, mean, var = (v.astype(jnp.float32) for v in (scale, bias, mean, var))
        return (x.astype(jnp.float32) - mean) * (scale * jax.lax.rsqrt(var + self.eps)) + bias


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""
    width: int
    kernel: tuple[int, int]
    stride: int
    padding: str
    precision: Any
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.width, self.kernel, self.stride, self.padding, use_bias=False, precision=self.precision,
                    dtype=self.dtype, param_dtype=self.param_dtype, name='conv')(x)
        return nn.relu(FrozenBatchNorm(param_dtype=self.param_dtype, name='bn')(x)).astype(self.dtype)


class Mixed(nn.Module):
    """One entry of `BLOCKS`."""
    branches: tuple
    unit: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def stage(x: Array, part: Any) -> Array:
            if part == AVERAGE:
                return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)
            if part == MAX:
                return nn.max_pool(x, (3, 3), (1, 1), 'SAME')
            if part == MAX_STRIDE_2:
                return nn.max_pool(x, (3, 3), (2, 2), 'VALID')
            if isinstance(part, Conv):
                return self.unit(part.width, part.kernel, part.stride, 'SAME' if part.stride == 1 else 'VALID',
                                 name=part.name)(x)
            return jnp.concatenate([stage(x, p) for p in part], -1)

        return jnp.concatenate([functools.reduce(stage, branch, x) for branch in self.branches], -1)


class InceptionV3(nn.Module):
    """Features for FID, sFID and the Inception Score.

    Fields:
        image_size: edge to which images are resized; 299 in every published number, at least 75.
        precision: of the convolutions. 'highest' because TPUs and recent GPUs otherwise round float32 inputs to fewer
            bits, which moves FID.
        dtype, param_dtype: compute and storage.
    """
    image_size: int = 299
    num_classes: int = 1008
    precision: Any = 'highest'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> InceptionOutput:
        """Extracts features.

        Args:
            images: uint8, or float in [0, 255], [B, H, W, 3] of any size.

        Raises:
            ValueError: another rank, channel count, or an `image_size` too small to reach the last block.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f'InceptionV3: images must be [B, H, W, 3], got {images.shape}; repeat a single channel')
        if self.image_size < 75:
            raise ValueError(f'InceptionV3.image_size={self.image_size}: must be at least 75, 299 for FID')
        unit = functools.partial(ConvUnit, precision=self.precision, dtype=self.dtype, param_dtype=self.param_dtype)
        # TensorFlow 1 resizes before it normalises.
        x = (resize_bilinear(images.astype(jnp.float32), self.image_size) - 128.0) / 128.0
        x = x.astype(self.dtype)

        x = unit(32, (3, 3), 2, 'VALID', name='Conv2d_1a_3x3')(x)
        x = unit(32, (3, 3), 1, 'VALID', name='Conv2d_2a_3x3')(x)
        x = unit(64, (3, 3), 1, 'SAME', name='Conv2d_2b_3x3')(x)
        x = nn.max_pool(x, (3, 3), (2, 2), 'VALID')
        x = unit(80, (1, 1), 1, 'VALID', name='Conv2d_3b_1x1')(x)
        x = unit(192, (3, 3), 1, 'VALID', name='Conv2d_4a_3x3')(x)
        x = nn.max_pool(x, (3, 3), (2, 2), 'VALID')
        for name, branches in BLOCKS.items():
            x = Mixed(branches, unit, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1).astype(jnp.float32)
        pool = x.astype(jnp.float32).mean((1, 2))

        unbiased = nn.Dense(self.num_classes, use_bias=False, precision=self.precision, dtype=jnp.float32,
                            param_dtype=self.param_dtype, name='fc')(pool)
        bias = self.param('fc_bias', nn.initializers.zeros, (self.num_classes,), self.param_dtype)
        return InceptionOutput(pool, spatial, unbiased + bias.astype(jnp.float32), unbiased)

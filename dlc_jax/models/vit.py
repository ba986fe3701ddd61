"""Vision transformer of DINOv2 (arXiv 2304.07193) with registers (arXiv 2309.16588).

Numerically the original's `models/vision_transformer.py`. Parameter names are the original's, blocks stacked under
`blocks`.
"""
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dlc_jax.models.layers import Attention, LayerNorm, Mlp
from rlhf_jax.models.layers import scan_blocks

Array = jax.Array

SIZES = {
    'S': dict(width=384, depth=12, num_heads=6),
    'B': dict(width=768, depth=12, num_heads=12),
    'L': dict(width=1024, depth=24, num_heads=16),
    'g': dict(width=1536, depth=40, num_heads=24, ffn='swiglu'),
}

PARTITION_RULES = (
    (r'cls_token|register_tokens|mask_token|pos_embed', P()),
    (r'patch_embed/kernel', P(None, 'fsdp')),
    (r'blocks/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/attn/qkv/bias', P(None, None, 'tensor', None)),
    (r'blocks/attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/fc1/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/fc1/bias', P(None, 'tensor')),
    (r'blocks/mlp/fc2/kernel', P(None, 'tensor', 'fsdp')),
    (r'blocks/mlp/w12/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'blocks/mlp/w12/bias', P(None, None, 'tensor')),
    (r'blocks/mlp/w3/kernel', P(None, 'tensor', 'fsdp')),
    (r'.*(bias|scale|gamma)', P()),
)

# What the original leaves to PyTorch's own default: uniform in +-1/sqrt(fan in).
torch_default_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


@flax.struct.dataclass
class ViTOutput:
    """Tokens after the last block; all but `prenorm` after the final layer norm. Compute dtype.

    Attributes:
        cls: [B, D].
        registers: [B, R, D].
        patches: [B, N, D], row by row.
        prenorm: [B, 1 + R + N, D]: class token, registers, patches, before the final layer norm.
    """
    cls: Array
    registers: Array
    patches: Array
    prenorm: Array


def swiglu_hidden(hidden: int) -> int:
    """Hidden width of DINOv2's fused SwiGLU for an MLP of `hidden`: two thirds, rounded up to a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def patchify(images: Array, size: int) -> Array:
    """Cuts images into patches: [B, H, W, C] -> [B, H/size * W/size, size * size * C].

    Patches go row by row, the pixels of one as (row, column, channel).
    """
    b, h, w, c = images.shape
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * c)


def interpolate_pos_embed(pos_embed: Array, grid: tuple[int, int], *, antialias: bool = True) -> Array:
    """Position embeddings for another grid of patches.

    Args:
        pos_embed: [1, 1 + G * G, D]; the first is the class token's and stays.
        grid: rows and columns wanted.
        antialias: which bicubic filter. True: a = -0.5, widened when it shrinks the grid, as DINOv2's register models
            and SEM encoders are trained. False: a = -0.75, never widened, for a grid 0.1 larger than asked, as its
            models without registers are. Each is wrong for the other's weights: every code shifts.

    Returns:
        [1, 1 + rows * columns, D] float32.
    """
    pos_embed = pos_embed.astype(jnp.float32)
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return pos_embed
    width = pos_embed.shape[-1]
    patches = pos_embed[0, 1:].reshape(side, side, width)
    if antialias:
        patches = jax.image.resize(patches, (*grid, width), 'bicubic', antialias=True)
    else:
        rows, columns = (_bicubic_matrix(side, n) for n in grid)
        patches = jnp.einsum('ai,bj,ijd->abd', rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([pos_embed[:, :1], patches.reshape(1, -1, width)], 1)


def _bicubic_matrix(old: int, new: int, a: float = -0.75, offset: float = 0.1) -> np.ndarray:
    """Matrix [new, old] float32 that interpolates `old` points bicubically at `new`; scale (new + offset) / old."""
    at = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    taps = np.floor(at)[:, None] + np.arange(-1, 3)
    d = np.abs(at[:, None] - taps)
    weights = np.where(d <= 1, (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1, a * (d ** 3 - 5 * d ** 2 + 8 * d - 4))
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weights)
    return matrix.astype(np.float32)


class LayerScale(nn.Module):
    """A learned factor a channel, `gamma`, starting at `start` (arXiv 2103.17239)."""
    start: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = self.param('gamma', nn.initializers.constant(self.start), (x.shape[-1],), self.param_dtype)
        return x * gamma.astype(self.dtype)


class SwiGLU(nn.Module):
    """Gated MLP `w3(silu(a) * b)` with `a, b = w12(x)`.

    Parameters: `w12` kernel [D, 2, hidden], `w3` kernel [hidden, D].
    """
    hidden: int
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fields = dict(dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=nn.initializers.normal(self.init_std))
        h = nn.DenseGeneral((2, self.hidden), name='w12', **fields)(x)
        return nn.Dense(x.shape[-1], name='w3', **fields)(nn.silu(h[..., 0, :]) * h[..., 1, :])


class Block(nn.Module):
    """Pre-norm transformer block whose residual branches may skip part of the batch (`_residual`)."""
    num_heads: int
    mlp_ratio: float = 4.0
    ffn: str = 'mlp'
    layer_scale: float = 1e-5
    init_std: float = 0.02
    drop_path: float = 0.0
    drop_path_groups: int = 1
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        x = nn.with_logical_constraint(x, ('batch', 'tokens', 'embed'))
        fields = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = int(x.shape[-1] * self.mlp_ratio)
        kernel_init = nn.initializers.normal(self.init_std)
        attn = Attention(self.num_heads, attention_impl=self.attention_impl, kernel_init=kernel_init, name='attn',
                         **fields)
        mlp: nn.Module
        if self.ffn == 'swiglu':
            mlp = SwiGLU(swiglu_hidden(hidden), self.init_std, name='mlp', **fields)
        else:
            mlp = Mlp(hidden, approximate_gelu=False, kernel_init=kernel_init, name='mlp', **fields)

        def branch(layer, i):
            norm = LayerNorm(1e-6, name=f'norm{i}', **fields)
            scale = LayerScale(self.layer_scale, name=f'ls{i}', **fields) if self.layer_scale else lambda h: h
            return lambda h: scale(layer(norm(h)))

        x = self._residual(x, branch(attn, 1))
        return self._residual(x, branch(mlp, 2)), None

    @nn.nowrap
    def _residual(self, x: Array, branch: Callable[[Array], Array]) -> Array:
        """Adds a branch, `x + branch(x)`, computed only on a random subset of the batch when paths drop.

        Of each group of b consecutive examples floor((1 - drop_path) b), at least one, go through the branch, whose
        output is scaled by b over that number, as the original's `layers/block.py` does on lists of crops. With groups
        equal to the shards of the batch, no example leaves its device.
        """
        if not self.drop_path:
            return x + branch(x)
        batch, *rest = x.shape
        if batch % self.drop_path_groups:
            raise ValueError(f'drop_path_groups={self.drop_path_groups} does not divide the batch of {batch} crops')
        size = batch // self.drop_path_groups
        kept = max(int((1 - self.drop_path) * size), 1)
        draws = jax.random.uniform(self.make_rng('dropout'), (self.drop_path_groups, size))
        index = jnp.argsort(draws, -1)[:, :kept]
        groups = x.reshape(self.drop_path_groups, size, *rest)
        subset = jax.vmap(lambda rows, i: rows.at[i].get(unique_indices=True, mode='promise_in_bounds'))(groups, index)
        update = branch(subset.reshape(-1, *rest)).reshape(subset.shape) * (size / kept)
        add = jax.vmap(lambda rows, i, u: rows.at[i].add(u, unique_indices=True, mode='promise_in_bounds'))
        return add(groups, index, update.astype(x.dtype)).reshape(x.shape)


class VisionTransformer(nn.Module):
    """DINOv2's encoder: images in, normalised tokens out.

    Attributes:
        width, depth, num_heads: see `SIZES`.
        patch_size: pixels.
        ffn: 'mlp' (exact GELU) or 'swiglu' (ViT-g).
        num_registers: extra tokens between the class token and the patches; they get no position.
        pos_grid: side of the stored grid of position embeddings, in patches (37 = 518 / 14 in the released models).
            Other image sizes are interpolated from it.
        pos_antialias: how; see `interpolate_pos_embed`.
        layer_scale: initial LayerScale; 0 leaves the layers out.
        init_std: of the blocks' dense weights. 0.02 suits widths near 1000; a narrow model trained from scratch wants
            about 1 / sqrt(width), or its class token starts all but blind to the image.
        pos_init_std: of the position embedding. 0.02 is far below a patch's embedding, so a model starts on bags of
            patches and has to grow out of that; short runs from scratch want about the patches' own 0.5.
        drop_path: share of the batch that skips a residual branch when `train` (rng stream 'dropout').
        drop_path_groups: parts of the batch within which those are drawn.
        remat, unroll: see `scan_blocks`.
    """
    width: int
    depth: int
    num_heads: int
    patch_size: int = 14
    mlp_ratio: float = 4.0
    ffn: str = 'mlp'
    num_registers: int = 4
    pos_grid: int = 37
    pos_antialias: bool = True
    layer_scale: float = 1e-5
    init_std: float = 0.02
    pos_init_std: float = 0.02
    drop_path: float = 0.0
    drop_path_groups: int = 1
    remat: str = 'none'
    unroll: bool = False
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Array, masks: Array | None = None, *, train: bool = False) -> ViTOutput:
        """
        Args:
            images: [B, H, W, C] float, normalised; H and W divisible by `patch_size`.
            masks: [B, N] bool; True replaces a patch by the mask token. None: nothing is masked.
            train: drop paths.

        Raises:
            ValueError: image or mask of the wrong size, unknown `ffn`.
        """
        tokens = self.encode_tokens(images, masks, train)
        normed = self.final_norm()(tokens)
        first = 1 + self.num_registers
        return ViTOutput(cls=normed[:, 0], registers=normed[:, 1:first], patches=normed[:, first:], prenorm=tokens)

    @nn.nowrap
    def encode_tokens(self, images: Array, masks: Array | None, train: bool) -> Array:
        """Tokens after the last block, [B, 1 + R + N, D]. For use inside a compact method."""
        b, h, w, _ = images.shape
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f'images are {h}x{w}, not divisible by patch_size={self.patch_size}; change one of them')
        if self.ffn not in ('mlp', 'swiglu'):
            raise ValueError(f"ffn={self.ffn!r} is not 'mlp' or 'swiglu'")
        grid = (h // self.patch_size, w // self.patch_size)
        if masks is not None and masks.shape != (b, grid[0] * grid[1]):
            raise ValueError(f'masks have shape {masks.shape}, but {b} images of {grid[0]}x{grid[1]} patches need '
                             f'{(b, grid[0] * grid[1])}')
        token = lambda name, shape, std: self.param(name, nn.initializers.normal(std), shape, self.param_dtype)
        cls_token = token('cls_token', (1, 1, self.width), 1e-6)
        pos_embed = token('pos_embed', (1, 1 + self.pos_grid ** 2, self.width), self.pos_init_std)
        mask_token = self.param('mask_token', nn.initializers.zeros, (1, self.width), self.param_dtype)

        x = nn.Dense(self.width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=torch_default_init,
                     bias_init=self._patch_bias_init(images.shape[-1]),
                     name='patch_embed')(patchify(images, self.patch_size))
        if masks is not None:
            x = jnp.where(masks[..., None], mask_token.astype(self.dtype), x)
        pos = interpolate_pos_embed(pos_embed, grid, antialias=self.pos_antialias).astype(self.dtype)
        cls = jnp.broadcast_to(cls_token.astype(self.dtype) + pos[:, :1], (b, 1, self.width))
        parts = [cls, x + pos[:, 1:]]
        if self.num_registers:
            register_tokens = token('register_tokens', (1, self.num_registers, self.width), 1e-6)
            parts.insert(1, jnp.broadcast_to(register_tokens.astype(self.dtype), (b, self.num_registers, self.width)))
        x = jnp.concatenate(parts, 1)

        blocks = scan_blocks(Block, self.depth, remat=self.remat, unroll=self.unroll)(
            self.num_heads, mlp_ratio=self.mlp_ratio, ffn=self.ffn, layer_scale=self.layer_scale,
            init_std=self.init_std, drop_path=self.drop_path if train else 0.0, drop_path_groups=self.drop_path_groups,
            attention_impl=self.attention_impl, dtype=self.dtype, param_dtype=self.param_dtype, name='blocks')
        return blocks(x)[0]

    @nn.nowrap
    def final_norm(self) -> LayerNorm:
        return LayerNorm(1e-6, dtype=self.dtype, param_dtype=self.param_dtype, name='norm')

    @nn.nowrap
    def _patch_bias_init(self, channels: int) -> nn.initializers.Initializer:
        bound = (channels * self.patch_size ** 2) ** -0.5
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)

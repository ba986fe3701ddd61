"""Diffusion transformer with adaLN-zero (arXiv 2212.09748), conditioned on a discrete latent code
(arXiv 2507.12318 §4).

Conditions: a code (one embedding table per position, averaged), a class, a continuous embedding, or nothing. Weights of
the originals: `models.py` of lavoiems/DiscreteLatentCode and of facebookresearch/DiT.
"""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dlc_jax.models import layers
from rlhf_jax.models.layers import scan_blocks

Array = jax.Array

SIZES = {
    'S': dict(width=384, depth=12, num_heads=6),
    'B': dict(width=768, depth=12, num_heads=12),
    'L': dict(width=1024, depth=24, num_heads=16),
    'XL': dict(width=1152, depth=28, num_heads=16),
}

CONDITIONS = ('code', 'class', 'embedding', 'none')

PARTITION_RULES = (
    (r'patch_embed/kernel', P(None, 'fsdp')),
    (r'time_embed/fc\d/kernel', P(None, 'fsdp')),
    (r'cond_embed/codes', P(None, None, 'fsdp')),
    (r'cond_embed/classes', P(None, 'fsdp')),
    (r'cond_embed/proj/kernel', P(None, 'fsdp')),
    (r'cond_embed/null', P()),
    (r'blocks/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/attn/qkv/bias', P(None, None, 'tensor', None)),
    (r'blocks/attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/fc1/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/fc1/bias', P(None, 'tensor')),
    (r'blocks/mlp/fc2/kernel', P(None, 'tensor', 'fsdp')),
    (r'blocks/adaln/kernel', P(None, 'fsdp', None, 'tensor')),
    (r'final/adaln/kernel', P('fsdp', None, 'tensor')),
    (r'final/linear/kernel', P('fsdp', None)),
    (r'.*/bias', P()),
)

_EPS = 1e-6
_normal = nn.initializers.normal


@functools.lru_cache(maxsize=8)
def sincos_position_embedding(grid: int, width: int) -> np.ndarray:
    """Fixed 2-D position embedding [grid², width], float32: first half of the channels codes the column, second the
    row.

    Each half is [sin, cos] of `position * 10000 ** (-k / (width / 4))` (computed in float64).
    """
    if width % 4:
        raise ValueError(f'width={width} must be a multiple of 4 for the sin-cos position embedding')
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angle = np.arange(grid)[:, None] * omega
    one = np.concatenate([np.sin(angle), np.cos(angle)], -1)  # [grid, width / 2]
    columns = np.broadcast_to(one[None, :], (grid, grid, width // 2))
    rows = np.broadcast_to(one[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], -1).reshape(grid * grid, width).astype(np.float32)


def patchify(x: Array, patch: int) -> Array:
    """Cuts images into patches: [B, H, W, C] -> [B, H W / patch², patch² C].

    Patches go row by row, the pixels of one as (row, column, channel).
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: Array, patch: int, grid: int) -> Array:
    """Inverse of `patchify` for a square grid: [B, grid², patch² C] -> [B, grid patch, grid patch, C]."""
    b, _, features = x.shape
    channels = features // patch ** 2
    x = x.reshape(b, grid, grid, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, grid * patch, grid * patch, channels)


class TimestepEmbedder(nn.Module):
    """Embeds timesteps: 256 [cos, sin] features, then Linear, SiLU, Linear. [B] -> [B, width]."""
    width: int
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Array:
        dense = functools.partial(nn.Dense, self.width, kernel_init=_normal(self.init_std), dtype=self.dtype,
                                  param_dtype=self.param_dtype)
        h = layers.sinusoidal_embedding(t, 256)
        return dense(name='fc2')(nn.silu(dense(name='fc1')(h)))


def _code_table_init(std: float, key: Array, shape: tuple[int, int, int], dtype: Any) -> Array:
    """N(0, std²); the null row (last) is drawn once and copied to every position."""
    rows_key, null_key = jax.random.split(key)
    length, vocab, width = shape
    rows = jax.random.normal(rows_key, (length, vocab - 1, width), dtype)
    null = jnp.broadcast_to(jax.random.normal(null_key, (width,), dtype), (length, 1, width))
    return jnp.concatenate([rows, null], 1) * jnp.asarray(std, dtype)


class ConditionEmbedder(nn.Module):
    """Embeds a code, a class or an embedding, float32 [B, width]; rows where `drop` holds get the learned null."""
    condition: str
    width: int
    num_codes: int
    vocab_size: int
    num_classes: int
    embedding_dim: int
    init_std: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cond: Any, drop: Array | None) -> Array:
        return {'code': self._code, 'class': self._class, 'embedding': self._embedding}[self.condition](cond, drop)

    def _code(self, cond, drop):
        length, vocab = self.num_codes, self.vocab_size
        init = functools.partial(_code_table_init, self.init_std or self.width ** -0.5)
        table = self.param('codes', init, (length, vocab + 1, self.width), self.param_dtype)
        if jnp.issubdtype(cond.dtype, jnp.integer):
            _expect('cond', cond.shape[1:], (length,), 'num_codes')
            if drop is not None:
                cond = jnp.where(drop[:, None], vocab, cond)
            # A code outside [0, V] reads NaN, so that codes of another L x V cannot train unnoticed.
            rows = jnp.asarray(table).at[jnp.arange(length), cond].get(mode='fill', fill_value=jnp.nan)
            return rows.mean(1, dtype=jnp.float32)
        _expect('cond', cond.shape[1:], (length, vocab), 'num_codes, vocab_size')
        soft = jnp.einsum('blv,lvd->bd', cond, table[:, :vocab], preferred_element_type=jnp.float32) / length
        if drop is None:
            return soft
        return jnp.where(drop[:, None], table[:, vocab].mean(0, dtype=jnp.float32), soft)

    def _class(self, cond, drop):
        table = self.param('classes', _normal(0.02), (self.num_classes + 1, self.width), self.param_dtype)
        _expect('cond', cond.shape[1:], (), 'condition')
        if drop is not None:
            cond = jnp.where(drop, self.num_classes, cond)
        return jnp.asarray(table).at[cond].get(mode='fill', fill_value=jnp.nan).astype(jnp.float32)

    def _embedding(self, cond, drop):
        null = self.param('null', _normal(0.02), (self.embedding_dim,), self.param_dtype)
        _expect('cond', cond.shape[1:], (self.embedding_dim,), 'embedding_dim')
        if drop is not None:
            cond = jnp.where(drop[:, None], null, cond)
        # U(-1, 1) / sqrt(E): the original makes this layer after its Xavier pass.
        uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        proj = nn.Dense(self.width, use_bias=False, kernel_init=uniform, dtype=self.dtype, param_dtype=self.param_dtype,
                        name='proj')
        return proj(cond).astype(jnp.float32)


def _expect(name: str, got: tuple[int, ...], want: tuple[int, ...], fields: str) -> None:
    if tuple(got) != tuple(want):
        raise ValueError(f'{name}: each row has shape {tuple(got)} but the DiT wants {tuple(want)}; '
                         f'check model.{fields}')


class Block(nn.Module):
    """Transformer block with adaLN: `x += gate Attn(modulate(LN x)); x += gate MLP(modulate(LN x))`.

    Shifts, scales and gates come from `cond`.

    Takes x [B, N, D] and cond [B, D], which has been through its SiLU.
    """
    num_heads: int
    hidden: int
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, cond: Array) -> tuple[Array, None]:
        x = nn.with_logical_constraint(x, ('batch', 'tokens', 'embed'))
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        m = _adaln(6, x.shape[-1], **types)(cond)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[:, i] for i in range(6))
        h = layers.modulated_layer_norm(x, shift_a, scale_a, eps=_EPS, dtype=self.dtype)
        attention = layers.Attention(self.num_heads, attention_impl=self.attention_impl, name='attn', **types)
        x = x + gate_a[:, None] * attention(h)
        h = layers.modulated_layer_norm(x, shift_m, scale_m, eps=_EPS, dtype=self.dtype)
        x = x + gate_m[:, None] * layers.Mlp(self.hidden, name='mlp', **types)(h)
        return x, None


class FinalLayer(nn.Module):
    """Modulated layer norm and a linear map to `features` numbers a token; starts at zero.
    [B, N, D] -> [B, N, features]."""
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, cond: Array) -> Array:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        m = _adaln(2, x.shape[-1], **types)(cond)
        h = layers.modulated_layer_norm(x, m[:, 0], m[:, 1], eps=_EPS, dtype=self.dtype)
        return nn.Dense(self.features, kernel_init=nn.initializers.zeros, name='linear', **types)(h)


def _adaln(parts: int, width: int, **types: Any) -> nn.Module:
    return nn.DenseGeneral((parts, width), kernel_init=nn.initializers.zeros, name='adaln', **types)


class DiT(nn.Module):
    """Predicts noise, and with `learn_sigma` the variance logits, of a noisy image or latent.

    Attributes:
        input_size, channels: of the square image or latent.
        patch_size: side of a patch; divides `input_size`.
        width, depth, num_heads: see `SIZES`.
        condition: 'code', 'class', 'embedding' or 'none'; decides which of the next four fields are used.
        num_codes, vocab_size: L and V of the code.
        num_classes: classes; index `num_classes` is the null.
        embedding_dim: size of the continuous embedding.
        cond_dropout: probability, a sample, of training on the null.
        learn_sigma: also return `channels` variance logits.
        time_init_std, code_init_std: of the time MLP's weights and of the code table (0: 1 / sqrt(width)). The papers'
            values suit widths near 1000; in a narrow model they leave time and code too faint to be learnt quickly.
        dtype, param_dtype: compute and storage.
        remat, unroll: see `scan_blocks`.
        attention_impl: see `layers.attention`.
    """
    input_size: int
    channels: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    condition: str = 'code'
    num_codes: int = 0
    vocab_size: int = 0
    num_classes: int = 0
    embedding_dim: int = 0
    cond_dropout: float = 0.1
    learn_sigma: bool = True
    time_init_std: float = 0.02
    code_init_std: float = 0.0
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = 'none'
    unroll: bool = False
    attention_impl: str = 'auto'

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, drop: Array | None = None,
                 train: bool = False) -> Array:
        """One network call.

        Args:
            x: [B, S, S, C] noisy input.
            t: [B] timesteps 0..999 of the unrespaced process, integer or float.
            cond: codes [B, L] integer (V is the null) or a distribution over them [B, L, V] float; classes [B] integer;
                an embedding [B, E]; None only with condition='none'.
            drop: [B] bool; these rows are conditioned on the null whatever `cond` holds.
            train: also drops rows at random, with probability `cond_dropout`, from rng stream 'dropout'.

        Returns:
            [B, S, S, 2C] float32, noise and then variance logits ([B, S, S, C] without `learn_sigma`).

        Raises:
            ValueError: a field or an argument of the wrong shape or kind.
        """
        self._check(x, t, cond)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        grid = self.input_size // self.patch_size
        h = nn.Dense(self.width, kernel_init=nn.initializers.xavier_uniform(), name='patch_embed', **types)(
            patchify(x, self.patch_size))
        h = h + jnp.asarray(sincos_position_embedding(grid, self.width), self.dtype)
        c = TimestepEmbedder(self.width, self.time_init_std, name='time_embed', **types)(t)
        if self.condition != 'none':
            if train and self.cond_dropout > 0:
                dropped = jax.random.bernoulli(self.make_rng('dropout'), self.cond_dropout, (x.shape[0],))
                drop = dropped if drop is None else drop | dropped
            embed = ConditionEmbedder(self.condition, self.width, self.num_codes, self.vocab_size, self.num_classes,
                                      self.embedding_dim, self.code_init_std, name='cond_embed', **types)
            c = c + embed(cond, drop).astype(self.dtype)
        c = nn.silu(c)
        blocks = scan_blocks(Block, self.depth, remat=self.remat, unroll=self.unroll, num_broadcast=1)
        h, _ = blocks(self.num_heads, int(self.width * self.mlp_ratio), attention_impl=self.attention_impl,
                      name='blocks', **types)(h, c)
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        h = FinalLayer(self.patch_size ** 2 * out_channels, name='final', **types)(h, c)
        return unpatchify(h, self.patch_size, grid).astype(jnp.float32)

    def _check(self, x: Array, t: Array, cond: Array | None) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f'condition={self.condition!r} is not one of {CONDITIONS}')
        if self.input_size % self.patch_size:
            raise ValueError(f'input_size={self.input_size} is not divisible by patch_size={self.patch_size}')
        needed = {'code': ('num_codes', 'vocab_size'), 'class': ('num_classes',), 'embedding': ('embedding_dim',),
                  'none': ()}
        for name in needed[self.condition]:
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: condition={self.condition!r} needs it positive')
        _expect('x', x.shape[1:], (self.input_size, self.input_size, self.channels), 'input_size, channels')
        if t.shape != x.shape[:1]:
            raise ValueError(f't has shape {t.shape} but x is a batch of {x.shape[0]}; pass one timestep a row')
        if self.condition != 'none' and (cond is None or cond.shape[:1] != x.shape[:1]):
            raise ValueError(f'cond: condition={self.condition!r} needs one row for each of the {x.shape[0]} rows of '
                             f'x, got {None if cond is None else cond.shape} (for no condition pass drop)')

"""SEDD, the transformer that scores codes for discrete diffusion (arXiv 2310.16834; for codes arXiv 2507.12318 §4).

One structural change from louaaron/SEDD `model/transformer.py`: a learned absolute position embedding beside the rotary
one, so that position l of a code has an identity of its own. Loads the weights of lavoiems/DiscreteLatentCode `sedd/`.
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
    'small': dict(width=768, depth=12, num_heads=12),
    'medium': dict(width=1024, depth=24, num_heads=16),
}

PROCESSES = ('absorbing', 'uniform')

# No rule splits the vocabulary (with its mask entry it has V + 1 rows, which nothing divides), nor cond_dim (128 is too
# few for a large slice).
PARTITION_RULES = (
    (r'embed', P(None, 'fsdp')),
    (r'embed_by_position', P(None, None, 'fsdp')),
    (r'pos_embed', P(None, 'fsdp')),
    (r'sigma_embed/fc\d/kernel', P()),
    (r'blocks/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/attn/proj/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/fc1/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/fc1/bias', P(None, 'tensor')),
    (r'blocks/mlp/fc2/kernel', P(None, 'tensor', 'fsdp')),
    (r'blocks/adaln/kernel', P(None, None, None, 'fsdp')),
    (r'final/adaln/kernel', P(None, None, 'fsdp')),
    (r'final/linear/kernel', P('fsdp', None)),
    (r'.*/(bias|scale)', P()),
)

_EPS = 1e-5
# PyTorch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the original keeps it where a matrix does not start at zero.
_torch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _embedding_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """U(-1/sqrt(D), 1/sqrt(D)), D the last axis."""
    limit = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _adaln(parts: int, width: int, **types: Any) -> nn.Module:
    return nn.DenseGeneral((parts, width), kernel_init=nn.initializers.zeros, name='adaln', **types)


class SigmaEmbedder(nn.Module):
    """Embeds sigma: 256 [cos, sin] features (unscaled), then Linear, SiLU, Linear, SiLU. [B] -> [B, cond_dim].

    The last SiLU stands here and not in front of every adaLN, so that it runs once.
    """
    cond_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, sigma: Array) -> Array:
        dense = functools.partial(nn.Dense, self.cond_dim, kernel_init=_torch_init, dtype=self.dtype,
                                  param_dtype=self.param_dtype)
        h = nn.silu(dense(name='fc1')(layers.sinusoidal_embedding(sigma, 256)))
        return nn.silu(dense(name='fc2')(h))


class Block(nn.Module):
    """Transformer block, modulated by `cond` [B, C].

    `x += gate drop(Attn(modulate(LN x))); x += gate drop(MLP(modulate(LN x)))`
    """
    num_heads: int
    hidden: int
    dropout: float
    train: bool
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, cond: Array) -> tuple[Array, None]:
        x = nn.with_logical_constraint(x, ('batch', 'tokens', 'embed'))
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(layers.LayerNorm, _EPS, use_bias=False, **types)
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not self.train)
        attn = layers.Attention(self.num_heads, use_bias=False, use_rope=True, attention_impl=self.attention_impl,
                                kernel_init=_torch_init, name='attn', **types)
        mlp = layers.Mlp(self.hidden, kernel_init=_torch_init, name='mlp', **types)
        m = _adaln(6, x.shape[-1], **types)(cond)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[:, i] for i in range(6))
        h = attn(layers.modulate(norm(name='norm1')(x), shift_a, scale_a))
        x = x + gate_a[:, None] * drop(name='drop1')(h)
        h = mlp(layers.modulate(norm(name='norm2')(x), shift_m, scale_m))
        x = x + gate_m[:, None] * drop(name='drop2')(h)
        return x, None


class FinalLayer(nn.Module):
    """Modulated layer norm and a linear map to `num_states` scores; starts at zero. Always float32.

    Scores are exponentiated and summed by the loss and by every sampler: at their magnitude of 4 to 8 bfloat16 is 3 %
    off.
    """
    num_states: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, cond: Array) -> Array:
        types = dict(dtype=jnp.float32, param_dtype=self.param_dtype)
        m = _adaln(2, x.shape[-1], **types)(cond)
        h = layers.modulate(layers.LayerNorm(_EPS, use_bias=False, name='norm', **types)(x), m[:, 0], m[:, 1])
        return nn.Dense(self.num_states, kernel_init=nn.initializers.zeros, name='linear', **types)(h)


class SEDD(nn.Module):
    """Network of scores log s(x, sigma)[l, y], the log-ratio of the marginals of (x with y at position l) and x.

    Attributes:
        vocab_size: V. The absorbing process has one state more, the mask, whose index is V.
        length: L, tokens in a code.
        width, depth, num_heads: see `SIZES`; heads are 64 wide there.
        cond_dim: width of the embedding of sigma.
        dropout: on both residual branches, with `train=True` and rng stream 'dropout'.
        process: 'absorbing' or 'uniform'.
        scale_by_sigma: subtract log(e^sigma - 1) + log V, so that the network only learns which token it was (absorbing
            only: there every ratio at a masked position has that scale).
        shared_embedding: one token table for all positions, or one a position.
        learned_positions: the absolute position embedding; released SEDD text models have none.
        remat, unroll: see `scan_blocks`.
        attention_impl: see `layers.attention`.
        dtype: of the blocks; sigma features, norms, head and scores are float32.
    """
    vocab_size: int
    length: int
    width: int
    depth: int
    num_heads: int
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    process: str = 'absorbing'
    scale_by_sigma: bool = True
    shared_embedding: bool = True
    learned_positions: bool = True
    remat: str = 'none'
    unroll: bool = False
    attention_impl: str = 'auto'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def num_states(self) -> int:
        return self.vocab_size + (self.process == 'absorbing')

    @nn.compact
    def __call__(self, tokens: Array, sigma: Array, *, train: bool = False) -> Array:
        """Log-scores of every token at every position.

        Args:
            tokens: int32 [B, L], values below `num_states`.
            sigma: float32 [B], total noise sigma(t) > 0.
            train: dropout on.

        Returns:
            float32 [B, L, num_states], 0 at the token that is there.

        Raises:
            ValueError: a process that is not one of `PROCESSES`, a length other than `length`, or fields that exclude
                each other.
        """
        self._check(tokens, sigma)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = self._embed(tokens).astype(self.dtype)
        cond = SigmaEmbedder(self.cond_dim, name='sigma_embed', **types)(sigma)
        blocks = scan_blocks(Block, self.depth, remat=self.remat, unroll=self.unroll, num_broadcast=1)
        x, _ = blocks(self.num_heads, self.mlp_ratio * self.width, self.dropout, train,
                      attention_impl=self.attention_impl, name='blocks', **types)(x, cond)
        log_score = FinalLayer(self.num_states, self.param_dtype, name='final')(x, cond)
        if self.scale_by_sigma:
            # expm1, as sigma goes down to 1e-5 in the last step of a sampler.
            scale = jnp.log(jnp.expm1(sigma.astype(jnp.float32))) + jnp.log(float(self.vocab_size))
            log_score -= scale[:, None, None]
        is_token = tokens[..., None] == jnp.arange(self.num_states)
        return jnp.where(is_token, 0.0, log_score)

    def _embed(self, tokens: Array) -> Array:
        # A token outside the states reads NaN, so that codes of another vocabulary cannot train unnoticed.
        read: dict[str, Any] = dict(mode='fill', fill_value=jnp.nan)
        if self.shared_embedding:
            table = self.param('embed', _embedding_init, (self.num_states, self.width), self.param_dtype)
            x = jnp.asarray(table).at[tokens].get(**read)
        else:
            table = self.param('embed_by_position', _embedding_init, (self.length, self.num_states, self.width),
                               self.param_dtype)
            x = jnp.asarray(table).at[jnp.arange(self.length), tokens].get(**read)
        if self.learned_positions:
            x = x + self.param('pos_embed', _embedding_init, (self.length, self.width), self.param_dtype)
        return x

    def _check(self, tokens: Array, sigma: Array) -> None:
        if self.process not in PROCESSES:
            raise ValueError(f'SEDD: process={self.process!r} is not one of {PROCESSES}')
        if self.scale_by_sigma and self.process != 'absorbing':
            raise ValueError('SEDD: scale_by_sigma is for the absorbing process; set model.scale_by_sigma=False with '
                             f'diffusion.process={self.process!r}')
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ValueError(f'SEDD: tokens have shape {tokens.shape} but length is {self.length}; '
                             'check model.num_codes')
        if sigma.shape != tokens.shape[:1]:
            raise ValueError(f'SEDD: sigma has shape {sigma.shape}, expected one number a code, {tokens.shape[:1]}')

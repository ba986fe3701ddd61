"""GPT-2 (Radford et al. 2019): learned positions, norms first, a head tied to the embedding.

Loads `openai-community/gpt2*`. How it is called is in `decoder.py`.
"""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import decoder, layers

Array = jax.Array

SIZES = {
    '124M': dict(width=768, depth=12, num_heads=12),
    '355M': dict(width=1024, depth=24, num_heads=16),
    '774M': dict(width=1280, depth=36, num_heads=20),
    '1.5B': dict(width=1600, depth=48, num_heads=25),
}

# 50257 = 29 x 1733 tokens: no number of devices divides it, so no rule splits the vocabulary.
PARTITION_RULES = (
    (r'embed', P(None, 'fsdp')),
    (r'pos_embed', P(None, 'fsdp')),
    (r'lm_head/kernel', P('fsdp', None)),
    (r'blocks/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),
    (r'blocks/attn/qkv/bias', P(None, None, 'tensor', None)),
    (r'blocks/attn/o/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/up/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/up/bias', P(None, 'tensor')),
    (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
    (r'.*/(bias|scale)', P()),
)

LORA_TARGETS = (r'.*/attn/qkv',)


class Block(nn.Module):
    """`x += Attn(LN x); x += MLP(LN x)`."""
    num_heads: int
    hidden: int
    activation: str
    eps: float
    attention_impl: str
    init_std: float
    dtype: Any
    param_dtype: Any
    collect: bool

    @nn.compact
    def __call__(self, x: Array, context: decoder.Context, kv: Any = None) -> tuple[Array, Any]:
        x = nn.with_logical_constraint(x, ('batch', 'tokens', 'embed'))
        width = x.shape[-1]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(layers.LayerNorm, self.eps, **types)
        attn = Attention(self.num_heads, width // self.num_heads, self.attention_impl, self.init_std, name='attn',
                         **types)
        h, kv = attn(norm(name='attn_norm')(x), context, kv)
        x = x + h
        mlp = layers.Mlp(self.hidden, self.activation, self.init_std, name='mlp', **types)
        x = x + mlp(norm(name='mlp_norm')(x))
        return x, kv if self.collect else None


class Attention(nn.Module):
    """Parameters: `qkv` kernel [D, 3, H, D/H], `o` kernel [H, D/H, D], with biases."""
    num_heads: int
    head_dim: int
    impl: str
    init_std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, context: decoder.Context, kv: Any) -> tuple[Array, Any]:
        dense = functools.partial(layers.Dense, init_std=self.init_std, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv = dense((3, self.num_heads, self.head_dim), name='qkv')(x)
        out, kv = decoder.attend(*(qkv[..., i, :, :] for i in range(3)), context, kv, impl=self.impl)
        return dense(x.shape[-1], inputs=2, name='o')(out), kv


class GPT2(nn.Module):
    """GPT-2.

    Attributes:
        vocab_size: V.
        width, depth, num_heads: see `SIZES`.
        hidden: of the MLP; 0: four times the width.
        max_length: positions that have an embedding.
        tied: the output head is the embedding table.
        activation: key of `layers.ACTIVATIONS`.
        eps: of the norms.
        stacked: blocks stacked on a leading axis and scanned, or one parameter tree each (`decoder.split_blocks`).
        remat, unroll: of stacked blocks, see `layers.scan_blocks`.
        attention_impl: see `decoder.attend`.
        dtype: compute; norms' statistics, softmax and logits are float32.
    """
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    hidden: int = 0
    max_length: int = 1024
    tied: bool = True
    activation: str = 'gelu_tanh'
    eps: float = 1e-5
    init_std: float = 0.02
    stacked: bool = True
    remat: str = 'none'
    unroll: bool = False
    attention_impl: str = 'xla'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, *, mask: Array | None = None, positions: Array | None = None,
                 cache: decoder.Cache | None = None, cache_length: int = 0, at: Array | slice | None = None,
                 output: str = 'logits') -> Any:
        """Scores of the next token.

        Args:
            tokens: int32 [B, T].
            mask: bool or int [B, T], see `decoder.positions_of`.
            positions: int32 [B, T], where they are not those that the mask gives.
            cache: tokens before these, to be extended (split blocks only).
            cache_length: start a cache of so many slots.
            at: int32 [B], only this token of each row; or a slice, only these tokens of all rows.
            output: 'logits'; 'hidden': the normed output of the last block, D wide, in `dtype`; 'both': the pair.

        Returns:
            float32 [B, T, V], or [B, V] with an array `at`; with a cache, the pair of it and the cache.

        Raises:
            ValueError: shapes that do not agree, or more tokens than positions.
        """
        longest = max(tokens.shape[-1], cache_length, 0 if cache is None else cache.length)
        if longest > self.max_length:
            raise ValueError(f'GPT2: {longest} tokens, but max_length is {self.max_length}')
        if self.width % self.num_heads:
            raise ValueError(f'GPT2: width {self.width} is not divisible by num_heads {self.num_heads}')
        init = nn.initializers.normal(self.init_std)
        table = self.param('embed', init, (self.vocab_size, self.width), self.param_dtype)
        pos_table = self.param('pos_embed', init, (self.max_length, self.width), self.param_dtype)
        positions, context = decoder.prepare(tokens, mask, positions, cache)
        x = layers.embed(table, tokens, dtype=self.dtype) + layers.embed(pos_table, positions, dtype=self.dtype)
        block = functools.partial(
            Block, self.num_heads, self.hidden or 4 * self.width, self.activation, self.eps, self.attention_impl,
            self.init_std, self.dtype, self.param_dtype)
        x, cache = decoder.run_blocks(block, self.depth, x, context, cache=cache, mask=mask, cache_length=cache_length,
                                      stacked=self.stacked, remat=self.remat, unroll=self.unroll)
        x = layers.LayerNorm(self.eps, self.dtype, self.param_dtype, name='norm')(x)
        head = decoder.Head(self.vocab_size, self.init_std, self.dtype, self.param_dtype, name='lm_head')
        return decoder.outputs(x, lambda x: head(x, table if self.tied else None), at=at, output=output, cache=cache)

"""GPT-2 (Radford et al. 2019): learned positions, norms first, a head tied to the embedding.

Loads `openai-community/gpt2*`. How it is called is in `decoder.py`.
"""
import functools
from typing import Any

import flax.linen as nn
import jax
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
    """Block `x += Attn(LN x); x += MLP(LN x)`."""
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
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        out, kv = decoder.attend(q, k, v, context, kv, impl=self.impl)
        return dense(x.shape[-1], inputs=2, name='o')(out), kv


class GPT2(decoder.Decoder, kw_only=True):
    """GPT-2.

    Attributes:
        hidden: of the MLP; 0: four times the width.
    """
    hidden: int = 0
    max_length: int = 1024
    tied: bool = True
    activation: str = 'gelu_tanh'

    def block(self) -> Any:
        return functools.partial(
            Block, self.num_heads, self.hidden or 4 * self.width, self.activation, self.eps, self.attention_impl,
            self.init_std, self.dtype, self.param_dtype)

    def place(self, x: Array, positions: Array, context: decoder.Context) -> tuple[Array, decoder.Context]:
        table = self.param('pos_embed', nn.initializers.normal(self.init_std), (self.max_length, self.width),
                           self.param_dtype)
        return x + layers.embed(table, positions, dtype=self.dtype), context

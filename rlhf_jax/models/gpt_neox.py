"""GPT-NeoX (arXiv 2204.06745) as in Pythia (arXiv 2304.01373): attention and MLP in parallel, partly rotary positions.

Loads `EleutherAI/pythia-*` and what was fine-tuned from them. How it is called is in `decoder.py`.
"""
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import decoder, layers

Array = jax.Array

# Pythia. The vocabulary of 50277 tokens is padded to what the original split over devices.
SIZES = {
    '70m': dict(vocab_size=50304, width=512, depth=6, num_heads=8),
    '160m': dict(vocab_size=50304, width=768, depth=12, num_heads=12),
    '410m': dict(vocab_size=50304, width=1024, depth=24, num_heads=16),
    '1b': dict(vocab_size=50304, width=2048, depth=16, num_heads=8),
    '1.4b': dict(vocab_size=50304, width=2048, depth=24, num_heads=16),
    '2.8b': dict(vocab_size=50304, width=2560, depth=32, num_heads=32),
    '6.9b': dict(vocab_size=50432, width=4096, depth=32, num_heads=32),
    '12b': dict(vocab_size=50688, width=5120, depth=36, num_heads=40),
}

PARTITION_RULES = (
    (r'embed', P('tensor', 'fsdp')),
    (r'lm_head/kernel', P('fsdp', 'tensor')),
    (r'blocks/attn/qkv/kernel', P(None, 'fsdp', 'tensor', None, None)),
    (r'blocks/attn/qkv/bias', P(None, 'tensor', None, None)),
    (r'blocks/attn/o/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/up/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/up/bias', P(None, 'tensor')),
    (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
    (r'.*/(bias|scale)', P()),
)

LORA_TARGETS = (r'.*/attn/qkv',)


class Block(nn.Module):
    """Block `x += Attn(LN x) + MLP(LN' x)`; not `parallel`: one after the other."""
    num_heads: int
    hidden: int
    activation: str
    parallel: bool
    attention_bias: bool
    eps: float
    attention_impl: str
    init_std: float
    dtype: Any
    param_dtype: Any
    collect: bool

    @nn.compact
    def __call__(self, x: Array, context: decoder.Context, kv: Any = None) -> tuple[Array, Any]:
        x = nn.with_logical_constraint(x, ('batch', 'tokens', 'embed'))
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(layers.LayerNorm, self.eps, **types)
        attn = Attention(self.num_heads, self.attention_bias, self.attention_impl, self.init_std, name='attn', **types)
        mlp = layers.Mlp(self.hidden, self.activation, self.init_std, name='mlp', **types)
        h, kv = attn(norm(name='attn_norm')(x), context, kv)
        x = x + h + mlp(norm(name='mlp_norm')(x if self.parallel else x + h))
        return x, kv if self.collect else None


class Attention(nn.Module):
    """Parameters: `qkv` kernel [D, H, 3, D/H] (query, key and value of a head side by side), `o` kernel [H, D/H, D]."""
    num_heads: int
    use_bias: bool
    impl: str
    init_std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, context: decoder.Context, kv: Any) -> tuple[Array, Any]:
        width = x.shape[-1]
        dense = functools.partial(layers.Dense, use_bias=self.use_bias, init_std=self.init_std, dtype=self.dtype,
                                  param_dtype=self.param_dtype)
        qkv = dense((self.num_heads, 3, width // self.num_heads), name='qkv')(x)
        q, k, v = (qkv[..., i, :] for i in range(3))
        q, k = layers.rope(q, context.rotary), layers.rope(k, context.rotary)
        out, kv = decoder.attend(q, k, v, context, kv, impl=self.impl)
        return dense(width, inputs=2, name='o')(out), kv


class GPTNeoX(decoder.Decoder, kw_only=True):
    """GPT-NeoX.

    Attributes:
        hidden: of the MLP; 0: four times the width.
        rotary_fraction: share of a head's width that is rotated.
        rope_base, rope_scaling: see `layers.rope_frequencies`.
        parallel: attention and MLP read the same input.
        attention_bias: query, key, value and output projection have one.
    """
    hidden: int = 0
    rotary_fraction: float = 0.25
    rope_base: float = 10000.0
    rope_scaling: layers.RopeScaling | None = None
    parallel: bool = True
    attention_bias: bool = True

    def block(self) -> Any:
        return functools.partial(
            Block, self.num_heads, self.hidden or 4 * self.width, self.activation, self.parallel,
            self.attention_bias, self.eps, self.attention_impl, self.init_std, self.dtype, self.param_dtype)

    def place(self, x: Array, positions: Array, context: decoder.Context) -> tuple[Array, decoder.Context]:
        rotary_dim = int(self.width // self.num_heads * self.rotary_fraction)
        frequencies = layers.rope_frequencies(rotary_dim, self.rope_base, self.rope_scaling)
        return x, dataclasses.replace(context, rotary=layers.rotary(positions, frequencies))

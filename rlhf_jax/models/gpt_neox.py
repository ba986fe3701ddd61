"""GPT-NeoX (arXiv 2204.06745) as in Pythia (arXiv 2304.01373): attention and MLP in parallel, partly rotary positions.

Loads `EleutherAI/pythia-*` and what was fine-tuned from them. How it is called is in `decoder.py`.
"""
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
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
    """`x += Attn(LN x) + MLP(LN' x)`; not `parallel`: one after the other."""
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


class GPTNeoX(nn.Module):
    """GPT-NeoX.

    Attributes:
        vocab_size, width, depth, num_heads: see `SIZES`.
        hidden: of the MLP; 0: four times the width.
        max_length: context of pretraining; nothing but a limit.
        rotary_fraction: share of a head's width that is rotated.
        rope_base, rope_scaling: see `layers.rope_frequencies`.
        parallel: attention and MLP read the same input.
        tied: the output head is the embedding table.
        activation: key of `layers.ACTIVATIONS`.
        eps: of the norms.
        stacked: blocks stacked on a leading axis and scanned, or one parameter tree each (`decoder.split_blocks`).
        remat, unroll: of stacked blocks, see `layers.scan_blocks`.
        attention_impl: see `decoder.attend`.
        dtype: compute; norms' statistics, rotary angles, softmax and logits are float32.
    """
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    hidden: int = 0
    max_length: int = 2048
    rotary_fraction: float = 0.25
    rope_base: float = 10000.0
    rope_scaling: layers.RopeScaling | None = None
    parallel: bool = True
    attention_bias: bool = True
    tied: bool = False
    activation: str = 'gelu'
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
        """Scores of the next token; arguments, result and errors as of `gpt2.GPT2`."""
        longest = max(tokens.shape[-1], cache_length, 0 if cache is None else cache.length)
        if longest > self.max_length:
            raise ValueError(f'GPTNeoX: {longest} tokens, but max_length is {self.max_length}')
        if self.width % self.num_heads:
            raise ValueError(f'GPTNeoX: width {self.width} is not divisible by num_heads {self.num_heads}')
        init = nn.initializers.normal(self.init_std)
        table = self.param('embed', init, (self.vocab_size, self.width), self.param_dtype)
        positions, context = decoder.prepare(tokens, mask, positions, cache)
        rotary_dim = int(self.width // self.num_heads * self.rotary_fraction)
        frequencies = layers.rope_frequencies(rotary_dim, self.rope_base, self.rope_scaling)
        context = context.replace(rotary=layers.rotary(positions, frequencies))
        x = layers.embed(table, tokens, dtype=self.dtype)
        block = functools.partial(
            Block, self.num_heads, self.hidden or 4 * self.width, self.activation, self.parallel,
            self.attention_bias, self.eps, self.attention_impl, self.init_std, self.dtype, self.param_dtype)
        x, cache = decoder.run_blocks(block, self.depth, x, context, cache=cache, mask=mask, cache_length=cache_length,
                                      stacked=self.stacked, remat=self.remat, unroll=self.unroll)
        x = layers.LayerNorm(self.eps, self.dtype, self.param_dtype, name='norm')(x)
        head = decoder.Head(self.vocab_size, self.init_std, self.dtype, self.param_dtype, name='lm_head')
        return decoder.outputs(x, lambda x: head(x, table if self.tied else None), at=at, output=output, cache=cache)

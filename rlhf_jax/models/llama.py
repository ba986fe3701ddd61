"""LLaMA 1, 2 and 3.x (arXiv 2302.13971, 2307.09288, 2407.21783), and what has its shape.

RMS norm, rotary positions, gated MLP, from LLaMA 2-70B on grouped queries. TinyLlama and Rho-1B are sizes of it. LLaDA
(arXiv 2502.09992), a masked-diffusion language model, is the same network with `causal=False`; Mistral has a window,
Qwen2 biases and Qwen3 norms of queries and keys (`mistral.py`, `qwen2.py`, `qwen3.py`). How it is called is in
`decoder.py`.
"""
import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import decoder, layers

Array = jax.Array

_LLAMA3 = dict(vocab_size=128256, num_kv_heads=8, rope_base=500000.0, eps=1e-5, max_length=8192)
_LLAMA31 = _LLAMA3 | dict(rope_scaling=layers.RopeScaling('llama3', 8.0), max_length=131072)
_LLAMA32 = _LLAMA31 | dict(rope_scaling=layers.RopeScaling('llama3', 32.0), tied=True)

SIZES = {
    '7B': dict(vocab_size=32000, width=4096, depth=32, num_heads=32, hidden=11008, eps=1e-6, max_length=2048),
    '13B': dict(vocab_size=32000, width=5120, depth=40, num_heads=40, hidden=13824, eps=1e-6, max_length=2048),
    '30B': dict(vocab_size=32000, width=6656, depth=60, num_heads=52, hidden=17920, eps=1e-6, max_length=2048),
    '65B': dict(vocab_size=32000, width=8192, depth=80, num_heads=64, hidden=22016, eps=1e-5, max_length=2048),
    '2-7B': dict(vocab_size=32000, width=4096, depth=32, num_heads=32, hidden=11008, eps=1e-5, max_length=4096),
    '2-13B': dict(vocab_size=32000, width=5120, depth=40, num_heads=40, hidden=13824, eps=1e-5, max_length=4096),
    '2-70B': dict(vocab_size=32000, width=8192, depth=80, num_heads=64, num_kv_heads=8, hidden=28672, eps=1e-5,
                  max_length=4096),
    '3-8B': dict(width=4096, depth=32, num_heads=32, hidden=14336, **_LLAMA3),
    '3.1-8B': dict(width=4096, depth=32, num_heads=32, hidden=14336, **_LLAMA31),
    '3.1-70B': dict(width=8192, depth=80, num_heads=64, hidden=28672, **_LLAMA31),
    '3.2-1B': dict(width=2048, depth=16, num_heads=32, hidden=8192, **_LLAMA32),
    '3.2-3B': dict(width=3072, depth=28, num_heads=24, hidden=8192, **_LLAMA32),
    'TinyLlama-1.1B': dict(vocab_size=32000, width=2048, depth=22, num_heads=32, num_kv_heads=4, hidden=5632, eps=1e-5,
                           max_length=2048),
    'LLaDA-8B': dict(vocab_size=126464, width=4096, depth=32, num_heads=32, hidden=12288, rope_base=500000.0, eps=1e-5,
                     max_length=4096, causal=False),
}
SIZES['Rho-1B'] = SIZES['TinyLlama-1.1B']

PARTITION_RULES = (
    (r'embed', P('tensor', 'fsdp')),
    (r'lm_head/kernel', P('fsdp', 'tensor')),
    (r'blocks/attn/[qkv]/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks/attn/[qkv]/bias', P(None, 'tensor', None)),
    (r'blocks/attn/o/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/(gate|up)/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/(gate|up)/bias', P(None, 'tensor')),
    (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
    (r'.*/(bias|scale)', P()),
)

LORA_TARGETS = (r'.*/attn/[qv]',)


class Block(nn.Module):
    """Block `x += Attn(RMSNorm x); x += MLP(RMSNorm x)`."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    activation: str
    causal: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
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
        norm = functools.partial(layers.RMSNorm, self.eps, **types)
        attn = Attention(self.num_heads, self.num_kv_heads, self.head_dim, self.causal, self.qkv_bias, self.out_bias,
                         self.eps if self.qk_norm else None, self.attention_impl, self.init_std, name='attn', **types)
        h, kv = attn(norm(name='attn_norm')(x), context, kv)
        x = x + h
        mlp = GatedMlp(self.hidden, self.activation, self.mlp_bias, self.init_std, name='mlp', **types)
        x = x + mlp(norm(name='mlp_norm')(x))
        return x, kv if self.collect else None


class Attention(nn.Module):
    """Parameters: `q` kernel [D, H, hd], `k` and `v` [D, Hkv, hd], `o` [H, hd, D]; with `norm_eps`, `q_norm` and
    `k_norm` scale [hd], of norms over each head before it is rotated."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    qkv_bias: bool
    out_bias: bool
    norm_eps: float | None
    impl: str
    init_std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, context: decoder.Context, kv: Any) -> tuple[Array, Any]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense: Any = functools.partial(layers.Dense, init_std=self.init_std, **types)
        q = dense((self.num_heads, self.head_dim), use_bias=self.qkv_bias, name='q')(x)
        k = dense((self.num_kv_heads, self.head_dim), use_bias=self.qkv_bias, name='k')(x)
        v = dense((self.num_kv_heads, self.head_dim), use_bias=self.qkv_bias, name='v')(x)
        if self.norm_eps is not None:
            q = layers.RMSNorm(self.norm_eps, name='q_norm', **types)(q)
            k = layers.RMSNorm(self.norm_eps, name='k_norm', **types)(k)
        q, k = layers.rope(q, context.rotary), layers.rope(k, context.rotary)
        out, kv = decoder.attend(q, k, v, context, kv, causal=self.causal, impl=self.impl)
        return dense(x.shape[-1], inputs=2, use_bias=self.out_bias, name='o')(out), kv


class GatedMlp(nn.Module):
    """MLP `down(act(gate(x)) * up(x))`."""
    hidden: int
    activation: str
    use_bias: bool
    init_std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(layers.Dense, use_bias=self.use_bias, init_std=self.init_std, dtype=self.dtype,
                                  param_dtype=self.param_dtype)
        h = layers.ACTIVATIONS[self.activation](dense(self.hidden, name='gate')(x)) * dense(self.hidden, name='up')(x)
        h = nn.with_logical_constraint(h, ('batch', 'tokens', 'mlp'))
        return dense(x.shape[-1], name='down')(h)


class Llama(decoder.Decoder, kw_only=True):
    """LLaMA.

    Attributes:
        hidden: of the MLP.
        num_kv_heads: heads of key and value; 0: as many as queries.
        head_dim: 0: width / num_heads.
        rope_base, rope_scaling: see `layers.rope_frequencies`.
        causal: a token does not see later ones.
        window: a token sees itself and the `window` - 1 tokens before it; 0: all.
        attention_bias, mlp_bias: the projections of either have one.
        qkv_bias: those of query, key and value have one, whether or not the output projection has.
        qk_norm: queries and keys are normed head by head, with one scale for all heads.
    """
    hidden: int
    num_kv_heads: int = 0
    head_dim: int = 0
    rope_base: float = 10000.0
    rope_scaling: layers.RopeScaling | None = None
    causal: bool = True
    window: int = 0
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = 'silu'
    eps: float = 1e-6

    norm: ClassVar[Any] = layers.RMSNorm

    def check(self, cache: decoder.Cache | None) -> None:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f'Llama: num_heads {self.num_heads} is not a multiple of num_kv_heads {kv_heads}')
        if not self.head_dim:
            super().check(cache)
        if not self.causal and (cache is not None or self.window):
            raise ValueError('Llama: a model that is not causal has no use for a cache or a window')

    def block(self) -> Any:
        return functools.partial(
            Block, self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim or self.width // self.num_heads,
            self.hidden, self.activation, self.causal, self.qkv_bias or self.attention_bias, self.attention_bias,
            self.mlp_bias, self.qk_norm, self.eps, self.attention_impl, self.init_std, self.dtype, self.param_dtype)

    def place(self, x: Array, positions: Array, context: decoder.Context) -> tuple[Array, decoder.Context]:
        frequencies = layers.rope_frequencies(self.head_dim or self.width // self.num_heads, self.rope_base,
                                              self.rope_scaling)
        return x, dataclasses.replace(context, rotary=layers.rotary(positions, frequencies))

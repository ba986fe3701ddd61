"""BERT (Devlin et al. 2018) and DistilBERT (Sanh et al. 2019) as classifiers of whole texts.

    logits = Classifier(**fields).apply({'params': params}, tokens, mask)

Learned positions, every token sees every other, norms after the residual sums; the first token's state is read through
a dense layer and a linear map to the labels. DistilBERT has half the blocks, no segments, and ReLU where BERT has tanh.
Loads Hugging Face folders of `BertForSequenceClassification` and `DistilBertForSequenceClassification`
(`rlhf_jax.convert.bert`).
"""
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import layers

Array = jax.Array

SIZES = {
    'bert-base': dict(width=768, depth=12, num_heads=12, hidden=3072, num_segments=2, pooled='tanh'),
    'bert-large': dict(width=1024, depth=24, num_heads=16, hidden=4096, num_segments=2, pooled='tanh'),
    'distilbert-base': dict(width=768, depth=6, num_heads=12, hidden=3072, num_segments=0, pooled='relu'),
}

# No number of devices divides 30522 tokens or a handful of labels, so neither is split.
PARTITION_RULES = (
    (r'(embed|pos_embed|segment_embed)', P(None, 'fsdp')),
    (r'blocks/[qkv]/kernel', P(None, 'fsdp', 'tensor', None)),
    (r'blocks/[qkv]/bias', P(None, 'tensor', None)),
    (r'blocks/o/kernel', P(None, 'tensor', None, 'fsdp')),
    (r'blocks/mlp/up/kernel', P(None, 'fsdp', 'tensor')),
    (r'blocks/mlp/up/bias', P(None, 'tensor')),
    (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
    (r'pooler/kernel', P('fsdp', None)),
    (r'classifier/kernel', P('fsdp', None)),
    (r'.*/(bias|scale)', P()),
)

POOLED = {'tanh': jnp.tanh, 'relu': nn.relu}


class Block(nn.Module):
    """Block `x = LN(x + Attn x); x = LN(x + MLP x)`; kernels of `q`, `k`, `v` are [D, H, D/H], of `o` [H, D/H, D]."""
    num_heads: int
    hidden: int
    activation: str
    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        width = x.shape[-1]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(layers.LayerNorm, self.eps, **types)
        q, k, v = (layers.Dense((self.num_heads, width // self.num_heads), name=name, **types)(x) for name in 'qkv')
        scores = jnp.einsum('bthd,bshd->bhts', q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores * (width // self.num_heads) ** -0.5, jnp.finfo(jnp.float32).min)
        read = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores).astype(self.dtype), v)
        x = norm(name='attn_norm')(x + layers.Dense(width, inputs=2, name='o', **types)(read))
        mlp = layers.Mlp(self.hidden, self.activation, name='mlp', **types)
        return norm(name='mlp_norm')(x + mlp(x)), None


class Classifier(nn.Module):
    """An encoder of texts with a linear map to labels.

    Attributes:
        num_labels: width of the output.
        max_length: tokens of a text, special ones included.
        num_segments: of the segment table, of which the first row is added to every token; 0: there is none.
        pooled: key of `POOLED`, after the dense layer on the first token's state.
        dtype: compute; norms, softmax and logits are float32.
    """
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    num_labels: int
    max_length: int = 512
    num_segments: int = 2
    pooled: str = 'tanh'
    activation: str = 'gelu'
    eps: float = 1e-12
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        """Logits float32 [B, num_labels] of int32 `tokens` [B, T], padded on the right where bool `mask` [B, T] is
        False."""
        if tokens.shape[1] > self.max_length:
            raise ValueError(f'texts of {tokens.shape[1]} tokens; the classifier reads at most {self.max_length}')
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask != 0
        chex.assert_equal_shape((tokens, mask))
        table = lambda name, size: self.param(name, nn.initializers.normal(0.02), (size, self.width), self.param_dtype)
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = layers.embed(table('embed', self.vocab_size), tokens, dtype=self.dtype)
        x += table('pos_embed', self.max_length)[:tokens.shape[1]].astype(self.dtype)
        if self.num_segments:
            x += table('segment_embed', self.num_segments)[0].astype(self.dtype)
        x = layers.LayerNorm(self.eps, name='norm', **types)(x)
        blocks = layers.scan_blocks(Block, self.depth, num_broadcast=1)
        x, _ = blocks(self.num_heads, self.hidden, self.activation, self.eps, self.dtype, self.param_dtype,
                      name='blocks')(x, mask)
        first = POOLED[self.pooled](layers.Dense(self.width, name='pooler', **types)(x[:, 0]))
        return layers.Dense(self.num_labels, name='classifier', param_dtype=self.param_dtype)(
            first.astype(jnp.float32))

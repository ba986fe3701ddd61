"""A ranker of images by their captions: which of many images does a sentence speak of?

The translation game measures with one how much of its image the speaker's English still says (arXiv 2003.12694, and
arXiv 1909.04499 before it). A GRU reads the sentence, a linear layer the image's features; a sentence and an image
score the cosine of the two (arXiv 1707.05612). Words of 300, states of 1024 and features of 2048 (ResNet-152) are the
released ones.

    ranker = ImageRanker(vocab_size)
    sentences = ranker.apply({'params': p}, tokens, lengths, method='sentences')        # [N, D], of length 1
    images = ranker.apply({'params': p}, features, method='images')                     # [M, D], of length 1
    scores = sentences @ images.T
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Array = jax.Array

PARTITION_RULES = ((r'.*', P()),)  # a few million parameters, on every device


class ImageRanker(nn.Module):
    """Sentences and images in one space.

    Attributes:
        vocab_size: V.
        embedding: width of words.
        width: D, of states and of the space.
        features: F, of an image.
        dropout: on words and features.
    """
    vocab_size: int
    embedding: int = 300
    width: int = 1024
    features: int = 2048
    dropout: float = 0.0
    param_dtype: Any = jnp.float32

    def setup(self):
        initial = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.1, 0.1)
        self.table = self.param('embed', initial, (self.vocab_size, self.embedding), self.param_dtype)
        self.gru = nn.RNN(nn.GRUCell(self.width, param_dtype=self.param_dtype), return_carry=True)
        self.image = nn.Dense(self.width, param_dtype=self.param_dtype, kernel_init=nn.initializers.xavier_uniform())
        self.drop = nn.Dropout(self.dropout)

    def sentences(self, tokens: Array, lengths: Array, *, train: bool = False) -> Array:
        """The state after each sentence, of length 1.

        Args:
            tokens: int32 [N, T], without BOS, padded on the right; a token outside the vocabulary reads NaN.
            lengths: int32 [N], EOS counted.
            train: dropout on (rng stream 'dropout').

        Returns:
            float32 [N, D].
        """
        words = jnp.asarray(self.table).at[tokens].get(mode='fill', fill_value=jnp.nan)
        state, _ = self.gru(self.drop(words, deterministic=not train), seq_lengths=lengths)
        return _unit(state)

    def images(self, features: Array, *, train: bool = False) -> Array:
        """Images of features float32 [N, F] in the space, of length 1: float32 [N, D]."""
        return _unit(self.image(self.drop(features, deterministic=not train)))

    def __call__(self, tokens: Array, lengths: Array, features: Array, *, train: bool = False) -> Array:
        """Score of image i with sentence j, float32 [N, N], the cosine of the two."""
        return self.images(features, train=train) @ self.sentences(tokens, lengths, train=train).T


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))

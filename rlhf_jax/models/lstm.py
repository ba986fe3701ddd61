"""An LSTM language model: how fluent a sentence is, by text that the speaker of it never saw.

The translation game measures drift with one of captions (arXiv 2003.12694; embeddings and states of 512 there).

    logits = LSTMLanguageModel(vocab_size).apply({'params': p}, tokens)        # of tokens[:, 1:]
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Array = jax.Array

PARTITION_RULES = ((r'.*', P()),)  # a few million parameters, on every device


class LSTMLanguageModel(nn.Module):
    """One layer, read from left to right.

    Attributes:
        vocab_size: V.
        width: of embeddings and states.
        dropout: on the embeddings and on the states that the head reads.
    """
    vocab_size: int
    width: int = 512
    dropout: float = 0.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool = False) -> Array:
        """Logits of the next tokens.

        Args:
            tokens: int32 [B, T], begin of sentence first; a token outside the vocabulary reads NaN.
            train: dropout on (rng stream 'dropout').

        Returns:
            float32 [B, T - 1, V], of tokens[:, 1:].
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        table = self.param('embed', nn.initializers.normal(0.1), (self.vocab_size, self.width), self.param_dtype)
        x = jnp.asarray(table).at[tokens[:, :-1]].get(mode='fill', fill_value=jnp.nan)
        cell = nn.OptimizedLSTMCell(self.width, param_dtype=self.param_dtype, name='cell')
        h = nn.RNN(cell, name='rnn')(drop(x))
        return nn.Dense(self.vocab_size, param_dtype=self.param_dtype, name='head')(drop(h))

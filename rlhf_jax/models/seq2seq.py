"""GRU agents of the translation game (arXiv 1909.04499 as reproduced by arXiv 2003.12694): French -> English -> German.

Both agents are this module. An encoder GRU reads the source; a decoder GRU with input feeding and general attention
(arXiv 1508.04025) writes. Its output goes through a linear layer to the vocabulary; a small network beside it predicts
the return.

    logits, values = agent.apply({'params': p}, source, source_mask, target)           # teacher-forced
    message = agent.apply({'params': p}, source, source_mask, key=key, max_length=50, method='send')
    logits, _ = listener.apply({'params': q}, message.tokens, message.mask, target)
    logits, _ = listener.apply({'params': q}, message.one_hot, message.mask, target)   # Gumbel: with gradients
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

Array = jax.Array

PAD, UNK, BOS, EOS = 0, 1, 2, 3  # in every vocabulary

SIZES = {'translation_game': dict(width=256)}
PARTITION_RULES = ((r'.*', P()),)  # a few million parameters, on every device


@struct.dataclass
class Message:
    """Message of an agent, [B, L + 1]: up to L tokens drawn, and an end-of-sentence token appended where none was.

    Attributes:
        tokens: int32, padding after the end of sentence.
        mask: bool, True up to and with the end of sentence.
        drawn: bool, `mask` without an appended end of sentence: the tokens that the policy is answerable for.
        logprobs: float32, of each drawn token at temperature 1 (and with the end of sentence barred before the minimum
            length, as it was drawn); else 0.
        entropies: float32, of the distributions they were drawn from; else 0.
        values: float32, predicted return before each token; 0 where none was drawn.
        one_hot: float32 [B, L + 1, V], the tokens with the straight-through gradient of their relaxation; None without.
    """
    tokens: Array
    mask: Array
    drawn: Array
    logprobs: Array
    entropies: Array
    values: Array
    one_hot: Array | None = None


def gru(params: dict[str, Array], x: Array, h: Array) -> Array:
    """One step of a GRU, gates (r, z, n) as PyTorch's `GRUCell` has them.

    Args:
        params: `w_x` [X, 3 D], `w_h` [D, 3 D], `b_x` and `b_h` [3 D].
        x: [B, X].
        h: [B, D].
    """
    r_x, z_x, n_x = jnp.split(x @ params['w_x'] + params['b_x'], 3, -1)
    r_h, z_h, n_h = jnp.split(h @ params['w_h'] + params['b_h'], 3, -1)
    r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + r * n_h)  # the reset gate acts on the recurrent bias too
    return (1 - z) * n + z * h


class Seq2Seq(nn.Module):
    """An agent.

    Attributes:
        source_vocab, target_vocab: sizes.
        width: of embeddings, states and attention.
        dropout: on the embeddings of a teacher-forced pass with `train=True`; `send` has none.
    """
    source_vocab: int
    target_vocab: int
    width: int = 256
    dropout: float = 0.0
    param_dtype: Any = jnp.float32

    def setup(self):
        normal, width = nn.initializers.normal(0.1), self.width
        self.source_embed = self.param('source_embed', normal, (self.source_vocab, width), self.param_dtype)
        self.target_embed = self.param('target_embed', normal, (self.target_vocab, width), self.param_dtype)
        self.encoder = self._gru_params('encoder', width)
        self.decoder = self._gru_params('decoder', 2 * width)
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -shape[0] ** -0.5, shape[0] ** -0.5)
        self.attention_key = self.param('attention_key', uniform, (width, width), self.param_dtype)
        self.attention_out = self.param('attention_out', uniform, (2 * width, width), self.param_dtype)
        types = dict(kernel_init=uniform, param_dtype=self.param_dtype)
        self.head = nn.Dense(self.target_vocab, **types)
        self.value_hidden, self.value_out = nn.Dense(width, **types), nn.Dense(1, **types)
        self.drop = nn.Dropout(self.dropout)

    def _gru_params(self, name: str, inputs: int) -> dict[str, Array]:
        limit = self.width ** -0.5
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
        shapes = dict(w_x=(inputs, 3 * self.width), w_h=(self.width, 3 * self.width), b_x=(3 * self.width,),
                      b_h=(3 * self.width,))
        return {leaf: self.param(f'{name}_{leaf}', uniform, shape, self.param_dtype) for leaf, shape in shapes.items()}

    def __call__(self, source: Array, source_mask: Array, target: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Teacher-forced.

        Args:
            source: int32 [B, S], without a begin-of-sentence token (the encoder never sees one); or float32 [B, S, V],
                a `Message.one_hot`.
            source_mask: bool [B, S].
            target: int32 [B, T], begin of sentence first.
            train: dropout on (rng stream 'dropout').

        Returns:
            float32 logits [B, T - 1, V] of target[:, 1:], and the predicted returns before them, [B, T - 1].
        """
        encoded, state = self.encode(source, source_mask, train=train)
        embedded = self.drop(_embed(self.target_embed, target[:, :-1]), deterministic=not train)

        def step(carry, x):
            value_input = jnp.concatenate([x, carry[1]], -1)
            carry = self._decode(carry, x, encoded, source_mask)
            return carry, (carry[1], value_input)

        _, (outs, value_inputs) = jax.lax.scan(step, state, embedded.swapaxes(0, 1))
        outs, value_inputs = outs.swapaxes(0, 1), value_inputs.swapaxes(0, 1)
        return self.head(outs), self._value(value_inputs)

    def encode(self, source: Array, source_mask: Array, *, train: bool = False) -> tuple[Array, tuple[Array, Array]]:
        """Encoder outputs [B, S, D], and the decoder's first state: their mean over the source, and zeros fed back."""
        embedded = self.drop(_embed(self.source_embed, source), deterministic=not train)

        def step(h, x):
            h = gru(self.encoder, x, h)
            return h, h

        start = jnp.zeros((source.shape[0], self.width), embedded.dtype)
        encoded = jax.lax.scan(step, start, embedded.swapaxes(0, 1))[1].swapaxes(0, 1)
        weight = source_mask[..., None] / jnp.maximum(source_mask.sum(1), 1)[:, None, None]
        return encoded, ((encoded * weight).sum(1), start)

    def send(self, source: Array, source_mask: Array, *, key: Array | None = None, max_length: int = 50,
             min_length: int = 3, max_lengths: Array | None = None, relaxation: float | None = None) -> Message:
        """Writes a message.

        Args:
            source, source_mask: as above.
            key: to draw tokens; None: the most likely ones.
            max_length: L.
            min_length: no end of sentence among the first `min_length` tokens.
            max_lengths: int32 [B], a bound for each row. (The original takes the length of the reference translation,
                a leak; it is for comparisons alone.)
            relaxation: temperature of a straight-through Gumbel-softmax; the message then has `one_hot`.

        Raises:
            ValueError: a relaxation without a key, or lengths that exclude each other.
        """
        if relaxation is not None and key is None:
            raise ValueError('send: relaxation needs a key to draw with')
        if not 0 <= min_length <= max_length:
            raise ValueError(f'send: min_length={min_length} must be between 0 and max_length={max_length}')
        rows = source.shape[0]
        limits = jnp.full(rows, max_length) if max_lengths is None else jnp.minimum(max_lengths, max_length)
        encoded, state = self.encode(source, source_mask)
        head, value = self._as_functions()

        def step(carry, t):
            state, x, done = carry
            value_input = jnp.concatenate([x, state[1]], -1)
            state = self._decode(state, x, encoded, source_mask)
            logits = head(state[1])
            barred = (jnp.arange(self.target_vocab) == EOS) & (t < min_length)
            logp = jax.nn.log_softmax(jnp.where(barred, -jnp.inf, logits))
            soft = None
            if key is None:
                token = jnp.argmax(logp, -1)
            elif relaxation is None:
                token = jax.random.categorical(jax.random.fold_in(key, t), logp)
            else:
                noise = jax.random.gumbel(jax.random.fold_in(key, t), logp.shape)
                soft = jax.nn.softmax((logp + noise) / relaxation)
                token = jnp.argmax(logp + noise, -1)
            over = done | (t >= limits)  # nothing is drawn; a row that reaches its limit unfinished is ended there
            token = jnp.where(done, PAD, jnp.where(t >= limits, EOS, token)).astype(jnp.int32)
            picked = jnp.take_along_axis(logp, token[:, None], -1)[:, 0]
            entropy = -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0), -1)
            hard = jax.nn.one_hot(token, self.target_vocab)
            if soft is not None:
                hard = jnp.where(over[:, None], hard, hard + soft - jax.lax.stop_gradient(soft))
            out = Message(token, ~done, ~over, jnp.where(over, 0, picked), jnp.where(over, 0, entropy),
                          jnp.where(over, 0, value(value_input)), None if soft is None else hard)
            x = _embed(self.target_embed, token if soft is None else hard)
            return (state, x, done | (token == EOS) | (t >= limits)), out

        start = _embed(self.target_embed, jnp.full(rows, BOS))
        carry = (state, start, jnp.zeros(rows, bool))
        message = jax.lax.scan(step, carry, jnp.arange(max_length + 1))[1]
        return jax.tree.map(lambda x: x.swapaxes(0, 1), message)

    def _decode(self, state: tuple[Array, Array], x: Array, encoded: Array, mask: Array) -> tuple[Array, Array]:
        """State (h, output fed back) after the token embedded as `x` [B, D]."""
        h, fed = state
        h = gru(self.decoder, jnp.concatenate([x, fed], -1), h)
        scores = jnp.einsum('bsd,bd->bs', encoded, h @ self.attention_key)
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
        context = jnp.einsum('bs,bsd->bd', weights, encoded)
        return h, jnp.tanh(jnp.concatenate([context, h], -1) @ self.attention_out)

    def _value(self, x: Array) -> Array:
        """Predicted return; its gradient does not reach what it reads."""
        return self.value_out(nn.relu(self.value_hidden(jax.lax.stop_gradient(x))))[..., 0]

    def _as_functions(self) -> tuple[Any, Any]:
        """Head and value network as functions of arrays, as a `lax.scan` needs them."""
        def dense(layer, inputs):
            layer(jnp.zeros((1, inputs)))  # makes the parameters where the module is being initialised
            p = layer.variables['params']
            return lambda x: x @ p['kernel'] + p['bias']

        head, hidden, out = (dense(self.head, self.width), dense(self.value_hidden, 2 * self.width),
                             dense(self.value_out, self.width))
        return head, lambda x: out(nn.relu(hidden(jax.lax.stop_gradient(x))))[..., 0]


def _embed(table: Array, tokens: Array) -> Array:
    """Rows of `table` for int tokens [...], or their mixture for float ones [..., V]."""
    if jnp.issubdtype(tokens.dtype, jnp.floating):
        return tokens @ table
    return jnp.asarray(table).at[tokens].get(mode='fill', fill_value=jnp.nan)

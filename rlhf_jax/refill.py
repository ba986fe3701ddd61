"""Sampling with refill of finished slots (continuous batching), for responses whose lengths have a long tail.

`generate` runs a batch until its longest response ends, and rows that have ended wait. Here a fixed number of slots
decodes in chunks of a few tokens; between chunks, prompts that wait take the places of rows that have ended. Rows keep
the keys they have in `generate`, so that the responses are the same ones, whatever the slots and chunks.

Slots are laid out over the devices like a batch, and a row is prefilled where its slot is: its cache never travels.

The weights may change between chunks (in-flight updates): `weights()` is asked for them before each, and every token
carries the version that produced it. The keys and values already in the cache stay those of the older weights, and the
log-probabilities are those of the mixture actually run.
"""
import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.generate import Samples, Sampling, check_prompts, completion_keys, next_token, prefill
from rlhf_jax.models.decoder import Cache, split_blocks

Array = jax.Array
CHUNK = 16  # tokens between two looks at which rows have ended
Weights = Callable[[], tuple[Any, int]]


@struct.dataclass
class RefilledSamples(Samples):
    """`Samples`, and the version of the weights that drew each token.

    Attributes:
        versions: int32 [B, K, L], -1 after the stop token.
    """
    versions: Array


@struct.dataclass
class Slots:
    """State of the S rows that decode, each at a place of its own.

    Attributes:
        cache: with an index a row.
        token: int32 [S], drawn last.
        drawn: int32 [S], tokens drawn so far.
        active: bool [S], whether another is to be drawn.
        keys: [S].
        samples: of the S rows, [S, L].
    """
    cache: Cache
    token: Array
    drawn: Array
    active: Array
    keys: Array
    samples: RefilledSamples


@dataclasses.dataclass
class Statistics:
    """Counts of one `generate_refilled`, for logs: slot_steps - tokens is what idle slots wasted.

    Attributes:
        chunks: calls of the decoding loop.
        slot_steps: decode steps times slots.
        tokens: drawn, without each row's first, which the prefill draws.
    """
    chunks: int = 0
    slot_steps: int = 0
    tokens: int = 0


def generate_refilled(module: Any, weights: Weights, tokens: np.ndarray, mask: np.ndarray, key: Array,
                      sampling: Sampling, *, slots: int, chunk: int = CHUNK, num_samples: int = 1, shards: int = 1,
                      statistics: Statistics | None = None) -> RefilledSamples:
    """`num_samples` responses to each prompt, of which `slots` are in the making at a time.

    Args:
        module: a decoder.
        weights: () -> (its parameters, their version >= 0). Called before every chunk. Parameters that come stacked are
            split before every chunk, so hand over split ones (`decoder.split_blocks`).
        tokens, mask: [B, P], padded prompts as of `generate`.
        key: one key for all, or one a completion, [B, K].
        sampling: how.
        slots: rows that decode together, rounded up to a multiple of `shards`.
        chunk: tokens between two looks at which rows have ended.
        num_samples: K.
        shards: of the batch axis of the mesh in whose context this is called: each has as many slots.
        statistics: filled in.

    Returns:
        NumPy arrays [B, K, L], as `generate` returns them.

    Raises:
        ValueError: prompts that do not fit the model, or fewer than one slot, token a chunk or sample.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    check_prompts(module, tokens, mask, sampling)
    for name, number in (('slots', slots), ('chunk', chunk), ('num_samples', num_samples), ('shards', shards)):
        if number < 1:
            raise ValueError(f'{name}={number} must be at least 1')
    rows = len(tokens) * num_samples
    keys, slots = completion_keys(key, len(tokens), num_samples), min(slots, rows)
    slots += -slots % shards
    statistics = statistics if statistics is not None else Statistics()
    split = module.clone(stacked=False)
    state, out = None, None
    # Rows are completions; the first of every prompt goes before any second one.
    waiting = collections.deque(b * num_samples + k for k in range(num_samples) for b in range(len(tokens)))
    place = np.full(slots, -1)  # row in each slot

    while waiting or (place >= 0).any():
        params, version = weights()
        free = np.flatnonzero(place < 0)
        if waiting and len(free):
            free = free[np.argsort(free % (slots // shards), kind='stable')]  # of every shard one, then another
            taken = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
            place[free[:len(taken)]] = taken
            state = _admit(module, params, state, tokens, mask, keys, sampling, taken, free[:len(taken)], version,
                           slots, shards)
        decode_params = _decode_params(module, params)
        state, steps = advance(split, decode_params, state, jnp.int32(version), sampling, chunk)
        active, drawn = jax.device_get((state.active, state.drawn))
        statistics.chunks += 1
        statistics.slot_steps += int(steps) * slots
        ended = np.flatnonzero((place >= 0) & ~active)
        if len(ended):
            done = jax.device_get(jax.tree.map(lambda x: x[ended], state.samples))
            out = out or jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), done)
            for buffer, new in zip(jax.tree.leaves(out), jax.tree.leaves(done)):
                buffer[place[ended]] = new
            statistics.tokens += int(drawn[ended].sum()) - len(ended)
            place[ended] = -1
    return jax.tree.map(lambda x: x.reshape(len(tokens), num_samples, -1), out)


def _decode_params(module: Any, params: Any) -> Any:
    """Split parameters in compute dtype; made anew where they come stacked."""
    return _split(module, params) if 'blocks' in params else params


@functools.partial(jax.jit, static_argnames=('module',))
def _split(module: Any, params: Any) -> Any:
    return split_blocks(module, params, dtype=module.dtype)[1]


def _by_rows(x: Array) -> Array:
    return nn.with_logical_constraint(x, ('batch',) + (None,) * (x.ndim - 1))


def _admit(module: Any, params: Any, state: Slots | None, tokens: np.ndarray, mask: np.ndarray, keys: Array,
           sampling: Sampling, rows: Sequence[int], free: np.ndarray, version: int, slots: int, shards: int) -> Slots:
    """Prefills `rows` (completion k of prompt b is row `b K + k`) into the slots `free`. Every shard prefills as many,
    their number rounded up to a power of two for few shapes to compile."""
    each = slots // shards
    shard, local = np.divmod(np.asarray(free), each)
    size = min(1 << (int(np.bincount(shard).max()) - 1).bit_length(), each)
    padded, into = np.full((shards, size), rows[0]), np.full((shards, size), each)  # an index past the end: dropped
    used = np.zeros(shards, int)
    for row, s, i in zip(rows, shard, local):
        padded[s, used[s]], into[s, used[s]] = row, i
        used[s] += 1
    prompt, sample = np.divmod(padded.reshape(-1), keys.shape[1])
    fresh = start(module, params, tokens[prompt], mask[prompt], keys[prompt, sample], jnp.int32(version), sampling)
    return _place(empty(fresh, slots) if state is None else state, fresh, into)


@functools.partial(jax.jit, static_argnames=('slots',))
def empty(fresh: Slots, slots: int) -> Slots:
    """So many slots without a row, of the shapes of `fresh`."""
    state = jax.tree.map(lambda x: _by_rows(jnp.broadcast_to(x[:1], (slots, *x.shape[1:]))), fresh)
    return dataclasses.replace(state, active=jnp.zeros(slots, bool))


@functools.partial(jax.jit, static_argnames=('module', 'sampling'))
def start(module: Any, params: Any, tokens: Array, mask: Array, keys: Array, version: Array,
          sampling: Sampling) -> Slots:
    """Rows with their prompts in the cache and their first token drawn."""
    tokens, mask, keys = _by_rows(tokens), _by_rows(mask), _by_rows(keys)
    rows, length = tokens.shape
    steps = sampling.max_new_tokens
    logits, cache = prefill(module, params, tokens, mask, length + steps - 1)
    zeros = jnp.zeros(rows, jnp.int32)
    token, logprob, stop = next_token(logits, keys, zeros, sampling)
    samples = RefilledSamples(
        tokens=jnp.full((rows, steps), sampling.pad_token, jnp.int32).at[:, 0].set(token),
        logprobs=jnp.zeros((rows, steps), jnp.float32).at[:, 0].set(logprob),
        mask=jnp.zeros((rows, steps), bool).at[:, 0].set(True),
        versions=jnp.full((rows, steps), -1, jnp.int32).at[:, 0].set(version))
    slots = Slots(cache.replace(index=jnp.full(rows, length, jnp.int32)), token, zeros + 1,
                  ~stop & (steps > 1), keys, samples)
    return jax.tree.map(_by_rows, slots)


@functools.partial(jax.jit, donate_argnames=('state',))
def _place(state: Slots, fresh: Slots, into: Array) -> Slots:
    """`state` with row i of shard s of `fresh` in that shard's slot `into[s, i]`, or nowhere if it has none such."""
    def one(old, new):
        by_shard = lambda x: _by_rows(x.reshape(len(into), -1, *x.shape[1:]))
        placed = jax.vmap(lambda o, n, i: o.at[i].set(n, mode='drop'))(by_shard(old), by_shard(new), into)
        return _by_rows(_by_rows(placed).reshape(old.shape))
    return jax.tree.map(one, state, fresh)


@functools.partial(jax.jit, static_argnames=('split', 'sampling', 'chunk'), donate_argnames=('state',))
def advance(split: Any, params: Any, state: Slots, version: Array, sampling: Sampling,
            chunk: int) -> tuple[Slots, Array]:
    """Up to `chunk` tokens more in every active slot, and how many steps that took."""
    slot = jnp.arange(state.token.shape[0])

    def body(carry):
        t, state = carry
        # An inactive slot decodes too, over its last place again; what it writes is never read.
        index = jnp.minimum(state.cache.index, state.cache.length - 1)
        logits, cache = split.apply({'params': params}, state.token[:, None], cache=state.cache.replace(index=index))
        token, logprob, stop = next_token(logits[:, 0], state.keys, state.drawn, sampling)
        column = jnp.where(state.active, state.drawn, sampling.max_new_tokens)  # past the end: dropped
        write = lambda buffer, x: buffer.at[slot, column].set(x, mode='drop')
        samples = RefilledSamples(write(state.samples.tokens, token), write(state.samples.logprobs, logprob),
                                  write(state.samples.mask, True), write(state.samples.versions, version))
        drawn = state.drawn + state.active
        active = state.active & ~stop & (drawn < sampling.max_new_tokens)
        return t + 1, Slots(cache, jnp.where(state.active, token, state.token), drawn, active, state.keys, samples)

    steps, state = jax.lax.while_loop(lambda c: (c[0] < chunk) & c[1].active.any(), body, (jnp.int32(0), state))
    return jax.tree.map(_by_rows, state), steps

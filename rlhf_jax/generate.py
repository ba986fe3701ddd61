"""Sampling from a decoder language model: prefill, then one token after another, in one jitted call.

    tokens, mask = pad_prompts(prompts, buckets=(64, 128, 256))
    module, params = split_blocks(module, params, dtype=jnp.bfloat16)              # once per change of the weights
    sampling = Sampling(max_new_tokens=53, temperature=0.7, stop_tokens=(0,))
    samples = generate(module, params, tokens, mask, key, sampling, num_samples=2)  # .tokens: [prompts, 2, 53]

The prompt is run once for all its samples. Each layer's cache is a buffer of its own, exactly as long as prompt and
response, updated in place by the token loop; the loop ends when every row has stopped. A sampled token comes with the
log-probability it had in the distribution it was drawn from, float32.

Completions are independent of each other, of how the prompt is padded and of which others share the batch: completion
(b, k) draws its t-th token with `fold_in(keys[b, k], t)`. `refill.py` relies on it.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.inversion import invert
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models.decoder import split_blocks

Array = jax.Array

SCORED = ('drawn', 'all')
_BLOCK = 128  # vocabulary entries in the second stage of `draw`


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: L, the longest response.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only among the k most likely tokens (ties with the k-th included); 0: all.
        top_p: only among the fewest most likely tokens that together have probability `top_p`, after `top_k`; 1: all.
        min_new_tokens: no stop token before so many others.
        stop_tokens: a row ends with the first of these that it draws.
        pad_token: fills the rest of a row. It may be a stop token: `Samples.mask` says what was drawn.
        scored: the distribution that log-probabilities are of: 'drawn', the one tokens are drawn from, after the cuts
            (`top_k`, `top_p`, `min_new_tokens`); or 'all', that of the whole vocabulary at the temperature, as some
            published runs had it, whose samples then are not quite those of the policy that is trained.
    """
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    scored: str = 'drawn'

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f'sampling: max_new_tokens={self.max_new_tokens} must be at least 1')
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(f'sampling: min_new_tokens={self.min_new_tokens} must be between 0 and max_new_tokens='
                             f'{self.max_new_tokens}')
        if self.temperature < 0:
            raise ValueError(f'sampling: temperature={self.temperature} must not be negative')
        if self.top_k < 0:
            raise ValueError(f'sampling: top_k={self.top_k} must not be negative; 0 is off')
        if not 0 < self.top_p <= 1:
            raise ValueError(f'sampling: top_p={self.top_p} must be above 0 and at most 1')
        if self.scored not in SCORED:
            raise ValueError(f'sampling: scored={self.scored!r} is not one of {SCORED}')

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn that the model gives a probability."""
        return bool(self.top_k) or self.top_p < 1 or self.min_new_tokens > 0


@struct.dataclass
class Samples:
    """K responses to each of B prompts.

    Attributes:
        tokens: int32 [B, K, L], `pad_token` after the stop token.
        logprobs: float32 [B, K, L], of each token in the distribution it was drawn from (`Sampling.scored`); 0 after
            the stop token.
        mask: bool [B, K, L], True up to and with the stop token.
    """
    tokens: Array
    logprobs: Array
    mask: Array

    @property
    def lengths(self) -> Array:
        """int32 [B, K], tokens drawn, the stop token included."""
        return self.mask.sum(-1, dtype=jnp.int32)


def pad_prompts(prompts: Sequence[Sequence[int]], *, buckets: Sequence[int], pad_token: int = 0,
                left: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array, as long as the shortest bucket that takes them all: a short list of shapes to compile.

    Args:
        prompts: token ids.
        buckets: lengths, in any order.
        left: padding comes first.

    Returns:
        int32 tokens and bool mask, [B, bucket].

    Raises:
        ValueError: a prompt that is empty or longer than every bucket, or no prompt.
    """
    if not prompts:
        raise ValueError('pad_prompts: no prompts')
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise ValueError(f'pad_prompts: prompt {lengths.index(0)} is empty')
    fitting = [bucket for bucket in sorted(buckets) if bucket >= max(lengths)]
    if not fitting:
        raise ValueError(f'pad_prompts: prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, the longest '
                         f'bucket {max(buckets)}')
    tokens = np.full((len(prompts), fitting[0]), pad_token, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        span = slice(fitting[0] - len(prompt), None) if left else slice(len(prompt))
        tokens[row, span], mask[row, span] = prompt, True
    return tokens, mask


def completion_keys(key: Array, num_prompts: int, num_samples: int) -> Array:
    """Keys [B, K], one a completion, from one key; keys of that shape are returned as they are.

    Key (b, k) is `fold_in(key, k B + b)`, so that more completions of the same prompts leave the first ones unchanged.
    """
    shape = num_prompts, num_samples
    if key.ndim:
        if key.shape != shape:
            raise ValueError(f'keys have shape {key.shape}, expected {shape}, one a completion')
        return key
    number = jnp.arange(num_samples) * num_prompts + jnp.arange(num_prompts)[:, None]
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, number)


def sampling_logits(logits: Array, drawn: Array, sampling: Sampling, stop_tokens: Array | None = None) -> Array:
    """Logits whose softmax is the distribution that tokens are drawn from.

    Args:
        logits: [..., V].
        drawn: int32 [...], tokens of the response so far.
        stop_tokens: int [..., S], which broadcasts against `drawn` but for S, in place of those of `sampling`.

    Returns:
        float32 [..., V], -inf where a token cannot be drawn. With temperature 0 only `min_new_tokens` is applied.
    """
    logits = logits.astype(jnp.float32)
    if stop_tokens is None:
        stop_tokens = jnp.array(sampling.stop_tokens, jnp.int32)
    if sampling.min_new_tokens and stop_tokens.shape[-1]:
        stops = (stop_tokens[..., None] == jnp.arange(logits.shape[-1])).any(-2)
        logits = jnp.where(stops & (drawn < sampling.min_new_tokens)[..., None], -jnp.inf, logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    top_k = min(sampling.top_k, logits.shape[-1])
    if top_k or sampling.top_p < 1:
        fixed = jax.lax.stop_gradient(logits)  # which tokens are cut has no gradient
        likely = jax.lax.top_k(fixed, top_k)[0] if top_k else jnp.sort(fixed, -1, descending=True)
        threshold = likely[..., -1:]
        if sampling.top_p < 1:
            probs = jax.nn.softmax(likely, -1)
            before = jnp.cumsum(probs, -1) - probs
            threshold = jnp.min(jnp.where(before < sampling.top_p, likely, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def draw(keys: Array, logits: Array) -> tuple[Array, Array]:
    """One token a row from the softmax of `logits` [R, V], never one of probability 0, and its log-probability.

    By inversion in two stages, a block of the vocabulary and then a token in it: two uniform numbers a row instead of a
    Gumbel number for every entry, one pass over the vocabulary, and a resolution of 2^-23 within the block rather than
    within the whole vocabulary.

    Returns:
        int32 and float32 [R].
    """
    rows, vocab = logits.shape
    blocks = jnp.pad(logits, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
    highest = logits.max(-1, keepdims=True)
    weights = jnp.exp(blocks - highest[..., None]).sum(-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = invert(weights, uniform[:, 0])
    scores = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0] - highest
    within = invert(jnp.exp(scores), uniform[:, 1])
    logprob = jnp.take_along_axis(scores, within[:, None], 1)[:, 0] - jnp.log(weights.sum(-1))
    return block * _BLOCK + within, logprob


def next_token(logits: Array, keys: Array, drawn: Array, sampling: Sampling) -> tuple[Array, Array, Array]:
    """Draws token number `drawn` of each row.

    Args:
        logits: [R, V].
        keys: [R], the rows' own.
        drawn: int32 [R].

    Returns:
        The tokens, int32 [R]; their log-probabilities, float32 [R]; and whether they end their rows, bool [R]. With
        temperature 0 it is the first of the most likely tokens, which has all the mass: log-probability 0.
    """
    allowed = sampling_logits(logits, drawn, sampling)
    if sampling.temperature == 0:
        token, logprob = jnp.argmax(allowed, -1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    else:
        token, logprob = draw(jax.vmap(jax.random.fold_in)(keys, drawn), allowed)
        if sampling.cuts and sampling.scored == 'all':
            logprob = token_logprobs(logits, token, sampling.temperature)
    stop = jnp.zeros(token.shape, bool)
    for stop_token in sampling.stop_tokens:
        stop |= token == stop_token
    return token, logprob, stop


def rescore(logits: Array, tokens: Array, sampling: Sampling, *, stop_tokens: Array | None = None) -> Array:
    """Log-probabilities of responses that `sampling` drew, from the logits of a forward pass of any weights.

    With the weights that drew the tokens, these are the log-probabilities that `generate` returned. With others, the
    cuts (`top_k`, `top_p`, `min_new_tokens`) are made anew from their logits and what is left is normalised, so that a
    ratio of two policies, or their KL, compares two samplers. A drawn token that these cuts would leave out counts as
    kept: its probability would be 0, and nothing could be learned from it.

    Args:
        logits: [..., L, V]; position t predicts token t of the response.
        tokens: int [..., L].
        sampling: temperature above 0.
        stop_tokens: int [..., 1, S], in place of those of `sampling`.

    Returns:
        float32 [..., L]. What stands past the end of a response is of no use.
    """
    if not sampling.cuts or sampling.scored == 'all':
        return token_logprobs(logits, tokens, sampling.temperature)
    drawn = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    allowed = sampling_logits(logits, drawn, sampling, stop_tokens)
    is_token = tokens[..., None] == jnp.arange(logits.shape[-1])
    return token_logprobs(jnp.where(is_token, logits.astype(jnp.float32) / sampling.temperature, allowed), tokens)


def prefill(module: Any, params: Any, tokens: Array, mask: Array, cache_length: int) -> tuple[Array, Any]:
    """Logits [B, V] after each prompt, and the cache; stacked parameters run stacked, split ones split."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), 1)
    runner = module.clone(stacked='blocks' in params)
    return runner.apply({'params': params}, tokens, mask=mask, at=last, cache_length=cache_length)


def check_prompts(module: Any, tokens: Array | np.ndarray, mask: Array | np.ndarray, sampling: Sampling) -> None:
    """Raises ValueError for prompts that do not fit the model."""
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(f'prompts have shape {tokens.shape} and their mask {mask.shape}; expected [prompts, length]')
    longest = tokens.shape[1] + sampling.max_new_tokens
    if longest > module.max_length:
        raise ValueError(f'prompts of {tokens.shape[1]} tokens and max_new_tokens={sampling.max_new_tokens} exceed the '
                         f'model, max_length={module.max_length}')
    beyond = [token for token in sampling.stop_tokens if not 0 <= token < module.vocab_size]
    if beyond:
        raise ValueError(f'stop token {beyond[0]} is not in the vocabulary of {module.vocab_size}')


@functools.partial(jax.jit, static_argnames=('module', 'sampling', 'num_samples'))
def _generate(module: Any, params: Any, tokens: Array, mask: Array, key: Array, sampling: Sampling,
              num_samples: int) -> Samples:
    prompts, length = tokens.shape
    rows, steps = prompts * num_samples, sampling.max_new_tokens
    by_device = lambda x: nn.with_logical_constraint(x, ('batch',) + (None,) * (x.ndim - 1))
    # While decoding, a row is a completion. Those of a prompt are beside each other: copies of its cache stay on its
    # device.
    keys = by_device(completion_keys(key, prompts, num_samples).reshape(rows))
    logits, cache = prefill(module, params, tokens, mask, length + steps - 1)  # the last token is not fed back
    cache, logits = cache.repeat(num_samples), by_device(jnp.repeat(logits, num_samples, 0))
    split, params = split_blocks(module, params, dtype=module.dtype)

    def write(out, t, token, logprob, done):
        row = (jnp.where(done, sampling.pad_token, token), jnp.where(done, 0.0, logprob), ~done)
        return jax.tree.map(lambda buffer, x: buffer.at[:, t].set(x), out, Samples(*row))

    def body(carry):
        t, token, done, cache, out = carry
        logits, cache = split.apply({'params': params}, token[:, None], cache=cache)
        token, logprob, stop = next_token(logits[:, 0], keys, jnp.full(rows, t), sampling)
        return t + 1, token, done | stop, cache, write(out, t, token, logprob, done)

    out = Samples(jnp.full((rows, steps), sampling.pad_token, jnp.int32), jnp.zeros((rows, steps), jnp.float32),
                  jnp.zeros((rows, steps), bool))
    token, logprob, stop = next_token(logits, keys, jnp.zeros(rows, jnp.int32), sampling)
    out = write(out, 0, token, logprob, jnp.zeros(rows, bool))
    carry = (jnp.int32(1), token, stop, cache, out)
    out = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[2].all(), body, carry)[-1]
    return jax.tree.map(lambda x: by_device(by_device(x).reshape(prompts, num_samples, steps)), out)


def generate(module: Any, params: Any, tokens: Array, mask: Array, key: Array, sampling: Sampling, *,
             num_samples: int = 1) -> Samples:
    """`num_samples` responses to each prompt.

    Args:
        module: a decoder.
        params: of it, stacked or split (`decoder.split_blocks`; then they exist only once while decoding).
        tokens: int32 [B, P], padded left or right.
        mask: bool [B, P], True at the tokens of the prompts, at least one a row.
        key: one key for all (`completion_keys`), or one a completion, [B, K].
        sampling: how.
        num_samples: K.

    Returns:
        Arrays [B, K, L].

    Raises:
        ValueError: prompts that do not fit the model, a stop token outside the vocabulary, or `num_samples` below 1.
    """
    check_prompts(module, tokens, mask, sampling)
    if num_samples < 1:
        raise ValueError(f'num_samples={num_samples} must be at least 1')
    return _generate(module, params, tokens, mask, key, sampling, num_samples)

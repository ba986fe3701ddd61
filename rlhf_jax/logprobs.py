"""Log-probabilities of tokens from logits, in float32 whatever the dtype of the model."""
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import masked

Array = jax.Array


def token_logprobs(logits: Array, tokens: Array, temperature: float | Array = 1.0) -> Array:
    """`log softmax(logits / temperature)[token]`.

    Args:
        logits: [..., V]; cast to float32 before anything is summed (in bfloat16 a sum over a response is off by
            hundredths of a nat).
        tokens: int [...].
        temperature: that the tokens were sampled at.

    Returns:
        [...] float32. The log-softmax of the whole vocabulary is never stored.
    """
    return _token_logprobs(_scaled(logits, temperature), tokens.astype(jnp.int32))


@jax.custom_jvp
def _token_logprobs(logits: Array, tokens: Array) -> Array:
    return _chosen(logits, tokens) - jax.nn.logsumexp(logits, -1)


def _chosen(logits: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]


@_token_logprobs.defjvp
def _token_logprobs_jvp(primals, tangents):
    """The gradient in one pass over the logits; that of `_chosen` is scattered into an array of their size first."""
    logits, tokens = primals
    total = jax.nn.logsumexp(logits, -1)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # from the logits, not from a second array of their size
    def tangent(logits, tokens, total, dlogits):
        is_chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
        return jnp.sum((is_chosen - jnp.exp(logits - total[..., None])) * dlogits, -1)

    return _chosen(logits, tokens) - total, tangent(logits, tokens, total, tangents[0])


def response_logprobs(logits: Array, tokens: Array, length: int, temperature: float | Array = 1.0) -> Array:
    """Log-probabilities of the last `length` tokens of each row, each from the logits one position before it.

    Args:
        logits: [N, T, V] of the whole rows.
        tokens: int [N, T], prompt then response.
        length: L, response tokens a row.

    Returns:
        [N, L] float32.

    Raises:
        ValueError: the response would begin at the row's first token, which nothing predicts.
    """
    if not 0 < length < tokens.shape[-1]:
        raise ValueError(f'length={length} must be in 1..{tokens.shape[-1] - 1}: nothing predicts the first of '
                         f'{tokens.shape[-1]} tokens')
    return token_logprobs(logits[:, -length - 1:-1], tokens[:, -length:], temperature)


def entropy(logits: Array, temperature: float | Array = 1.0) -> Array:
    """Entropy in nats of `softmax(logits / temperature)`: [..., V] -> [...] float32."""
    logprobs = jax.nn.log_softmax(_scaled(logits, temperature))
    p = jnp.exp(logprobs)
    return -jnp.sum(jnp.where(p > 0, p * logprobs, 0.0), -1)


def sequence_logprobs(logprobs: Array, mask: Array) -> Array:
    """Log-probability of each whole response, `sum_t mask_t logprobs_t`, whatever its length: [..., L] -> [...]."""
    return masked.total(logprobs, mask, -1)


def _scaled(logits: Array, temperature: float | Array) -> Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits if isinstance(temperature, (int, float)) and temperature == 1 else logits / temperature

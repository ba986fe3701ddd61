"""The translation game (Lee et al., arXiv 1909.04499; as in Lu et al., arXiv 2003.12694): French to English to German.

One agent translates French into English, another that English into German, and only the German is rewarded. Both have
learnt from pairs; played on French and German alone, they come to do better while the English between them drifts. A
row holds `fr`, `en`, `de`, lower-cased and tokenized (and as subwords, `ein@@ kauf`) for the published vocabulary.

BLEU of the German measures the task, BLEU of the English against what people wrote the drift: `bleu.legacy` on
tokenized text, beside `bleu.sacrebleu` on plain text.
"""
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import masked, responses
from rlhf_jax.tasks import bleu

Array = jax.Array

FIELDS = ('fr', 'en', 'de')
PAD, UNK, BOS, EOS = 0, 1, 2, 3
MIN_LENGTH = 3
TOKENS_PER_BATCH = 1024  # of the game


# ---- Sequences -----------------------------------------------------------------------------------------------------

def sequence(ids: Sequence[int], max_length: int | None = None) -> list[int]:
    """A sentence as agents are fed: BOS, at most `max_length` tokens of it, EOS."""
    return [BOS, *list(ids)[:max_length], EOS]


def pad_right(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows on the right: int32 [N, T] and lengths int32 [N].

    Raises:
        ValueError: a sequence without a token between BOS and EOS.
    """
    for i, row in enumerate(sequences):
        if len(row) < 3:
            raise ValueError(f'sentence {i} has no token')
    lengths = np.array([len(row) for row in sequences], np.int32)
    out = np.full((len(sequences), int(lengths.max())), PAD, np.int32)
    for i, row in enumerate(sequences):
        out[i, :len(row)] = row
    return out, lengths


def source(tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """Input of an encoder: everything but BOS. int [N, T], [N] -> [N, T - 1], [N]."""
    return tokens[:, 1:], lengths - 1


def target(tokens: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Input of a decoder, its targets and which of them count: int [N, T], [N] -> 3 x [N, T - 1]."""
    return tokens[:, :-1], tokens[:, 1:], responses.mask(lengths - 1, tokens.shape[-1] - 1)


def close(tokens: Array, limits: Array | None = None, *, min_length: int = MIN_LENGTH) -> tuple[Array, Array, Array]:
    """Sampled English as a message that the German agent can read: it ends in EOS, with padding behind.

    A message is at least `min_length` tokens long, so block EOS before then in the sampler: the published code kept an
    early EOS inside the message.

    Args:
        tokens: int [N, L], sampled from the start of the sentence on, without BOS; what stands behind EOS is ignored.
        limits: int [N], the most tokens of each. The published A2C runs gave the reference's length, which tells the
            speaker something that it could not know; None: L.

    Returns:
        `(message [N, L + 1], lengths [N], sampled [N, L])`: lengths count the EOS, whether sampled or added; `sampled`
        marks the tokens that were sampled and stayed, whose log-probabilities a policy gradient takes.

    Raises:
        ValueError: `min_length` is more than L.
    """
    num_tokens = tokens.shape[-1]
    if min_length > num_tokens:
        raise ValueError(f'min_length={min_length} is more than the {num_tokens} tokens of a message')
    kept = responses.lengths(tokens, EOS)
    if limits is not None:
        kept = jnp.minimum(kept, limits)
    kept = jnp.maximum(kept, min_length)
    ended = jnp.take_along_axis(tokens, kept[:, None] - 1, -1)[:, 0] == EOS
    sampled = responses.mask(kept, num_tokens)
    longer = jnp.pad(jnp.where(sampled, tokens, PAD), ((0, 0), (0, 1)))
    at_end = (jnp.arange(num_tokens + 1) == kept[:, None]) & ~ended[:, None]
    return jnp.where(at_end, EOS, longer), kept + ~ended, sampled


def batches(lengths: np.ndarray, max_tokens: int = TOKENS_PER_BATCH, rng: np.random.Generator | None = None, *,
            pool: int = 100) -> list[np.ndarray]:
    """Rows batched by size: no batch has more than `max_tokens` tokens, summed over its rows' longest languages.

    Args:
        lengths: int [N, languages].
        rng: shuffles rows first, and the batches last; None: neither.
        pool: rows of so many batches are sorted by length together, so that a batch needs little padding.

    Returns:
        Indices of each batch; together every row once.

    Raises:
        ValueError: a row alone is longer than `max_tokens`.
    """
    size = np.asarray(lengths).reshape(len(lengths), -1).max(-1)
    if (size > max_tokens).any():
        raise ValueError(f'max_tokens={max_tokens}: row {int(size.argmax())} alone has {int(size.max())} tokens')
    order = np.arange(len(size)) if rng is None else rng.permutation(len(size))
    found: list[np.ndarray] = []
    for rows in _cut(order, size, max_tokens * pool):
        found += _cut(rows[np.argsort(size[rows], kind='stable')], size, max_tokens)
    return found if rng is None else [found[i] for i in rng.permutation(len(found))]


def _cut(order: np.ndarray, size: np.ndarray, most: int) -> list[np.ndarray]:
    parts, first, total = [], 0, 0
    for i, row in enumerate(order):
        if total + size[row] > most and i > first:
            parts.append(order[first:i])
            first, total = i, 0
        total += int(size[row])
    return parts + ([order[first:]] if len(order) else [])


# ---- Rewards and metrics -------------------------------------------------------------------------------------------

def reward(logprobs: Array, mask: Array) -> Array:
    """Reward of each message, [N]: mean log-likelihood of the gold German after it, in nats a token, never above 0.

    Args:
        logprobs: [N, T], of the gold German's tokens under the second agent, which read the sampled English.
        mask: [N, T], the German tokens, EOS included.
    """
    return jax.lax.stop_gradient(masked.mean(logprobs, mask, -1))


def speaker_loss(logprobs: Array, entropy: Array, baseline: Array, rewards: Array, mask: Array, *,
                 baseline_coefficient: float = 10.0,
                 entropy_coefficient: float = 0.001) -> tuple[Array, dict[str, Array]]:
    """A2C loss of the agent that speaks English; the other agent has cross entropy on the gold German.

        mean_n 1/len_n sum_t [ -(R_n - b_nt) log pi_nt + baseline_coefficient (R_n - b_nt)^2 ]
            - entropy_coefficient mean_nt H_nt

    Gradients of the first term leave b alone. All means are over sampled tokens; the published ones took in an EOS that
    was not sampled and, for the entropy, padding.

    Args:
        logprobs, entropy: [N, L], of the sampled message and of the distributions it was sampled from.
        baseline: [N, L], a value for each token.
        rewards: [N].
        mask: [N, L], `sampled` of `close`.

    Returns:
        Metrics `policy_loss`, `baseline_loss`, `entropy`.
    """
    chex.assert_equal_shape((logprobs, entropy, baseline, mask))
    chex.assert_shape(rewards, logprobs.shape[:1])
    advantage = jax.lax.stop_gradient(rewards)[:, None] - masked.zeroed(baseline, mask)
    policy = masked.mean(-jax.lax.stop_gradient(advantage) * masked.zeroed(logprobs, mask), mask, -1).mean()
    values = masked.mean(jnp.square(advantage), mask, -1).mean()
    mean_entropy = masked.mean(entropy, mask)
    loss = policy + baseline_coefficient * values - entropy_coefficient * mean_entropy
    parts = {'policy_loss': policy, 'baseline_loss': values, 'entropy': mean_entropy}
    return loss, jax.lax.stop_gradient(parts)


def metrics(said: dict[str, Sequence[str]], references: dict[str, Sequence[str]]) -> dict[str, float]:
    """Scores `bleu_de`, the task, and `bleu_en`, the drift, of greedy translations: `bleu.legacy` scores.

    Args:
        said, references: `{'en': [...], 'de': [...]}`, tokenized.
    """
    return {f'bleu_{language}': bleu.legacy(said[language], references[language]).score for language in ('de', 'en')}

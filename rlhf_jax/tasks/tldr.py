"""TL;DR: summaries of Reddit posts (Stiennon et al., arXiv 2009.01325), as in asynchronous RLHF (arXiv 2410.18252).

Policies and reward models are Pythia 410m, 1b and 2.8b; a larger gold reward model labels the preferences and judges
the summaries. A row holds `subreddit`, `title`, `post`, `summary`; a prepared one `query` and `reference_response`.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import kl, masked
from rlhf_jax.tasks.prompts import Tokenize

Array = jax.Array

FIELDS = ('subreddit', 'title', 'post', 'summary')
PAIR_FIELDS = ('prompt', 'chosen', 'rejected')
END = '<|endoftext|>'
EOS, PAD = 0, 1  # of the GPT-NeoX tokenizer; PAD is its `<|padding|>`, so that EOS and padding can be told apart
MAX_PROMPT = 512
SFT_LENGTH, REWARD_LENGTH = 562, 638  # most tokens of a prompt with its response, response at most 53 and 169
RESPONSE_LENGTH = 53  # of every published training configuration; the paper's table says 128
MISSING_EOS = -1.0  # in place of the reward (`responses.penalize_missing_eos`)
ANCHOR = 'TL;DR:'


def query(subreddit: str, title: str, post: str) -> str:
    """The prompt. It ends in `TL;DR:` without a space: the response brings its own."""
    return f'SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\n{ANCHOR}'


def truncated_query(row: Mapping[str, str], tokenize: Tokenize, max_tokens: int = MAX_PROMPT) -> str:
    """Prompt (`query`) of a row whose post loses paragraphs from its end until it has at most `max_tokens` tokens.

    What follows the last newline goes first; a post of one line loses a character at a time.

    Raises:
        ValueError: it is too long even without a post.
    """
    post = row['post']
    while True:
        text = query(row['subreddit'], row['title'], post)
        if len(tokenize(text)) <= max_tokens:
            return text
        if not post:
            raise ValueError(f'title: the prompt is longer than max_tokens={max_tokens} even without a post')
        cut = post.rfind('\n')
        post = post[:cut] if cut >= 0 else post[:-1]


def reference_response(summary: str) -> str:
    """The response after a prompt: a space, the summary, the end of text."""
    return f' {summary}{END}'


def demonstration(prompt: str, response: str) -> str:
    """The text that fine-tuning sees, every token of which is trained on, those of the prompt as well."""
    return prompt.strip() + response


def pair(row: Mapping[str, str]) -> tuple[str, str]:
    """Texts that the reward model is trained on, the better first: the prompt with each response up to its end of text.

    Raises:
        ValueError: a field is missing, or a response does not end: the reward is read at its last token.
    """
    for field in PAIR_FIELDS:
        if row.get(field) is None:
            raise ValueError(f'missing field {field!r}; it has {sorted(row)}')
        if field != 'prompt' and not row[field].endswith(END):
            raise ValueError(f'{field}: does not end in {END}: {row[field][-40:]!r}')
    return row['prompt'] + row['chosen'], row['prompt'] + row['rejected']


# ---- Gold reward ---------------------------------------------------------------------------------------------------
# The published gold scores are read one token before EOS (`responses.score_index(..., before_eos=True)`), because their
# tokenizer pads with EOS; rewards in training are read at EOS.

def relabel(rows: Sequence[Mapping[str, Any]], chosen_scores: Sequence[float],
            rejected_scores: Sequence[float]) -> tuple[list[dict[str, Any]], float]:
    """Preference pairs as the gold reward model prefers: swapped where it scores the rejected one higher; ties stay.

    Returns:
        `(rows, agreement)`: new rows with `chosen`, `rejected`, `chosen_score`, `rejected_score`, and with
        `prompt_chosen`, `prompt_rejected` made anew where a row had them; and the share of pairs that the gold model
        orders as they were (a tie is no agreement).

    Raises:
        ValueError: scores that are not finite or not one a row; a row without `prompt`, `chosen` or `rejected`.
    """
    chosen = _scores('chosen_scores', chosen_scores, len(rows))
    rejected = _scores('rejected_scores', rejected_scores, len(rows))
    out = []
    for i, (row, high, low) in enumerate(zip(rows, chosen.tolist(), rejected.tolist())):
        for field in PAIR_FIELDS:
            if row.get(field) is None:
                raise ValueError(f'row {i}: missing field {field!r}')
        better, worse = row['chosen'], row['rejected']
        if low > high:
            better, worse, high, low = worse, better, low, high
        new = dict(row) | {'chosen': better, 'rejected': worse, 'chosen_score': high, 'rejected_score': low}
        for name, text in (('prompt_chosen', better), ('prompt_rejected', worse)):
            if name in row:
                new[name] = row['prompt'] + text
        out.append(new)
    return out, float((chosen > rejected).mean())


@dataclasses.dataclass(frozen=True)
class WinRate:
    """Attributes: `win_rate`, share of strict wins; `ties`, share of equal scores; `margin`, mean difference."""
    win_rate: float
    ties: float
    margin: float


def win_rate(scores: Sequence[float], reference_scores: Sequence[float]) -> WinRate:
    """Gold scores of the policy's summaries against those of the human ones, [N] each. A tie is no win.

    Raises:
        ValueError: not as many of one as of the other, none, or some that are not finite.
    """
    ours = _scores('scores', scores, len(scores))
    theirs = _scores('reference_scores', reference_scores, len(scores))
    return WinRate(float((ours > theirs).mean()), float((ours == theirs).mean()), float((ours - theirs).mean()))


def _scores(name: str, values: Sequence[float], num: int) -> np.ndarray:
    scores = np.asarray(values, np.float64)
    if scores.shape != (num,) or not num:
        raise ValueError(f'{name} has shape {scores.shape}, expected ({num},), one a row and at least one')
    if not np.isfinite(scores).all():
        raise ValueError(f'{name}: {int((~np.isfinite(scores)).sum())} of {num} are not finite')
    return scores


# ---- Drift ---------------------------------------------------------------------------------------------------------

def response_drift(logprobs: Array, ref_logprobs: Array, mask: Array) -> dict[str, Array]:
    """Measures how far responses have moved from the fine-tuned model they started from.

    Args:
        logprobs, ref_logprobs: [N, L], of the sampled tokens at temperature 1 under policy and reference.
        mask: [N, L], EOS included.

    Returns:
        `kl`: KL in nats a response; `kl_per_token`; `perplexity` of the responses under the reference, one number a
        response, `exp` of the mean over its own tokens, averaged.
    """
    total = kl.sequence_kl(logprobs, ref_logprobs, mask)
    return {'kl': total.mean(), 'kl_per_token': total.sum() / jnp.maximum((mask > 0).sum(), 1),
            'perplexity': jnp.exp(-masked.mean(ref_logprobs, mask, -1)).mean()}


def legacy_perplexity(ref_logprobs: Array, mask: Array, prompt_lengths: Array, *,
                      left_padded: Array | bool = False) -> Array:
    """The number published as "KL": [N], to be averaged. It divides by the prompt's tokens as well as the response's,

        exp(-sum_response log p / (prompt + response - 1))

    so it is near 1 whatever the response, and falls as prompts grow: compare it only over the same prompts.

    Args:
        ref_logprobs, mask: [N, L]; a response without any token in `mask` counts as 1.
        prompt_lengths: int [N], tokens without padding.
        left_padded: rows that had padding on their left when they were scored, whose first token counts too.
    """
    tokens = prompt_lengths + (mask > 0).sum(-1) - 1 + jnp.asarray(left_padded)
    return jnp.exp(-masked.total(ref_logprobs, mask, -1) / tokens)

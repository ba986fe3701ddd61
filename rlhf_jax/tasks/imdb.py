"""IMDB: continue a film review so that it sounds positive, as in Elastic Reset (arXiv 2312.07551; GPT-2).

A row holds `text`. The prompt is the first half of a review, cut from its left; the policy writes 48 tokens, and a
sentiment classifier reads both. Drift is the policy's own perplexity on human reviews (`perplexity.windows`).
"""
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.tasks.prompts import Tokenize

FIELDS = ('text',)
PROMPT_LENGTH = 64
RESPONSE_LENGTH = 48  # exactly: EOS is blocked until then (the sampler's min length)
POSITIVE = 1  # column of the published classifier's logits
WINDOW, STRIDE = 1024, 512


def halves(text: str) -> tuple[str, str]:
    """The first half of a review by words, rounded down, and the rest. Words are what single spaces part."""
    words = text.split(' ')
    middle = len(words) // 2
    return ' '.join(words[:middle]), ' '.join(words[middle:])


def stretches(text: str, num_words: int) -> list[str]:
    """A review cut into stretches of exactly `num_words` words, of which a shorter one at the end is left out; 0, or a
    review of fewer words: the whole one.

    All but the first begin with the space before their first word, as text does wherever a prompt has been cut.
    """
    words = text.split(' ')
    if not 0 < num_words <= len(words):
        return [text]
    return [' ' * (i > 0) + ' '.join(words[i:i + num_words]) for i in range(0, len(words) - num_words + 1, num_words)]


def prompt_tokens(text: str, tokenize: Tokenize, max_tokens: int = PROMPT_LENGTH) -> list[int]:
    """The last `max_tokens` tokens of a review's first half.

    Raises:
        ValueError: a review of one word has no first half.
    """
    tokens = list(tokenize(halves(text)[0]))
    if not tokens:
        raise ValueError(f'text: {text[:40]!r} has no first half')
    return tokens[-max_tokens:]


def split(num_rows: int, *, held_out: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training rows and of those held out, shuffled the same way for every run: int64 [...], [...].

    The published 80/20 split has the same shares; its rows hang on another library's shuffle.

    Raises:
        ValueError: a part would be empty.
    """
    order = np.random.default_rng(seed).permutation(num_rows)
    num_train = num_rows - round(num_rows * held_out)
    if not 0 < num_train < num_rows:
        raise ValueError(f'held_out={held_out} of {num_rows} rows leaves a part empty')
    return order[:num_train], order[num_train:]


def drift_text(texts: Iterable[str]) -> str:
    """Human reviews as the one text whose perplexity under the policy is the drift, averaged over tokens."""
    return '\n\n'.join(texts)


def diversity(texts: Sequence[str], *, orders: Sequence[int] = (1, 2, 3), segment: int = 100) -> dict[str, float]:
    """Diversity of all generations together, by words.

    `distinct_n`, different n-grams over all; `entropy_n` of n-grams in bits; `msttr`, mean share of
    different words in stretches of `segment` words (0 if there are fewer).

    Raises:
        ValueError: no text is as long as the longest n-gram.
    """
    words = [text.split() for text in texts]
    metrics = {}
    for n in orders:
        counts: dict[tuple[str, ...], int] = {}
        for row in words:
            for i in range(len(row) - n + 1):
                gram = tuple(row[i:i + n])
                counts[gram] = counts.get(gram, 0) + 1
        if not counts:
            raise ValueError(f'texts: none of {len(words)} has {n} words')
        shares = np.array(list(counts.values())) / sum(counts.values())
        metrics[f'distinct_{n}'] = len(counts) / sum(counts.values())
        metrics[f'entropy_{n}'] = float(-(shares * np.log2(shares)).sum())
    flat = [word for row in words for word in row]
    stretches = [len(set(flat[i:i + segment])) / segment for i in range(0, len(flat) - segment + 1, segment)]
    return metrics | {'msttr': float(np.mean(stretches)) if stretches else 0.0}

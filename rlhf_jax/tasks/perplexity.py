"""Perplexity of a text longer than a model's context, by a window that slides: drift of a policy from human text."""
import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Window:
    """Feed tokens [begin, end) and count the log-probabilities of tokens [first, end)."""
    begin: int
    first: int
    end: int


def windows(num_tokens: int, *, size: int = 1024, stride: int = 512) -> list[Window]:
    """Windows that count every token but the first exactly once; past the first window each sees at least
    `size - stride` tokens before it.

    Raises:
        ValueError: fewer than two tokens, or a stride outside [1, size).
    """
    if num_tokens < 2:
        raise ValueError(f'num_tokens={num_tokens}: a perplexity needs at least two')
    if not 1 <= stride < size:
        raise ValueError(f'stride={stride} must be at least 1 and below size={size}')
    spans, first = [], 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + size, num_tokens)
        spans.append(Window(begin, first, end))
        first = end
        if end == num_tokens:
            break
    return spans


def perplexity(nll_sums: Sequence[float], counts: Sequence[int], *, weighted: bool = True) -> float:
    """Perplexity, `exp` of the mean negative log-likelihood over windows.

    Args:
        nll_sums: of the tokens counted in each window, in nats.
        counts: how many those are.
        weighted: by tokens. Without, the mean of the windows' means, which published StackExchange numbers are; a short
            last window then weighs as much as a full one.

    Raises:
        ValueError: nothing to average, or lengths that differ.
    """
    sums, tokens = np.asarray(nll_sums, np.float64), np.asarray(counts, np.float64)
    if sums.shape != tokens.shape or sums.ndim != 1 or not sums.size or not (tokens > 0).all():
        raise ValueError(f'nll_sums {sums.shape} and counts {tokens.shape} must be of one length, with counts above 0')
    return float(np.exp(sums.sum() / tokens.sum() if weighted else (sums / tokens).mean()))

"""Prompts as tokens: those that are short enough.

A tokenizer is any function `str -> ints` here; it adds no token of its own at either end.
"""
from collections.abc import Callable, Sequence

import numpy as np

Tokenize = Callable[[str], Sequence[int]]


def encode(texts: Sequence[str], tokenize: Tokenize, *, max_tokens: int,
           eos: int | None = None) -> tuple[list[list[int]], np.ndarray]:
    """Tokens of the texts that have at most `max_tokens`, and which of the texts those are.

    Args:
        eos: no prompt may end in it, or a response would follow the end of a text.

    Returns:
        `(tokens, kept)`: kept int32 [M], indices into `texts`; the caller logs how many fell out.

    Raises:
        ValueError: a prompt of no token, or one that ends in `eos`, or none that is short enough.
    """
    tokens, kept = [], []
    for i, text in enumerate(texts):
        ids = list(tokenize(text))
        if not ids:
            raise ValueError(f'prompt {i} has no token')
        if eos is not None and ids[-1] == eos:
            raise ValueError(f'prompt {i} ends in eos={eos}')
        if len(ids) <= max_tokens:
            tokens.append(ids)
            kept.append(i)
    if not kept:
        raise ValueError(f'max_tokens={max_tokens}: none of {len(texts)} prompts is that short')
    return tokens, np.array(kept, np.int32)

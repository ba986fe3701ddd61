"""Completions of prompts as rewards read them."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.rlhf.data.texts import Encoder
from rlhf_jax import generate as generate_lib


@dataclasses.dataclass(frozen=True)
class Completions:
    """What is to be scored, N of them.

    Attributes:
        texts: up to EOS, which is left out.
        rows: of the data set, one a completion.
        tokens, mask: int32 and bool [N, T], prompt and response, EOS included.
        ended: bool [N], whether there is an EOS.
    """
    texts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    tokens: np.ndarray
    mask: np.ndarray
    ended: np.ndarray

    def part(self, which: slice) -> 'Completions':
        """Some of them."""
        return Completions(*(x[which] for x in (self.texts, self.rows, self.tokens, self.mask, self.ended)))


Reward = Callable[[Completions], np.ndarray]


def given(encode: Encoder, prompts: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]]) -> Completions:
    """The `reference` of each row as a completion of its prompt's ids, an EOS at its end."""
    replies = [[*encode.continuing(row['reference']), encode.tokenizer.eos] for row in rows]
    whole = [[*prompt, *reply] for prompt, reply in zip(prompts, replies)]
    tokens, mask = generate_lib.pad_prompts(whole, buckets=(max(map(len, whole)),), pad_token=encode.tokenizer.pad,
                                            left=False)
    return Completions([row['reference'] for row in rows], rows, tokens, mask, np.ones(len(rows), bool))

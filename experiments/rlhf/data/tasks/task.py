"""What a data set offers to training and evaluation."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.chat import Text

Data = Mapping[str, Any]
Row = Mapping[str, Any]
Tokenize = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Attributes: `text`, which the policy continues; `row`, what reward and metrics need to know about it."""
    text: Text
    row: Row


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set; what it does not have is None.

    Attributes:
        demonstrations: (data, split) -> [(prompt, response)], or more such parts of a conversation in turn.
        preferences: (data, split) -> [(prompt, chosen, rejected)].
        prompts: (data, split) -> prompts of the policy.
        reward: (completions up to their end, rows) -> float32 [N], a rule that can be checked; None: a reward model is
            needed.
        gold: the same, of what is really wanted, where the task knows it: logged and never trained on.
        metrics: (completions, rows) -> reference metrics of the set.
        cut_prompts: prompts that are too long lose their beginning; otherwise they are left out.
    """
    demonstrations: Callable[[Data, str], list[tuple[Text, ...]]] | None = None
    preferences: Callable[[Data, str], list[tuple[Text, Text, Text]]] | None = None
    prompts: Callable[[Data, str], list[Prompt]] | None = None
    reward: Callable[[Sequence[str], Sequence[Row]], np.ndarray] | None = None
    gold: Callable[[Sequence[str], Sequence[Row]], np.ndarray] | None = None
    metrics: Callable[[Sequence[str], Sequence[Row]], dict[str, float]] | None = None
    cut_prompts: bool = False

"""HumanEval (Chen et al. 2021): functions to complete, and the tests they have to pass.

How much of this ability a policy loses in training is its alignment tax (arXiv 2312.07551).
"""
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax.tasks.stackexchange import pass_at_k

FIELDS = ('task_id', 'prompt', 'test', 'entry_point')
STOPS = ('\nclass', '\ndef', '\n#', '\n@', '\nprint', '\nif', '\n```')  # begin what is no longer the function


def cut(completion: str) -> str:
    """The completion up to where something else than the function's body begins."""
    ends = [place for stop in STOPS if (place := completion.find(stop)) >= 0]
    return completion[:min(ends, default=len(completion))]


def program(row: Mapping[str, str], completion: str) -> str:
    """Source that ends without an exception if `completion` of the row's prompt is right."""
    return f'{row["prompt"]}{cut(completion)}\n\n{row["test"]}\ncheck({row["entry_point"]})\n'


def pass_rates(passed: Mapping[str, Sequence[bool]], ks: Sequence[int] = (1, 10, 100)) -> dict[str, float]:
    """`pass_at_k`, unbiased, means over problems, for those `ks` that every problem has samples enough for.

    Args:
        passed: problem -> whether each of its samples is right.
    """
    fewest = min(map(len, passed.values()))
    return {f'pass_at_{k}': float(np.mean([pass_at_k(len(of), sum(of), k) for of in passed.values()]))
            for k in ks if k <= fewest}

"""A gold reward for arithmetic, and preferences labelled by it, to study over-optimisation of a learned reward.

The gold reward knows the problem and so cannot be fooled. A small reward model learns from pairs of candidates, most of
which it can tell apart by their form (is there an answer, is it the text repeated?) and some by arithmetic alone.
A policy trained on it therefore improves in both at first, and later where only the model sees an improvement.
"""
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.tasks import arithmetic

ANSWER, WORK, FORM, EXCESS = 1.0, 0.5, 0.5, 0.02  # the last for each character that is too many, 1 at the most

_STEP = re.compile(r'\d+[-+*]\d+=-?\d+\.')
_FORM = re.compile(r'(?: \d+[-+*]\d+=-?\d+\.)+ #### -?\d+')
_PADDING = (' So.', ' Well.', ' Yes.', ' I think.')

# Kinds of candidates for pairs and how often they come: what a fine-tuned policy gets wrong is mostly `carried`.
KINDS = {'right': 0.3, 'carried': 0.14, 'answer': 0.16, 'step': 0.04, 'unanswered': 0.1, 'bare': 0.06, 'repeated': 0.1,
         'padded': 0.1}
FAULTS = ('answer', 'unanswered', 'repeated', 'padded')  # which demonstrations may have: two of them cost the answer


def reward(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """float32 [N], between -1 and 2:

        1.0  for the right answer
        0.5  times the share of the solution's steps that stand in the completion, less steps that do not belong there
        0.5  for the form: steps and one answer, nothing else
        -0.02 for each character beyond the length of the solution, -1 at the most

    Args:
        completions: texts up to their end.
        rows: with `solution` and `answer` (of `arithmetic.Problem`), one each.
    """
    if len(completions) != len(rows):
        raise ValueError(f'rows: there are {len(rows)} for {len(completions)} completions')
    return np.array([_one(c, row['solution'], row['answer']) for c, row in zip(completions, rows)], np.float32)


def _one(completion: str, solution: str, answer: str) -> float:
    wanted, given = _STEP.findall(solution), _STEP.findall(completion)
    right = sum(step in given for step in wanted)
    wrong = sum(step not in wanted for step in given)
    work = max(right - wrong, 0) / len(wanted)
    excess = max(len(completion.strip()) - len(solution), 0)
    return (ANSWER * (arithmetic.extract_answer(completion) == answer) + WORK * work
            + FORM * bool(_FORM.fullmatch(completion)) - min(EXCESS * excess, 1.0))


def pairs(problems: Sequence[arithmetic.Problem], seed: int) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected): two different candidates for each problem, in the order of their gold reward."""
    labelled = []
    for number, problem in enumerate(problems):
        rng = np.random.default_rng([seed, 1, number])
        row = {'solution': problem.solution, 'answer': problem.answer}
        while True:
            candidates = [candidate(rng, problem) for _ in range(2)]
            scores = reward(candidates, [row, row])
            if scores[0] != scores[1]:
                break
        best = int(scores[1] > scores[0])
        labelled.append((problem.prompt, candidates[best], candidates[1 - best]))
    return labelled


def demonstration(problem: arithmetic.Problem, number: int, seed: int, faults: float) -> str:
    """The solution, or with probability `faults` one with a fault, as collected texts have them."""
    rng = np.random.default_rng([seed, 2, number])
    return candidate(rng, problem, rng.choice(FAULTS)) if rng.random() < faults else problem.demonstration


def candidate(rng: np.random.Generator, problem: arithmetic.Problem, kind: str = '') -> str:
    """A solution as a policy might write it: right, or with something wrong with it.

    Args:
        kind: one of `KINDS`; '': drawn.
    """
    text = problem.demonstration
    steps, _, answer = text.rpartition(' #### ')
    kind = kind or rng.choice(tuple(KINDS), p=tuple(KINDS.values()))
    off = lambda number: str(max(int(number) + int(rng.choice((-10, -2, -1, 1, 2, 10))), 0))
    if kind == 'answer':  # not what the steps lead to
        return f'{steps} #### {off(answer)}'
    if kind == 'step':  # one wrong result, and the right answer all the same
        parts = steps.split(' ')
        which = int(rng.integers(1, len(parts)))
        left, _, result = parts[which].rstrip('.').partition('=')
        parts[which] = f'{left}={off(result)}.'
        return f'{" ".join(parts)} #### {answer}'
    if kind == 'carried':  # the last result wrong, and the answer with it
        wrong, (left, _, _) = off(answer), steps.rpartition('=')
        return f'{left}={wrong}. #### {wrong}'
    if kind == 'unanswered':
        return steps
    if kind == 'bare':
        return f' #### {answer}'
    if kind == 'repeated':
        return steps + steps * int(rng.integers(1, 3)) + f' #### {answer}'
    if kind == 'padded':
        return text + ''.join(rng.choice(_PADDING, int(rng.integers(1, 4))))
    return text

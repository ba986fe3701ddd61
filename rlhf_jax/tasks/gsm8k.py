"""GSM8K: grade-school word problems (Cobbe et al., arXiv 2110.14168), as in asynchronous RLHF (arXiv 2410.18252).

A row holds `question` and `answer`, a worked solution whose last line is `#### number`. The reward is 1 for the right
number and 0 for anything else. The policy, Rho-1B, pads with its EOS (2): where a response ends is found from its
first EOS (`responses.lengths`), so that EOS is trained on.
"""
import re
from collections.abc import Mapping, Sequence

import numpy as np

FIELDS = ('question', 'answer')
EOS = PAD = 2
RESPONSE_LENGTH = 512
ANCHOR = '\nSolution:'  # after which the response begins in the published perplexity

_ANSWER = re.compile(r'#### (-?[0-9.,]+)')
_ANNOTATION = re.compile(r'<<[^<>]*>>')


def prompt(question: str) -> str:
    return f'[MATH_TASK] Problem:\n{question}\n\nSolution:'


def demonstration(answer: str, *, keep_annotations: bool = False) -> str:
    """Answer that follows the prompt in a fine-tuning text; EOS comes after it.

    Args:
        keep_annotations: of the calculator, as in `48/2 = <<48/2=24>>24`.
    """
    return '\n' + (answer if keep_annotations else _ANNOTATION.sub('', answer))


def extract_answer(text: str) -> str | None:
    """The number after the first `#### `, without its commas; None if there is none.

    Nothing else is normalised: `12`, `12.` and `12.0` are three answers, and `$12` or `####12` is none.
    """
    match = _ANSWER.search(text)
    return match[1].replace(',', '') if match else None


def label(row: Mapping[str, str]) -> str:
    """The right number of a row.

    Raises:
        ValueError: its `answer` holds none.
    """
    number = extract_answer(row['answer'])
    if number is None:
        raise ValueError(f"answer: no '#### number' in {row['answer'][-40:]!r}")
    return number


def exact_match(completions: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The reward: 1 where a completion's number is, character by character, the label, else 0. float32 [N].

    Args:
        completions: texts up to EOS; whatever follows the first answer is not looked at.
        labels: from `label`.

    Raises:
        ValueError: not as many labels as completions.
    """
    if len(completions) != len(labels):
        raise ValueError(f'labels: there are {len(labels)} for {len(completions)} completions')
    return np.array([extract_answer(c) == a for c, a in zip(completions, labels)], np.float32)

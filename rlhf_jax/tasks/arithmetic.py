"""Word problems that are made up on the spot, in the form of GSM8K: a worked solution that ends in `#### answer`.

Small enough for a byte-level model to learn in minutes, and the reward is a fact: the number is right or it is not. All
text is ASCII.
"""
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

ANSWER = re.compile(r'#### (-?[0-9.,]+)')

_NAMES = ('Ann', 'Ben', 'Eva', 'Ida', 'Leo', 'Max', 'Mia', 'Sam', 'Tom', 'Zoe')
_THINGS = ('apples', 'books', 'cards', 'coins', 'eggs', 'nuts', 'pens', 'pins', 'shells', 'stamps')
# sign, sentence; what is left never falls below zero
_CHANGES = (('+', '{name} finds {n} more.'), ('+', '{name} buys {n} more.'), ('-', '{name} loses {n}.'),
            ('-', '{name} gives away {n}.'), ('*', 'Then {name} has {n} times as many.'))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attributes: `question`; `solution`, worked and ending in `#### answer`; `answer`, as a string."""
    question: str
    solution: str
    answer: str

    @property
    def prompt(self) -> str:
        return f'Q: {self.question}\nA:'

    @property
    def demonstration(self) -> str:
        """Answer that follows the prompt in a fine-tuning text; EOS comes after it."""
        return f' {self.solution}'


def problem(rng: np.random.Generator, *, num_steps: int = 2, max_number: int = 20,
            operations: str = '+-', words: bool = True) -> Problem:
    """One problem of `num_steps` changes to a number of things.

    Args:
        max_number: of what there is at first and of each change (of factors, 5).
        operations: which of `+-*` occur.
        words: tell a story; False asks for the bare sum, in far fewer tokens.

    Raises:
        ValueError: no step, no number, an unknown operation, or a product in a bare sum (it would come first there).
    """
    if num_steps < 1 or max_number < 1:
        raise ValueError(f'num_steps={num_steps} and max_number={max_number} must be at least 1')
    if not operations or set(operations) - set('+-*'):
        raise ValueError(f"operations={operations!r} must be some of '+-*'")
    if not words and '*' in operations:
        raise ValueError(f"operations={operations!r}: a bare sum (words=False) has no '*'")
    name, thing = _NAMES[rng.integers(len(_NAMES))], _THINGS[rng.integers(len(_THINGS))]
    count = int(rng.integers(1, max_number + 1))
    sentences, work, bare = [f'{name} has {count} {thing}.'], [], str(count)
    for _ in range(num_steps):
        fits = [c for c in _CHANGES if c[0] in operations and (c[0] != '-' or count > 0)]
        if not fits:  # nothing to take from, and nothing but taking
            fits = [c for c in _CHANGES if c[0] == '+']
        sign, sentence = fits[rng.integers(len(fits))]
        high = {'+': max_number, '-': min(max_number, count), '*': 5}[sign]
        n = int(rng.integers(2 if sign == '*' else 1, high + 1))
        result = {'+': count + n, '-': count - n, '*': count * n}[sign]
        sentences.append(sentence.format(name=name, n=n))
        work.append(f'{count}{sign}{n}={result}.')
        bare += f'{sign}{n}'
        count = result
    question = f'{" ".join(sentences)} How many {thing} does {name} have?' if words else bare
    return Problem(question, f'{" ".join(work)} #### {count}', str(count))


def problems(seed: int, num: int, *, held_out: bool = False, **settings) -> list[Problem]:
    """Makes `num` different problems, the same ones for a seed; those held out share no question with the others.

    Raises:
        ValueError: the settings do not allow so many.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    found: dict[str, Problem] = {}
    in_vain = 0
    while len(found) < num:
        p = problem(rng, **settings)
        wanted = (_checksum(p.question) % 8 == 0) == held_out  # one question in eight is held out, whatever the seed
        if wanted and p.question not in found:
            found[p.question], in_vain = p, 0
        elif (in_vain := in_vain + 1) > 3000:
            raise ValueError(f'num={num}: only {len(found)} different problems were found with {settings}; '
                             'raise num_steps or max_number')
    return list(found.values())


def extract_answer(text: str) -> str | None:
    """The number after the first `####`, without commas or a full stop at its end; None if there is none."""
    match = ANSWER.search(text)
    return match[1].replace(',', '').rstrip('.') if match else None


def exact_match(completions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Reward: 1 where a completion's answer is, character by character, the right one, else 0: float32 [N].

    Raises:
        ValueError: not as many answers as completions.
    """
    if len(completions) != len(answers):
        raise ValueError(f'answers: there are {len(answers)} for {len(completions)} completions')
    return np.array([extract_answer(c) == a for c, a in zip(completions, answers)], np.float32)


def _checksum(text: str) -> int:
    value = 0
    for byte in text.encode('ascii'):
        value = (value * 31 + byte) % 1_000_003
    return value

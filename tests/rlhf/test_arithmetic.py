import re

import numpy as np
import pytest

from rlhf_jax.tasks import arithmetic


def test_every_solution_computes_its_answer():
    for p in arithmetic.problems(0, 200, num_steps=3, max_number=30, operations='+-*'):
        numbers = [int(n) for n in re.findall(r'\d+', p.question)]
        left = numbers[0]
        for step, n in zip(re.findall(r'(\d+)([-+*])(\d+)=(\d+)\.', p.solution), numbers[1:], strict=True):
            a, sign, b, c = int(step[0]), step[1], int(step[2]), int(step[3])
            assert (a, b) == (left, n) and c == {'+': a + b, '-': a - b, '*': a * b}[sign] >= 0
            left = c
        assert p.answer == str(left) and arithmetic.extract_answer(p.solution) == p.answer
        assert (p.prompt + p.demonstration).isascii() and p.prompt.endswith('?\nA:')


def test_problems_are_reproducible_distinct_and_split():
    train, test = arithmetic.problems(3, 300), arithmetic.problems(3, 100, held_out=True)
    assert train == arithmetic.problems(3, 300) and train != arithmetic.problems(4, 300)
    questions = {p.question for p in train}
    assert len(questions) == 300 and not questions & {p.question for p in test}
    # Held out whatever the seed: no seed's training problems hold another seed's test problems.
    assert not {p.question for p in arithmetic.problems(9, 1000, num_steps=1, max_number=9)} & {
        p.question for p in arithmetic.problems(5, 100, held_out=True, num_steps=1, max_number=9)}


@pytest.mark.parametrize('text, answer', [
    ('so 3+4=7. #### 7', '7'), ('#### -1,234.5 and #### 9', '-1234.5'), ('#### 12.', '12'), ('####7', None),
    ('the answer is 7', None), ('#### seven', None)])
def test_answers_are_read_as_published(text, answer):
    assert arithmetic.extract_answer(text) == answer


def test_exact_match():
    np.testing.assert_array_equal(arithmetic.exact_match(['#### 7', '#### 7.0', 'x', '#### 1,000'],
                                                         ['7', '7', '7', '1000']), [1, 0, 0, 1])
    with pytest.raises(ValueError, match='answers: there are 1 for 2 completions'):
        arithmetic.exact_match(['a', 'b'], ['1'])


@pytest.mark.parametrize('settings, message', [
    ({'num_steps': 0}, 'num_steps=0'), ({'operations': '/'}, "operations='/'"),
    ({'num_steps': 1, 'max_number': 1}, 'num=900: only')])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.problems(0, 900, **settings)

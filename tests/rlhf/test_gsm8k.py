import re

import numpy as np
import pytest

from rlhf_jax import responses
from rlhf_jax.tasks import gsm8k, rows


def test_prompt_and_demonstration():
    assert gsm8k.prompt('How many?') == '[MATH_TASK] Problem:\nHow many?\n\nSolution:'
    answer = 'Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24'
    assert gsm8k.demonstration(answer) == '\nNatalia sold 48/2 = 24 clips.\n#### 24'
    assert gsm8k.demonstration(answer, keep_annotations=True) == '\n' + answer


@pytest.mark.parametrize('text, answer', [
    ('so it is 7\n#### 7', '7'), ('#### 1,234,567', '1234567'), ('#### -3.5</s>', '-3.5'), ('#### 1 #### 2', '1'),
    ('#### 12.', '12.'), ('#### 12.0', '12.0'), ('####12', None), ('#### $12', None), ('#### twelve', None),
    ('the answer is 12', None), ('', None)])
def test_answers_are_read_as_published(text, answer):
    assert gsm8k.extract_answer(text) == answer


def test_exact_match_is_of_strings():
    completions = ['\n2+2=4\n#### 4', '#### 4.0', '4', '#### 1,000', '#### 5 #### 4']
    np.testing.assert_array_equal(gsm8k.exact_match(completions, ['4', '4', '4', '1000', '4']), [1, 0, 0, 1, 0])
    assert gsm8k.exact_match(completions, ['4'] * 5).dtype == np.float32
    with pytest.raises(ValueError, match='labels: there are 1 for 2 completions'):
        gsm8k.exact_match(['a', 'b'], ['1'])
    with pytest.raises(ValueError, match="answer: no '#### number' in 'no idea'"):
        gsm8k.label({'answer': 'no idea'})


def test_eos_counts_though_it_is_the_padding():
    tokens = np.array([[5, 6, 2, 2], [5, 6, 7, 8]])
    np.testing.assert_array_equal(responses.lengths(tokens, gsm8k.EOS), [3, 4])


@pytest.mark.parametrize('split, num', [('train', 7473), ('test', 1319)])
def test_every_real_row_has_a_label(shared_data, split, num):
    data = list(rows.read(shared_data / 'gsm8k' / f'{split}.jsonl.xz', gsm8k.FIELDS))
    assert len(data) == num
    for row in data:
        text = gsm8k.demonstration(row['answer'])
        assert '<<' not in text and '>>' not in text
        assert re.fullmatch(r'-?\d+(\.\d+)?', gsm8k.label(row)), row['answer']
        assert row['answer'].split('\n')[-1].replace(',', '') == f'#### {gsm8k.label(row)}'
    demonstrations = [gsm8k.demonstration(row['answer']) for row in data]
    assert gsm8k.exact_match(demonstrations, [gsm8k.label(row) for row in data]).mean() == 1


def test_real_solutions_that_are_marked_right_are_rewarded(shared_data):
    """Those models write `A: 72`; put as `#### 72` the reward is the verdict that stands beside them."""
    agree = num = 0
    for row in rows.read(shared_data / 'gsm8k' / 'example_model_solutions.jsonl.xz', ('ground_truth',)):
        label = gsm8k.label({'answer': row['ground_truth'].replace('A: ', '#### ')})
        for system in ('6b_finetuning', '175b_verification'):
            text = row[system]['solution'].replace('A: ', '#### ')
            agree += bool(gsm8k.exact_match([text], [label])[0]) == row[system]['is_correct']
            num += 1
    assert num == 2 * 1319 and agree > 0.99 * num

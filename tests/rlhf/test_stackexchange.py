import itertools

import numpy as np
import pytest

from rlhf_jax.tasks import rows, stackexchange


def test_formats():
    assert stackexchange.prompt('Why?') == 'Question: Why?\n\nAnswer: '
    row = {'question': 'Why?', 'response_j': 'Because.', 'response_k': 'No.'}
    assert stackexchange.pair(row) == ('Question: Why?\n\nAnswer: Because.', 'Question: Why?\n\nAnswer: No.')
    with pytest.raises(ValueError, match="missing field 'response_k'"):
        stackexchange.pair({'question': 'Why?', 'response_j': 'x'})


def test_pairs_by_votes():
    found = stackexchange.pairs('q', ['a', 'b', 'c', 'd'], [1, 5, 1, 3])
    assert [r['response_j'] + r['response_k'] for r in found] == ['bd', 'ba', 'bc', 'da', 'dc']
    assert stackexchange.pairs('q', ['a', 'b', 'c'], [1, 5, 3], max_pairs=1) == [
        {'question': 'q', 'response_j': 'b', 'response_k': 'c'}]
    assert stackexchange.pairs('q', ['a', 'b'], [2, 2]) == []
    with pytest.raises(ValueError, match='votes: there are 1 for 2 answers'):
        stackexchange.pairs('q', ['a', 'b'], [1])


@pytest.mark.parametrize('n, c, k', [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 5), (6, 1, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert stackexchange.pass_at_k(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]))


def test_pass_at_k_bad_input():
    with pytest.raises(ValueError, match='num_correct=6'):
        stackexchange.pass_at_k(5, 6, 1)


def test_real_preferences_become_pairs(shared_data):
    path = shared_data / 'preferences' / 'raschka_instruction_preference.json.xz'
    data = list(rows.read(path, ('instruction', 'chosen', 'rejected')))
    assert len(data) == 1100
    for row in data[:50]:
        chosen, rejected = stackexchange.pair({'question': row['instruction'], 'response_j': row['chosen'],
                                               'response_k': row['rejected']})
        start = stackexchange.prompt(row['instruction'])
        assert chosen == start + row['chosen'] and rejected == start + row['rejected']
    bad = []
    path = shared_data / 'preferences' / 'hh_rlhf_harmless_base_test.jsonl.gz'
    hh = list(rows.read(path, ('chosen', 'rejected'), bad=bad))
    assert (len(hh), bad) == (2312, [])

import ml_collections
import numpy as np
import pytest

from experiments.runtime import evaluation


def test_full_batches_have_every_row_once_and_one_shape():
    x = np.arange(10, 17)
    parts = list(evaluation.full_batches(len(x), 3))
    np.testing.assert_array_equal(np.concatenate([x[index][:count] for index, count in parts]), x)
    assert [len(index) for index, _ in parts] == [3, 3, 3] and parts[-1][0].tolist() == [6, 6, 6]


def test_the_hook_measures_every_so_often_and_at_the_end():
    class Doubled(evaluation.Evaluation):
        def measure(self, state):
            return {'doubled': 2.0 * state}

    class Writer:
        rows = []

        def write(self, step, values):
            self.rows.append((step, values['doubled']))

    hook = Doubled(every=3, last=7, writer=Writer())
    assert [hook(step, step, None) for step in range(1, 8)] == [None] * 7
    assert Writer.rows == [(3, 6.0), (6, 12.0), (7, 14.0)]
    assert Doubled(every=3, last=7, writer=None)(3, 3, None) is None


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match='eval_every=-1 must be at least 0; 0 turns it off'):
        evaluation.check_every(ml_collections.ConfigDict(dict(eval_every=-1)))

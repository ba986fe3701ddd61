"""Spread, paired differences and fronts, with values worked out by hand."""
import numpy as np
import pytest

from experiments.runtime import statistics


def test_spread_is_the_deviation_of_a_sample():
    rows = [{'a': 1.0, 'b': 5.0}, {'a': 3.0, 'b': 5.0}]
    assert statistics.mean_and_spread(rows) == {'a': 2.0, 'a_std': pytest.approx(2 ** 0.5), 'b': 5.0, 'b_std': 0.0}
    assert statistics.mean_and_spread([{'a': 107.404453}] * 5) == {'a': 107.404453, 'a_std': 0.0}  # not 1e-14
    assert statistics.mean_and_spread(rows[:1]) == {'a': 1.0, 'b': 5.0}


def test_a_deviation_within_measurements_is_not_taken_for_that_between_them():
    rows = [{'gold': 1.0, 'gold_std': 7.0}, {'gold': 3.0, 'gold_std': 9.0}]
    root = pytest.approx(2 ** 0.5)
    assert statistics.mean_and_spread(rows) == {
        'gold': 2.0, 'gold_std': root, 'gold_deviation': 8.0, 'gold_deviation_std': root}


def test_differences_are_paired():
    """What varies between seeds, and not between methods, drops out."""
    ours, theirs = [10.2, 20.1, 30.3], [10.0, 20.0, 30.0]
    difference = statistics.paired_difference(ours, theirs)
    assert (difference.mean, difference.above, difference.pairs) == (pytest.approx(0.2), 3, 3)
    assert difference.std == pytest.approx(0.1)
    assert 0.1 <= difference.low < 0.2 < difference.high < 0.3001
    assert statistics.paired_difference(ours, theirs) == difference  # the draws come from a fixed seed
    assert statistics.paired_difference([1.0], [2.0]) == (-1.0, None, None, None, 0, 1)
    with pytest.raises(ValueError, match='as many measurements on either side, not 2 and 1'):
        statistics.paired_difference([1.0, 2.0], [1.0])


def test_bootstrap_interval_is_that_of_the_resampled_means():
    values = np.array([0.0, 0.0, 0.0, 1.0])  # a resample's mean is that of Binomial(4, 1/4), over 4
    assert statistics.bootstrap_interval(values) == (0.0, 0.75)  # P(0) = 0.316, P(> 3) = 0.004, P(> 2) = 0.051
    assert statistics.bootstrap_interval(values, level=0.5) == (0.0, 0.5)
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = statistics.bootstrap_interval(rng.normal(size=30), draws=500)
        inside += low <= 0 <= high
    assert 175 <= inside <= 200  # of nominally 190


@pytest.mark.parametrize('at, height', [(-1, .2), (0, .2), (1, .35), (2, .5), (3, .5), (5, .7), (9, .9), (20, .9)])
def test_height_of_a_front(at, height):
    drift, task = np.array([2., 0., 9., 4., 6.]), np.array([.5, .2, .9, .4, .9])  # (4, .4) is dominated
    assert statistics.front_height(drift, task, at) == pytest.approx(height)


def test_undominated_points():
    drift, task = np.array([0., 1., 1., 2., 2.]), np.array([.1, .5, .4, .5, .7])
    assert statistics.undominated(drift, task).tolist() == [True, True, False, False, True]
    assert statistics.undominated(np.array([1., 1.]), np.array([2., 2.])).all()  # equal points do not beat each other

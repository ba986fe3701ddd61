import sys
import threading

import numpy as np
import pytest

from rlhf_jax.rollout.rewards import score


def test_rewards_are_passed_on_as_float32():
    rewards, replaced = score(lambda a, b: [len(x) + b for x in a], ['x', 'yy'], .5, num=2, timeout=20)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1.5, 2.5] and replaced == 0


@pytest.mark.parametrize('returned, message', [
    ([1.0], r'shape \(1,\), expected \(2,\)'), ([[1.0], [2.0]], r'shape \(2, 1\)'),
    (['a', 'b'], 'expected 2 numbers, got a list'),
    ([1.0, None], 'rewards'), ([1.0, np.nan], '1 of 2 are not finite')])
def test_what_is_no_reward_is_named(returned, message):
    with pytest.raises(ValueError, match=message):
        score(lambda: returned, num=2)


def test_a_long_run_may_go_on_with_replacements():
    def raises():
        raise OSError('judge is down')
    with pytest.raises(OSError, match='judge is down'):
        score(raises, num=3, timeout=20)
    rewards, replaced = score(raises, num=3, replacement=-1)
    assert rewards.tolist() == [-1] * 3 and replaced == 3
    rewards, replaced = score(lambda: [1, np.inf, np.nan], num=3, replacement=0)
    assert rewards.tolist() == [1, 0, 0] and replaced == 2
    with pytest.raises(ValueError, match='expected'):
        score(lambda: [1.0], num=3, replacement=0)  # of the wrong length is a mistake and not bad luck


def test_completions_may_have_no_reward():
    rewards, replaced = score(lambda: [1.0, None, float('nan')], num=3, may_miss=True)
    np.testing.assert_array_equal(rewards, np.array([1, np.nan, np.nan], np.float32))
    assert rewards.dtype == np.float32 and replaced == 0
    assert score(lambda: [1.0, None], num=2, may_miss=True, replacement=-1)[0].tolist() == [1, -1]
    with pytest.raises(ValueError, match='1 of 3 are not finite'):
        score(lambda: [1.0, None, np.inf], num=3, may_miss=True)
    with pytest.raises(ValueError, match=r'rewards: all 2 are missing \(None or NaN\)'):
        score(lambda: [None, np.nan], num=2, may_miss=True)


def test_a_reward_that_hangs_times_out():
    release = threading.Event()
    hang = lambda: release.wait(20)
    with pytest.raises(TimeoutError, match='did not return within timeout=0.02 s'):
        score(hang, num=1, timeout=.02)
    assert score(hang, num=1, timeout=.02, replacement=2.)[0].tolist() == [2]
    release.set()


@pytest.mark.parametrize('timeout', [None, 20])
def test_a_reward_that_is_given_up(timeout):
    class Asked(Exception):
        pass

    def check():
        raise Asked
    release = threading.Event()
    try:
        with pytest.raises(Asked):
            score(lambda: release.wait(20), num=1, timeout=timeout, replacement=2., check=check)
    finally:
        release.set()
    assert score(lambda: [3.], num=1, timeout=timeout, check=lambda: None)[0].tolist() == [3]


@pytest.mark.parametrize('timeout', [None, 20])
def test_a_reward_that_exits_is_an_error_and_no_end(timeout):
    with pytest.raises(RuntimeError, match=r'called sys.exit\(0\)'):
        score(lambda: sys.exit(0), num=1, timeout=timeout)

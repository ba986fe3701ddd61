"""Calling a reward function that somebody else wrote: it may raise, hang, or return what is no reward."""
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def score(reward: Callable[..., Sequence[float]], *args: Any, num: int, timeout: float | None = None,
          replacement: float | None = None) -> tuple[np.ndarray, int]:
    """`reward(*args)` as `num` finite numbers.

    Args:
        num: N, how many there must be.
        timeout: seconds for the whole batch; the call is left behind in its thread then. None: for ever.
        replacement: put where a reward is not finite, and in all N places if the function raises or times out, so that
            a long run goes on; the caller logs the count. None: these are errors.

    Returns:
        `(rewards, replaced)`: float32 [N], and how many of them are replacements.

    Raises:
        ValueError: another number of rewards than N (whatever `replacement`: it is a mistake in the function), rewards
            that are no numbers, or not finite.
        TimeoutError: the function took longer than `timeout`.
        Exception: what the function raised.
    """
    try:
        raw = _call(reward, args, timeout)
    except Exception:
        if replacement is None:
            raise
        return np.full(num, replacement, np.float32), num
    try:
        rewards = np.asarray(raw, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f'rewards: expected {num} numbers, got a {type(raw).__name__} ({error})') from None
    if rewards.shape != (num,):
        raise ValueError(f'rewards have shape {rewards.shape}, expected ({num},), one a completion')
    bad = ~np.isfinite(rewards)
    if bad.any():
        if replacement is None:
            raise ValueError(f'rewards: {int(bad.sum())} of {num} are not finite')
        rewards = np.where(bad, np.float32(replacement), rewards)
    return rewards, int(bad.sum())


def _call(reward: Callable[..., Any], args: tuple[Any, ...], timeout: float | None) -> Any:
    if timeout is None:
        return reward(*args)
    outcome: list[Any] = []

    def work():
        try:
            outcome.append((reward(*args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name='reward', daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise TimeoutError(f'the reward function did not return within timeout={timeout} s')
    value, error = outcome[0]
    if error is not None:
        raise error
    return value

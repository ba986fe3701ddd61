"""Calling a reward function that somebody else wrote: it may raise, hang, or return what is no reward."""
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LOOK_SECONDS = 0.1  # between two calls of `check`


def score(reward: Callable[..., Sequence[float]], *args: Any, num: int, timeout: float | None = None,
          replacement: float | None = None, may_miss: bool = False, may_miss_all: bool = False,
          check: Callable[[], None] | None = None) -> tuple[np.ndarray, int]:
    """`reward(*args)` as `num` numbers.

    Args:
        num: N, how many there must be.
        timeout: seconds for the whole batch; the call is left behind in its thread then. None: for ever.
        replacement: put where a reward is not finite, and in all N places if the function raises or times out, so that
            a long run goes on; the caller logs the count. None: these are errors.
        may_miss: a completion may have no reward, None or NaN: it comes back as NaN, and whatever compares completions
            leaves it out. With a `replacement` that is put there; no reward at all is an error.
        may_miss_all: and that is none either: these are a part of those that are compared.
        check: called a few times a second while the function runs; what it raises is raised here (the process has been
            asked to stop), and the call is left behind.

    Returns:
        `(rewards, replaced)`: float32 [N], and how many of them are replacements.

    Raises:
        ValueError: another number of rewards than N (whatever `replacement`: it is a mistake in the function), rewards
            that are no numbers, not finite, or all missing.
        TimeoutError: the function took longer than `timeout`.
        RuntimeError: the function called `sys.exit`.
        Exception: what the function raised.
    """
    try:
        raw = _call(reward, args, timeout, check)
    except _Checked as checked:
        raise checked.error from None
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
    if replacement is not None:
        return np.where(bad, np.float32(replacement), rewards), int(bad.sum())
    if may_miss and not may_miss_all and np.isnan(rewards).all():
        raise ValueError(f'rewards: all {num} are missing (None or NaN)')
    if may_miss:
        bad = np.isinf(rewards)
    if bad.any():
        raise ValueError(f'rewards: {int(bad.sum())} of {num} are not finite')
    return rewards, 0


class _Checked(Exception):
    """`check` raised `error`, which no replacement stands in for."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


def _call(reward: Callable[..., Any], args: tuple[Any, ...], timeout: float | None,
          check: Callable[[], None] | None) -> Any:
    if timeout is None and check is None:
        return _without_exit(reward, args)
    outcome: list[Any] = []

    def work():
        try:
            outcome.append((_without_exit(reward, args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name='reward', daemon=True)
    thread.start()
    deadline = None if timeout is None else time.monotonic() + timeout
    while thread.is_alive() and (deadline is None or time.monotonic() < deadline):
        left = LOOK_SECONDS if deadline is None else deadline - time.monotonic()
        thread.join(min(LOOK_SECONDS, max(left, 0)) if check else left)
        if check and thread.is_alive():
            try:
                check()
            except Exception as error:
                raise _Checked(error) from None
    if not outcome:
        raise TimeoutError(f'the reward function did not return within timeout={timeout} s')
    value, raised = outcome[0]
    if raised is not None:
        raise raised
    return value


def _without_exit(reward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """`reward(*args)`; a `sys.exit` in it must not end a run as if it were finished."""
    try:
        return reward(*args)
    except SystemExit as error:
        raise RuntimeError(f'the reward function called sys.exit({error.code!r})') from error

"""Spread over repeated measurements, paired differences with bootstrap intervals, and fronts of a trade-off.

Everything is a function of its arguments: bootstrap draws come from a fixed seed, so a report is the same every time.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95     # share of a bootstrap interval
DRAWS = 10_000   # resamples behind it


class Difference(NamedTuple):
    """Paired differences of N measurements.

    Attributes:
        mean, std: over the pairs; `std` is None of a single pair.
        low, high: ends of the percentile bootstrap interval of the mean; None of a single pair.
        above: pairs whose difference is positive.
        pairs: N.
    """
    mean: float
    std: float | None
    low: float | None
    high: float | None
    above: int
    pairs: int


def spread(measurements: Mapping[str, Any]) -> dict[str, float]:
    """{name: mean, name_std: standard deviation} of measurements [N] by name; of one there is no deviation.

    What was measured as `x_std` beside `x`, a deviation within each measurement, is called `x_deviation` here.
    """
    out = {}
    for name, values in measurements.items():
        values = np.asarray(values, np.float64)
        if name.endswith('_std') and name.removesuffix('_std') in measurements:
            name = f'{name.removesuffix("_std")}_deviation'
        equal = values.size > 0 and (values == values.flat[0]).all()  # whose mean, rounded, may be another number
        out[name] = float(values.flat[0] if equal else values.mean())
        if values.size > 1:
            out[f'{name}_std'] = 0.0 if equal else float(values.std(ddof=1))
    return out


def mean_and_spread(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`spread` of repeated measurements that are given as rows of equal names."""
    return spread({name: [row[name] for row in rows] for name in rows[0]})


def bootstrap_interval(values: Any, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N]: N are drawn with replacement, `draws` times.

    With few values it is too narrow: of three, it covers the true mean less often than `level` says.
    """
    values = np.asarray(values, np.float64)
    picked = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picked].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(ours: Any, theirs: Any, *, level: float = LEVEL, draws: int = DRAWS,
                      seed: int = 0) -> Difference:
    """`ours` less `theirs`, [N] each, measurement by measurement (the same seed in both, say).

    Raises:
        ValueError: they are not of one length, or empty.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f'paired differences need as many measurements on either side, not {ours.size} and '
                         f'{theirs.size}')
    values = ours - theirs
    std, low, high = None, None, None
    if values.size > 1:
        std = float(values.std(ddof=1))
        low, high = bootstrap_interval(values, level=level, draws=draws, seed=seed)
    return Difference(float(values.mean()), std, low, high, int((values > 0).sum()), values.size)


# ---- Trade-offs of a task against a drift ----------------------------------------------------------------------------

def front_height(drift: np.ndarray, task: np.ndarray, at: float) -> float:
    """The best task for a drift of at most `at` on the line through points [P], ordered by their drift.

    Left of all points, the task of the one that drifted least (what is there is better than that in both).
    """
    order = np.lexsort((-task, drift))
    return float(np.interp(at, drift[order], np.maximum.accumulate(task[order])))


def undominated(drift: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Which of points [P] no other one beats: bool [P]. Another beats it with no more drift and no less task, and
    less drift or more task."""
    drift, task = np.asarray(drift), np.asarray(task)
    no_worse = (drift[None] <= drift[:, None]) & (task[None] >= task[:, None])
    better = (drift[None] < drift[:, None]) | (task[None] > task[:, None])
    return ~(no_worse & better).any(1)

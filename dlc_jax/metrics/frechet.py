"""Fréchet distance between Gaussians fitted to features (FID, arXiv 1706.08500): any feature space, float64.

    fitted = Accumulator()
    for batch in stream: fitted.add(batch)
    frechet_distance(fitted.statistics(), statistics(reference))

The trace of the root of a covariance product comes from eigenvalues, not from a matrix square root: `sqrtm` has given
different values with different SciPy versions, and turns complex or asks for an offset where a covariance is singular.
"""
from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """Mean [F] and covariance [F, F] (divisor n - 1) of `count` feature vectors, float64."""
    mean: np.ndarray
    covariance: np.ndarray
    count: int  # type: ignore[assignment]  # `tuple` has a method of that name


class Accumulator:
    """Statistics of features that arrive in batches, in one pass: moments of parts are merged (Chan et al. 1979).

    Squares are summed about the running mean, so features far from the origin lose no digits, and how a stream is cut
    into batches changes nothing beyond rounding.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._scatter = np.zeros(0), np.zeros((0, 0))

    def add(self, features: np.ndarray) -> None:
        """Takes in `features` [N, F].

        Raises:
            ValueError: not [N, F], another F than before, or values that are not finite.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2:
            raise ValueError(f'features must be [N, F], got shape {x.shape}')
        if not np.isfinite(x).all():
            raise ValueError('features hold values that are not finite; check the feature extractor and its input')
        if len(x):
            mean = x.mean(0)
            centred = x - mean
            self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: 'Accumulator') -> None:
        """Adds all that `other` has seen: a part of the stream that was read elsewhere."""
        if other.count:
            self._merge(other.count, other._mean, other._scatter)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean.copy(), scatter.copy()
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f'features have {mean.size} dimensions, those before had {self._mean.size}')
        total, shift = self.count + count, mean - self._mean
        self._scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Statistics of all features so far; a ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f'a covariance needs 2 feature vectors or more, got {self.count}')
        return Statistics(self._mean.copy(), self._scatter / (self.count - 1), self.count)


def statistics(features: np.ndarray, *, block: int = 8192) -> Statistics:
    """Statistics of features [N, F], N >= 2; `block` rows at a time are copied to float64."""
    accumulator = Accumulator()
    for start in range(0, len(features), block):
        accumulator.add(features[start:start + block])
    return accumulator.statistics()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Distance `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, not negative.

    With C_a = R R^T, the eigenvalues of C_a C_b are those of the symmetric R^T C_b R.

    Raises:
        ValueError: features of different sizes.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f'features have {a.mean.size} and {b.mean.size} dimensions; '
                         'use one feature extractor for both')
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    product = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    difference = a.mean - b.mean
    distance = (difference @ difference + np.trace(a.covariance) + np.trace(b.covariance)
                - 2 * np.sqrt(np.maximum(product, 0)).sum())
    return max(float(distance), 0.0)

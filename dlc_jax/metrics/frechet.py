"""Fréchet distance between Gaussians fitted to features (FID, arXiv 1706.08500).

The trace of the root of a covariance product comes from eigenvalues, not from a matrix square root: `sqrtm` has given
different values with different SciPy versions.
"""
from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """Mean [F] and covariance [F, F] (divisor n - 1) of `count` feature vectors, float64."""
    mean: np.ndarray
    covariance: np.ndarray
    count: int


class Accumulator:
    """Statistics of features that arrive in batches, whatever the batch size (shifted sums in float64)."""

    def __init__(self):
        self._count, self._shift = 0, None
        self._sum = self._outer = 0.0

    def add(self, features: np.ndarray) -> None:
        """`features` [N, F]."""
        x = np.asarray(features, np.float64)
        if x.ndim != 2:
            raise ValueError(f'features must be [N, F], got shape {x.shape}')
        if self._shift is None:
            self._shift = x.mean(0)
        x = x - self._shift
        self._count += len(x)
        self._sum = self._sum + x.sum(0)
        self._outer = self._outer + x.T @ x

    def statistics(self) -> Statistics:
        """Raises a ValueError for fewer than two vectors."""
        if self._count < 2:
            raise ValueError(f'a covariance needs 2 feature vectors or more, got {self._count}')
        mean = self._sum / self._count
        covariance = (self._outer - self._count * np.outer(mean, mean)) / (self._count - 1)
        return Statistics(self._shift + mean, covariance, self._count)


def statistics(features: np.ndarray) -> Statistics:
    """Of features [N, F], N >= 2."""
    accumulator = Accumulator()
    accumulator.add(features)
    return accumulator.statistics()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """`|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`.

    With C_a = R R^T, the eigenvalues of C_a C_b are those of the symmetric R^T C_b R.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f'features have {a.mean.size} and {b.mean.size} dimensions; use one feature extractor for both')
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    product = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance)
                 - 2 * np.sqrt(np.maximum(product, 0)).sum())

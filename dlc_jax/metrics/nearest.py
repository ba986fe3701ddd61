"""Nearest-neighbour distances in blocks: nothing of size [N, M] is ever held."""
from collections.abc import Iterator

import numpy as np


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of [N, F] and [M, F], float64 [N, M]; exactly 0 for rows that agree to rounding."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = (a * a).sum(1)[:, None] + (b * b).sum(1)
    distances = norms - 2 * (a @ b.T)
    return np.where(distances < 1e-13 * norms, 0.0, distances)  # what the subtraction leaves of zero


def blocks(queries: np.ndarray, references: np.ndarray, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, squared distances of those rows of `queries` [N, F] to all `references` [M, F]), `block` rows at a time.

    Raises:
        ValueError: features of different sizes, no reference, or values that are not finite.
    """
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(f'features of shapes {queries.shape} and {references.shape} cannot be compared; '
                         'expected [N, F] and [M, F]')
    if not len(references):
        raise ValueError('references: there is nothing to compare with')
    # About one point, so that the subtraction in |a|^2 + |b|^2 - 2ab keeps its digits.
    center = references.mean(0, dtype=np.float64)
    references = _finite(references - center)
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        yield rows, squared_distances(_finite(queries[rows] - center), references)


def nearest_distances(queries: np.ndarray, references: np.ndarray, *, k: int = 1, exclude_self: bool = False,
                      return_index: bool = False, block: int = 1024) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Distance from each query [N, F] to its k-th nearest reference [M, F]: [N] float64.

    Samples that are much closer to the training set than held-out data is are copies.

    Args:
        exclude_self: the two sets are the same; a row is not its own neighbour.
        return_index: also which reference that is, int64 [N].
        block: rows at a time; memory is `block` x M.

    Raises:
        ValueError: fewer than k references, or features that cannot be compared.
    """
    if len(references) - exclude_self < k:
        raise ValueError(f'k={k} neighbours asked for among {len(references) - exclude_self} references')
    distance, index = np.empty(len(queries)), np.empty(len(queries), np.int64)
    for rows, squared in blocks(queries, references, block):
        if exclude_self:
            squared[np.arange(len(squared)), np.arange(rows.start, rows.start + len(squared))] = np.inf
        index[rows] = np.argpartition(squared, k - 1, axis=1)[:, k - 1] if k > 1 else squared.argmin(1)
        distance[rows] = np.sqrt(np.take_along_axis(squared, index[rows, None], 1)[:, 0])
    return (distance, index) if return_index else distance


def _finite(features: np.ndarray) -> np.ndarray:
    if not np.isfinite(features).all():
        raise ValueError('features hold values that are not finite; check the feature extractor and its input')
    return features

"""Nearest-neighbour distances in blocks: nothing of size [N, M] is ever held."""
import numpy as np


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, F], [M, F] -> [N, M] squared Euclidean distances, at least 0, in the dtype of the inputs."""
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T, 0)


def nearest_distances(queries: np.ndarray, references: np.ndarray, *, k: int = 1, exclude_self: bool = False,
                      block: int = 1024) -> np.ndarray:
    """Distance from each query [N, F] to its k-th nearest reference [M, F]: [N] float64.

    Args:
        exclude_self: the two sets are the same; a row is not its own neighbour.
        block: rows at a time.

    Raises:
        ValueError: fewer than k references.
    """
    if len(references) - exclude_self < k:
        raise ValueError(f'k={k} neighbours asked for among {len(references) - exclude_self} references')
    # About one point, so that the subtraction in |a|^2 + |b|^2 - 2ab keeps its digits.
    center = np.asarray(references, np.float64).mean(0)
    references = np.asarray(references, np.float64) - center
    out = []
    for start in range(0, len(queries), block):
        d = squared_distances(np.asarray(queries[start:start + block], np.float64) - center, references)
        if exclude_self:
            rows = np.arange(len(d))
            d[rows, start + rows] = np.inf
        out.append(np.sqrt(np.partition(d, k - 1, axis=1)[:, k - 1]))
    return np.concatenate(out)

"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of samples in a feature space."""
import numpy as np

from dlc_jax.metrics import nearest

# One distance, computed in blocks of different shapes, may differ in its last bits; whether a point on a ball's edge is
# inside must not hang on them.
_SLACK = 1 + 1e-9


def prdc(real: np.ndarray, fake: np.ndarray, *, k: int = 3, block: int = 1024) -> dict[str, float]:
    """Four scores of `fake` [N, F] against `real` [M, F].

    A real point's ball reaches to its k-th nearest real neighbour, a fake point's to its k-th nearest fake one, and a
    point on the edge is inside. The ADM suite's precision and recall are these at k = 3, of 10 000 reals and all fakes.

    Args:
        block: rows at a time; memory is `block` x max(N, M).

    Returns:
        precision: share of fakes inside some real ball. recall: share of reals inside some fake ball.
        density: mean number of real balls around a fake, over k. coverage: share of real balls that hold a fake.

    Raises:
        ValueError: k or fewer points in either set, or features that cannot be compared.
    """
    radius = lambda x: np.square(nearest.nearest_distances(x, x, k=k, exclude_self=True, block=block)) * _SLACK
    real_radius, fake_radius = radius(real), radius(fake)
    precise, inside = 0, 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, squared in nearest.blocks(fake, real, block):
        in_real_ball = squared <= real_radius
        precise += int(in_real_ball.any(1).sum())
        inside += int(in_real_ball.sum())
        covered |= in_real_ball.any(0)
        recalled |= (squared <= fake_radius[rows, None]).any(0)
    return {'precision': precise / len(fake), 'recall': float(recalled.mean()), 'density': inside / (k * len(fake)),
            'coverage': float(covered.mean())}

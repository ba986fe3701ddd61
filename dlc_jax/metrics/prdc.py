"""Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) of samples in a feature space."""
import numpy as np

from dlc_jax.metrics.nearest import nearest_distances, squared_distances


def prdc(real: np.ndarray, fake: np.ndarray, *, k: int = 3, block: int = 1024) -> dict[str, float]:
    """Four scores of `fake` [N, F] against `real` [M, F].

    A real point's ball reaches to its k-th nearest real neighbour, a fake point's to its k-th nearest fake one.

    Returns:
        precision: share of fakes inside some real ball. recall: share of reals inside some fake ball.
        density: mean number of real balls around a fake, over k. coverage: share of real balls that hold a fake.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    real_radius = nearest_distances(real, real, k=k, exclude_self=True, block=block) ** 2
    fake_radius = nearest_distances(fake, fake, k=k, exclude_self=True, block=block) ** 2
    center = real.mean(0)
    real, fake = real - center, fake - center
    inside_real, inside_fake, covered = [], np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(fake), block):
        d = squared_distances(fake[start:start + block], real)
        in_real_ball = d <= real_radius
        inside_real.append(in_real_ball.sum(1))
        covered |= in_real_ball.any(0)
        inside_fake |= (d <= fake_radius[start:start + block, None]).any(0)
    balls = np.concatenate(inside_real)
    return {'precision': float((balls > 0).mean()), 'recall': float(inside_fake.mean()),
            'density': float(balls.mean() / k), 'coverage': float(covered.mean())}

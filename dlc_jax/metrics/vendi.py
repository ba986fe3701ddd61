"""Vendi score (arXiv 2210.02410): the effective number of different samples."""
import numpy as np


def vendi_score(features: np.ndarray) -> float:
    """Vendi score, exp of the entropy of the eigenvalues of K / N, K the cosine similarities of `features` [N, F].

    1 if all samples are alike (up to length), N if all are orthogonal. Of the N x N kernel and the F x F matrix with
    the same eigenvalues the smaller is decomposed.

    Raises:
        ValueError: not [N, F], no sample, or a feature of length 0.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f'features have shape {features.shape}, expected [N, F] with at least one sample')
    x = np.asarray(features, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise ValueError('features: a sample is zero or not finite, and has no direction to compare')
    x = x / length
    return _from_eigenvalues(np.linalg.eigvalsh((x @ x.T if len(x) <= x.shape[1] else x.T @ x) / len(x)))


def _from_eigenvalues(values: np.ndarray) -> float:
    values = values[values > 1e-14]  # rounding leaves some around 0
    return float(np.exp(-np.sum(values * np.log(values))))

"""Inception Score (arXiv 1606.03498)."""
import numpy as np
from scipy.special import log_softmax


def inception_score(logits: np.ndarray, *, split_size: int = 5000) -> tuple[float, float]:
    """Inception Score, exp(mean KL(p(y | x) || p(y))) over parts of `split_size` images.

    Returns its mean and standard deviation over the parts.

    The ADM suite reports the mean for parts of 5000 in the order of the samples; the last part may be smaller.

    Args:
        logits: classifier outputs [N, C] before the softmax, float; log-probabilities will do.

    Raises:
        ValueError: not [N, C], N = 0, or values that are not finite.
    """
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f'logits have shape {logits.shape}, expected [N, C] with at least one image')
    if split_size < 1:
        raise ValueError(f'split_size={split_size} must be at least 1')
    scores = []
    for start in range(0, len(logits), split_size):
        part = np.asarray(logits[start:start + split_size], np.float64)
        if not np.isfinite(part).all():
            raise ValueError('logits hold values that are not finite; check the classifier and its input')
        log_p = log_softmax(part, axis=1)
        p = np.exp(log_p)
        marginal = p.mean(0)
        log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
        scores.append(np.exp(np.mean(np.sum(p * (log_p - log_marginal), 1))))
    return float(np.mean(scores)), float(np.std(scores))

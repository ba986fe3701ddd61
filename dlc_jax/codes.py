"""Discrete latent codes as data: from logits, their statistics, distances between them, and their composition.

A code is L tokens in 0..V-1, integers [L]; a soft code (SEM) is the distribution behind each token, [L, V].
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

COMPOSITIONS = ('average', 'positions')


def from_logits(logits: Array) -> Array:
    """Codes int32 [..., L] of logits or soft codes [..., L, V]: the likeliest value, the lowest of several that tie."""
    return jnp.argmax(logits, -1).astype(jnp.int32)


def one_hot(codes: np.ndarray, vocab_size: int, dtype: type = np.float32) -> np.ndarray:
    """One-hot encoding of codes: [..., L] -> [..., L, V] of `dtype`.

    Raises:
        ValueError: a token outside 0..V-1.
    """
    codes = _checked(codes, vocab_size)
    out = np.zeros((*codes.shape, vocab_size), dtype)
    np.put_along_axis(out, codes[..., None].astype(np.int64), 1, -1)
    return out


# ---- Statistics ----------------------------------------------------------------------------------------------------

def histogram(codes: np.ndarray, vocab_size: int, *, block: int = 8192) -> np.ndarray:
    """Counts how often each position of `codes` [N, L] takes each value: int64 [L, V]. Reads `block` codes at a time.

    Raises:
        ValueError: a token outside 0..V-1, or codes that are not [N, L].
    """
    if codes.ndim != 2:
        raise ValueError(f'codes have shape {codes.shape}, expected [N, L]')
    length = codes.shape[1]
    counts = np.zeros(length * vocab_size, np.int64)
    offsets = np.arange(length, dtype=np.int64) * vocab_size
    for start in range(0, len(codes), block):
        part = _checked(codes[start:start + block], vocab_size)
        counts += np.bincount((part.astype(np.int64) + offsets).ravel(), minlength=counts.size)
    return counts.reshape(length, vocab_size)


def statistics(codes: np.ndarray, vocab_size: int) -> dict[str, np.ndarray | int]:
    """Measures how codes [N, L] use their vocabulary.

    Returns:
        `histogram` int64 [L, V]; `perplexity` float64 [L], exp of the entropy of each position's histogram: 1 if it
        never changes, V if it uses all values alike; `dead` float64 [L], share of values that never occur there;
        `distinct`, number of different codes.
    """
    counts = histogram(codes, vocab_size)
    p = counts / max(len(codes), 1)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1)
    return {'histogram': counts, 'perplexity': np.exp(entropy), 'dead': (counts == 0).mean(-1),
            'distinct': count_distinct(codes)}


def count_distinct(codes: np.ndarray) -> int:
    """Number of different rows of `codes` [N, L]."""
    rows = np.ascontiguousarray(codes)
    return len(np.unique(rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))))) if rows.size else 0


def explained(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the variance of `features` [N, P, F] at each place P that the classes `labels` [N] explain: float64 [P].

    It is the variance between the means of the classes over all of it, both summed over F; 0 at a place that never
    changes. Of one-hot tokens [N, L, V] it is Goodman and Kruskal's tau: how much better a token is guessed by who
    knows the class.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.ndim != 3 or labels.shape != features.shape[:1]:
        raise ValueError(f'features have shape {features.shape}, labels {labels.shape}; expected [N, P, F] and [N]')
    centred = features - features.mean(0, dtype=np.float64)
    between = np.zeros(features.shape[1])
    for label in np.unique(labels):
        of_class = centred[labels == label]
        between += len(of_class) * (of_class.mean(0) ** 2).sum(-1)
    whole = (centred ** 2).sum((0, 2))
    return np.divide(between, whole, out=np.zeros_like(whole), where=whole > 0)


# ---- Distances -----------------------------------------------------------------------------------------------------

@jax.jit
def pairwise_hamming(a: Array, b: Array) -> Array:
    """Number of positions in which each of `a` [N, L] differs from each of `b` [M, L]: int32 [N, M]."""
    # Position by position: the running [N, M] count stays in cache, where [N, M, L] would not fit anywhere.
    a, b = jnp.asarray(a).T, jnp.asarray(b).T

    def add(l: Array, distance: Array) -> Array:
        return distance + (a[l][:, None] != b[l][None])

    return jax.lax.fori_loop(0, len(a), add, jnp.zeros((a.shape[1], b.shape[1]), jnp.int32))


def nearest_hamming(queries: np.ndarray, references: np.ndarray, *, return_index: bool = False,
                    block: tuple[int, int] = (256, 4096)) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Distance of each of `queries` [N, L] to the closest of `references` [M, L]: int32 [N].

    Args:
        return_index: also the index of that reference, the first of several, int64 [N].
        block: so many queries and references are compared at a time, on the default device; [N, M] is never held.

    Raises:
        ValueError: codes of different lengths, or no reference.
    """
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(f'codes of shapes {queries.shape} and {references.shape} cannot be compared; '
                         'expected [N, L] and [M, L]')
    if not len(references):
        raise ValueError('references: there is no code to compare with')
    rows, columns = min(block[0], max(len(queries), 1)), min(block[1], len(references))
    best = np.empty(len(queries), np.int32)
    index = np.empty(len(queries), np.int64)
    for i in range(0, len(queries), rows):
        # The last block repeats earlier rows, so that every block has one shape and one compilation serves all.
        start = max(0, min(i, len(queries) - rows))
        query = jnp.asarray(queries[start:start + rows], jnp.int32)
        least, at = np.full(rows, np.iinfo(np.int32).max, np.int32), np.zeros(rows, np.int64)
        for j in range(0, len(references), columns):
            first = max(0, min(j, len(references) - columns))
            distance, arg = map(np.asarray, _closest(query, jnp.asarray(references[first:first + columns], jnp.int32)))
            closer = distance < least
            least, at = np.where(closer, distance, least), np.where(closer, arg + first, at)
        best[start:start + rows], index[start:start + rows] = least, at
    return (best, index) if return_index else best


@jax.jit
def _closest(queries: Array, references: Array) -> tuple[Array, Array]:
    distance = pairwise_hamming(queries, references)
    return distance.min(1), distance.argmin(1)


# ---- Composition ---------------------------------------------------------------------------------------------------

def compose(key: Array, sems: Array, num: int, *, method: str = 'average',
            weights: Sequence[float] | np.ndarray | None = None) -> Array:
    """Draws `num` codes int32 [num, L] that mix K sources, from their soft codes `sems` [K, L, V].

    'average' (arXiv 2507.12318, §5.2, as `sample_comp_imgs.py` does it) draws each token from the mean of the sources'
    distributions; at a low temperature of the soft codes that is one source's token or another's, and others get a
    chance as it rises. 'positions' takes each token from one source, whole.

    Args:
        weights: share of each source, [K], or of each source at each position, [K, L]; equal if None.

    Raises:
        ValueError: another method, or shapes that do not fit.
    """
    if method not in COMPOSITIONS:
        raise ValueError(f'composition={method!r} is not one of {COMPOSITIONS}')
    sems = jnp.asarray(sems, jnp.float32)
    if sems.ndim != 3:
        raise ValueError(f'sems have shape {sems.shape}, expected [sources, L, V]')
    if method == 'positions':
        return compose_positions(key, from_logits(sems), num, weights=weights)
    mean = (_shares(weights, sems.shape[:2])[..., None] * sems).sum(0)
    return jax.random.categorical(key, jnp.log(mean), shape=(num, sems.shape[1]), mode='high').astype(jnp.int32)


def compose_positions(key: Array, codes: Array, num: int, *,
                      weights: Sequence[float] | np.ndarray | None = None) -> Array:
    """Draws `num` codes int32 [num, L], each token from one of the sources `codes` int [K, L], chosen by position.

    Args:
        weights: as in `compose`. Where one source has all of a position's share, its token is there in every draw.
    """
    codes = jnp.asarray(codes, jnp.int32)
    if codes.ndim != 2:
        raise ValueError(f'codes have shape {codes.shape}, expected [sources, L]')
    log_shares = jnp.log(_shares(weights, codes.shape)).T
    source = jax.random.categorical(key, log_shares, shape=(num, codes.shape[1]), mode='high')
    return jnp.take_along_axis(codes, source, 0)


def token_origin(composed: np.ndarray, sources: np.ndarray) -> dict[str, np.ndarray | float]:
    """Shares of the tokens of `composed` [N, L] by where they come from, given the codes `sources` [K, L] they mix.

    Returns:
        Shares of all tokens: `source` float64 [K], that only this source has there; `shared`, that several have;
        `none`, that none has. They add up to 1.
    """
    match = np.asarray(composed)[:, None] == np.asarray(sources)[None]  # [N, K, L]
    matches = match.sum(1, keepdims=True)
    return {'source': (match & (matches == 1)).mean((0, 2)), 'shared': float((matches > 1).mean()),
            'none': float((matches == 0).mean())}


def _shares(weights: Sequence[float] | np.ndarray | None, shape: tuple[int, ...]) -> Array:
    """Shares [K, L] of K sources at L positions, which add up to 1 at each, for `weights` [K] or [K, L]."""
    num, length = shape
    shares = np.ones(num) if weights is None else np.asarray(weights, np.float64)
    if shares.shape not in ((num,), shape) or (shares < 0).any() or not (shares.sum(0) > 0).all():
        raise ValueError(f'weights={weights}: give one number, not negative, for each of the {num} sources, or one for '
                         f'each of them at each of the {length} positions')
    shares = np.broadcast_to(shares.reshape(num, -1), shape)
    return jnp.asarray(shares / shares.sum(0), jnp.float32)


def _checked(codes: np.ndarray, vocab_size: int) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.size and not 0 <= codes.min() <= codes.max() < vocab_size:
        bad = codes.max() if codes.min() >= 0 else codes.min()
        raise ValueError(f'codes: token {bad} is outside 0..{vocab_size - 1}; check vocab_size')
    return codes

"""Likelihoods of a masked-diffusion model: a bound for any code, and the exact one of a code that its sampler drew.

With y a code of L positions, x its caption, M a set of k positions, and y_M the code with masks there (LLaDA,
arXiv 2502.09992 equation 6; any-order autoregression as in arXiv 2406.03736):

    B(y | x) = E over k ~ U{1..L}, M ~ U(subsets of k):   L / k  sum_{i in M} log p(y_i | x, y_M)   <=  log p(y | x)

    masks = draw_masks(key, 8, L)                                     # the same for every model and code compared
    terms = bound_terms(logits_of, codes, masks)                      # float32 [N, L]; their sum estimates B

`logits_of` is the network with its captions. To compare models or codes, give all of them the same masks: the
difference of two estimates then has far less variance than either (antithetic draws; VRPO, arXiv 2505.19223 section 4,
shares them between policy and reference; here the two codes of a preference share them too).

A sampler that fills positions in an order that does not look at the values ('random' remasking) has drawn its code with
the probability

    q(y | x, order) = prod over steps s, prod over i filled at s:   p(y_i | x, y_s),   y_s: y as it was before step s

    steps = draw_steps(key, 8, S)                                     # of its S steps; all of them: exact
    logprobs, counted = sampled_terms(logits_of, codes, filled_at, steps, temperature)

of which any subset of the steps gives exact terms, so that ratios between two models are exact for those tokens, and
S / n times their sum is unbiased. 'low_confidence' remasking chooses the order by the values: it has no such product.
"""
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
# Codes int32 [N, n, L] in 0..V, V being a mask, n versions of each of N rows -> logits float32 [N, n, L, V].
LogitsOf = Callable[[Array], Array]


def draw_masks(key: Array, num: int, length: int, *, stratified: bool = True) -> Array:
    """Sets of positions for the bound: bool [num, L], a size k ~ U{1..L} each and k positions among L, all alike.

    Args:
        stratified: size j is drawn from the j-th of `num` equal parts of 1..L: as unbiased, and less apart.

    Raises:
        ValueError: no mask, or none to put anywhere.
    """
    if num < 1 or length < 1:
        raise ValueError(f'draw_masks: num={num} and length={length} must be at least 1')
    size_key, place_key = jax.random.split(key)
    u = jax.random.uniform(size_key, (num,))
    share = (jnp.arange(num) + u) / num if stratified else u
    sizes = jnp.clip(1 + jnp.floor(share * length).astype(jnp.int32), 1, length)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(place_key, (num, length)), -1), -1)
    return rank < sizes[:, None]


def bound_terms(logits_of: LogitsOf, codes: Array, masks: Array, mask_value: int) -> Array:
    """Estimate of B from n sets of positions, split by position: float32 [N, L], whose sum over L is the estimate.

        term_i = 1/n sum_j [i in M_j] L / |M_j| log p(y_i | x, y_{M_j})

    Args:
        logits_of: the network; called once, on all n versions.
        codes: int [N, L] in 0..V-1.
        masks: bool [n, L] or [N, n, L], none empty.
        mask_value: V.
    """
    codes = jnp.asarray(codes)
    masks = jnp.broadcast_to(masks, (len(codes), *masks.shape[-2:]))
    chex.assert_equal_shape_suffix((codes, masks), 1)
    logprobs = _logprobs(logits_of(jnp.where(masks, mask_value, codes[:, None])), codes)
    weights = masks.shape[-1] / jnp.maximum(masks.sum(-1, keepdims=True), 1)
    return jnp.where(masks, weights * logprobs, 0.0).mean(1)


def draw_steps(key: Array, num: int, num_steps: int) -> Array:
    """Which of a sampler's steps to score: int32 [num] ascending and different, each step with probability num / S.

    Raises:
        ValueError: more than there are, or none.
    """
    if not 1 <= num <= num_steps:
        raise ValueError(f'draw_steps: num={num} must be in 1..{num_steps}, the steps of the sampler')
    # One offset for all: equal distances of S / num, so that none comes twice.
    at = (jnp.arange(num) + jax.random.uniform(key)) * (num_steps / num)
    return jnp.clip(jnp.floor(at).astype(jnp.int32), 0, num_steps - 1)


def sampled_terms(logits_of: LogitsOf, codes: Array, filled_at: Array, steps: Array, mask_value: int,
                  temperature: float = 1.0) -> tuple[Array, Array]:
    """Log-probabilities of the tokens that a sampler filled at `steps`, as it drew them.

    Args:
        logits_of: the network, guidance included where the sampler had it; called once, on all n states.
        codes: int [N, L].
        filled_at: int [N, L], the step at which each was filled.
        steps: int [n] or [N, n], different ones.
        mask_value: V.
        temperature: that they were drawn at.

    Returns:
        float32 [N, L], 0 where no such step filled the position, and bool [N, L], where one did.
    """
    codes, filled_at = jnp.asarray(codes), jnp.asarray(filled_at)
    steps = jnp.broadcast_to(steps, (len(codes), steps.shape[-1]))[..., None]
    chex.assert_equal_shape((codes, filled_at))
    state = jnp.where(filled_at[:, None] >= steps, mask_value, codes[:, None])
    filled = filled_at[:, None] == steps
    logprobs = _logprobs(logits_of(state) / temperature, codes)
    return jnp.where(filled, logprobs, 0.0).sum(1), filled.any(1)


def _logprobs(logits: Array, codes: Array) -> Array:
    """Log-probability [N, n, L] of each of `codes` [N, L] under `logits` [N, n, L, V]."""
    logits = logits.astype(jnp.float32)
    codes = jnp.broadcast_to(codes[:, None], logits.shape[:-1])
    return jnp.take_along_axis(logits, codes[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)

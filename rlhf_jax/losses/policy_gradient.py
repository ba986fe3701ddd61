"""Policy-gradient losses: PPO and its decoupled form, RLOO, Proximal RLOO, GRPO, and weights for stale samples.

Three policies may take part. `logprobs` are of the policy that is trained; `old_logprobs` of the one the ratio is
clipped around (proximal); `behaviour_logprobs` of the one that sampled, as the sampler returned them. In synchronous
training the last two are one. Recomputing `old_logprobs` with the learner's weights and calling them the sampler's
makes every ratio 1 and hides staleness altogether.

Every loss is a mean over completions or their tokens, whatever the leading axes: [B, K, L] here, a part of it as well.
"""
import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.kl import estimate
from rlhf_jax.logprobs import sequence_logprobs

Array = jax.Array
Loss = tuple[Array, dict[str, Array]]

LEVELS = ('token', 'sequence')
BEYOND = ('truncate', 'mask')
MEANS = ('sequence', 'token')


def importance_weights(logprobs: Array, behaviour_logprobs: Array, mask: Array, *, cap: float = 2.0,
                       level: str = 'token', beyond: str = 'truncate') -> Array:
    """Weights `pi / pi_behaviour` that correct the expectation over stale samples, bounded above; without gradient.

    Args:
        logprobs: [B, K, L] of the policy the expectation should be under (the proximal one).
        behaviour_logprobs: [B, K, L] as the sampler returned them.
        cap: upper bound. Unbounded weights let a few samples decide the step.
        level: 'token' weights each token by its own ratio; 'sequence' all of a response's tokens by the product of
            them.
        beyond: weights above `cap` are cut down to it ('truncate') or set to 0 ('mask').

    Returns:
        [B, K, L] float32, or [B, K, 1] for 'sequence'. Tokens that do not count get 1.

    Raises:
        ValueError: another `level` or `beyond`, or `cap` not positive.
    """
    if not cap > 0:
        raise ValueError(f'cap={cap} must be positive')
    if level not in LEVELS:
        raise ValueError(f'level={level!r} is not one of {LEVELS}')
    if beyond not in BEYOND:
        raise ValueError(f'beyond={beyond!r} is not one of {BEYOND}')
    d = masked.zeroed(logprobs, mask) - masked.zeroed(behaviour_logprobs, mask)
    if level == 'sequence':
        d = d.sum(-1, keepdims=True)
    weights = jnp.exp(d)
    weights = jnp.minimum(weights, cap) if beyond == 'truncate' else jnp.where(weights > cap, 0.0, weights)
    return jax.lax.stop_gradient(weights)


def ppo(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, *, clip: float = 0.2,
        clip_high: float | None = None, weights: Array | None = None) -> Loss:
    """Clipped surrogate (arXiv 1707.06347, eq. 7; async RLHF §3.3), mean over all counted tokens of the batch:

        rho_t = pi(x_t) / pi_old(x_t)
        loss = mean_t w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - clip, 1 + clip))

    Args:
        logprobs, old_logprobs, mask: [B, K, L].
        advantages: [B, K, L], or [B, K, 1] to give all tokens of a response one.
        clip, clip_high: bounds of the ratio below and above 1; `clip_high` None: the same.
        weights: [B, K, L] or [B, K, 1], `importance_weights`, with `old_logprobs` of the policy that they lead to: of
            the sampler's, the ratio would count the same difference again. None: 1.

    The critic's part is `value_loss`; the paper adds 0.1 of it.

    Returns:
        Metrics `ratio`, `clip_fraction` (tokens whose gradient the clip stopped) and `old_kl`, k3 against
        `old_logprobs`.
    """
    losses, metrics = _clipped(logprobs, old_logprobs, advantages, mask, clip, clip_high)
    if weights is not None:
        losses = losses * weights
        metrics |= {'weight': masked.mean(jnp.broadcast_to(weights, mask.shape), mask)}
    return masked.mean(losses, mask), jax.lax.stop_gradient(metrics)


def value_loss(values: Array, old_values: Array, returns: Array, mask: Array, *, clip: float | None = 0.2) -> Loss:
    """Critic regression with clipped values (async RLHF §3.3):

        loss = 1/2 mean_t max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    Args:
        values, old_values, returns: [B, K, L]; `old_values` are those the advantages were made from.
        mask: [B, K, L], `kl.value_mask`.
        clip: None leaves the clipping out.

    Returns:
        Metrics `value`, `value_clip_fraction` and `explained_variance`.
    """
    values, old_values, returns = (masked.zeroed(x, mask) for x in (values, old_values, returns))
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    errors = jnp.square(values - returns)
    clipped = jnp.zeros_like(errors)
    if clip is not None:
        bounded = jnp.square(old_values + jnp.clip(values - old_values, -clip, clip) - returns)
        clipped = (bounded > errors).astype(jnp.float32)
        errors = jnp.maximum(errors, bounded)
    unexplained = masked.variance(returns - values, mask) / jnp.maximum(masked.variance(returns, mask), 1e-8)
    return 0.5 * masked.mean(errors, mask), jax.lax.stop_gradient({
        'value': masked.mean(values, mask), 'value_clip_fraction': masked.mean(clipped, mask),
        'explained_variance': 1 - unexplained})


def decoupled_ppo(logprobs: Array, proximal_logprobs: Array, behaviour_logprobs: Array, advantages: Array,
                  mask: Array, *, clip: float = 0.2, clip_high: float | None = None, cap: float = 2.0,
                  level: str = 'token', beyond: str = 'truncate') -> Loss:
    """PPO whose trust region is around a recent policy while its samples come from an older one (arXiv 2110.00641):

        loss = mean_t (pi_prox / pi_behaviour)_t max(-A_t rho_t, -A_t clip(rho_t)),    rho_t = pi / pi_prox

    Args:
        proximal_logprobs: [B, K, L], of the learner's weights before this batch's first step.
        behaviour_logprobs: [B, K, L], as the sampler returned them.
        cap, level, beyond: of the weights, as in `importance_weights`.

    With `proximal_logprobs = behaviour_logprobs` it is `ppo`.
    """
    weights = importance_weights(proximal_logprobs, behaviour_logprobs, mask, cap=cap, level=level, beyond=beyond)
    loss, metrics = ppo(logprobs, proximal_logprobs, advantages, mask, clip=clip, clip_high=clip_high, weights=weights)
    behaviour, proximal = masked.zeroed(behaviour_logprobs, mask), masked.zeroed(proximal_logprobs, mask)
    stale = masked.mean(estimate(behaviour, proximal, 'k3'), mask)
    return loss, metrics | jax.lax.stop_gradient({'behaviour_kl': stale})


def rloo(logprobs: Array, advantages: Array, mask: Array, *, weights: Array | None = None) -> Loss:
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740): `-mean_i w_i A_i sum_t log pi(x_t)`.

    Args:
        logprobs, mask: [B, K, L].
        advantages: [B, K], `advantages.leave_one_out` of rewards with their KL price (`kl.penalized_scores`).
        weights: [B, K] or [B, K, 1], `importance_weights(level='sequence')`; None: 1.

    Returns:
        Metrics `advantage_std` and `sequence_logprob`.
    """
    s = sequence_logprobs(logprobs, mask)
    advantages = jax.lax.stop_gradient(advantages)
    scale = advantages if weights is None else advantages * weights.reshape(advantages.shape)
    return -(scale * s).mean(), jax.lax.stop_gradient({'advantage_std': advantages.std(), 'sequence_logprob': s.mean()})


def proximal_rloo(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, *, clip: float = 0.2,
                  clip_high: float | None = None) -> Loss:
    """RLOO with PPO's clipping on the ratio of whole sequences (async RLHF §3.2):

        rho_i = exp(sum_t log pi - sum_t log pi_old)
        loss = mean_i max(-A_i rho_i, -A_i clip(rho_i, 1 - clip, 1 + clip))

    Args:
        logprobs, old_logprobs, mask: [B, K, L]; `old_logprobs` as the sampler returned them, so that the ratio sees
            staleness.
        advantages: [B, K], `advantages.leave_one_out`; not normalised.
        clip, clip_high: as in `ppo`.

    Returns:
        Metrics `ratio`, `clip_fraction` and `old_kl`, over sequences.
    """
    new, old = sequence_logprobs(logprobs, mask), sequence_logprobs(old_logprobs, mask)
    losses, metrics = _clipped(new, old, advantages, jnp.ones(new.shape, bool), clip, clip_high)
    return losses.mean(), jax.lax.stop_gradient(metrics)


def grpo(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, *, ref_logprobs: Array | None = None,
         beta: float | Array = 0.0, clip: float = 0.2, clip_high: float | None = None, weights: Array | None = None,
         mean_over: str = 'sequence') -> Loss:
    """Group relative policy optimisation (arXiv 2402.03300, eq. 3):

        loss = mean_i mean_t [ w_t max(-A_i rho_t, -A_i clip(rho_t)) + beta k3(pi || ref)_t ]

    KL has its price here and not in the rewards, as in the paper: taken off a reward, it would be divided by the
    deviation of its group, and a group of equal rewards would be trained on differences of its KL alone.

    Args:
        logprobs, old_logprobs, mask: [B, K, L].
        advantages: [B, K], `advantages.group_normalized`.
        ref_logprobs: [B, K, L], needed if `beta` is not 0.
        beta: price of KL; an array broadcasts against [B, K, L].
        clip, clip_high, weights: as in `ppo`.
        mean_over: 'sequence' gives every response one vote, as published; 'token' every token (arXiv 2503.14476, §3.3).

    Returns:
        The metrics of `ppo`, and `ref_kl` where a reference is given.

    Raises:
        ValueError: another `mean_over`, or `beta` without a reference.
    """
    if mean_over not in MEANS:
        raise ValueError(f'mean_over={mean_over!r} is not one of {MEANS}')
    if ref_logprobs is None and not (isinstance(beta, (int, float)) and beta == 0):
        raise ValueError(f'beta={beta} needs ref_logprobs')
    losses, metrics = _clipped(logprobs, old_logprobs, advantages[..., None], mask, clip, clip_high)
    if weights is not None:
        losses = losses * weights
        metrics |= {'weight': masked.mean(jnp.broadcast_to(weights, mask.shape), mask)}
    if ref_logprobs is not None:
        ref_kl = estimate(masked.zeroed(logprobs, mask),
                          jax.lax.stop_gradient(masked.zeroed(ref_logprobs, mask)), 'k3')
        metrics |= {'ref_kl': masked.mean(ref_kl, mask)}
        losses = losses + beta * ref_kl
    loss = masked.mean(losses, mask) if mean_over == 'token' else masked.mean(losses, mask, -1).mean()
    return loss, jax.lax.stop_gradient(metrics)


def _clipped(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float,
             clip_high: float | None) -> tuple[Array, dict[str, Array]]:
    """The clipped surrogate entry by entry, not yet averaged, and its metrics."""
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    if not 0 <= low <= 1 <= high:
        raise ValueError(f'clip={clip} must be in [0, 1], and clip_high={clip_high} not negative')
    new, old = masked.zeroed(logprobs, mask), jax.lax.stop_gradient(masked.zeroed(old_logprobs, mask))
    advantages = jax.lax.stop_gradient(masked.zeroed(jnp.broadcast_to(advantages, mask.shape), mask))
    ratio = jnp.exp(new - old)
    free, bounded = -advantages * ratio, -advantages * jnp.clip(ratio, low, high)
    return jnp.maximum(free, bounded), {
        'ratio': masked.mean(ratio, mask), 'clip_fraction': masked.mean((bounded > free).astype(jnp.float32), mask),
        'old_kl': masked.mean(estimate(old, new, 'k3'), mask)}

"""Losses on pairs and picks among the completions of a prompt: DPO, Online DPO, Best-of-N."""
import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.logprobs import sequence_logprobs
from rlhf_jax.responses import pick

Array = jax.Array
Loss = tuple[Array, dict[str, Array]]

LOSS_TYPES = ('sigmoid', 'ipo')
TIES = ('drop', 'order', 'same')


def dpo(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float = 0.1,
        loss_type: str = 'sigmoid', weights: Array | None = None) -> Loss:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7) and IPO (arXiv 2310.12036, eq. 17).

        h = (log pi(c) - log pi(r)) - (log ref(c) - log ref(r))
        sigmoid:  -log sigmoid(beta h)          ipo:  (h - 1 / (2 beta))^2

    Args:
        chosen, rejected: [B], log-probabilities of whole responses under the policy (`sequence_logprobs`), not divided
            by their length.
        ref_chosen, ref_rejected: [B], the same under the reference.
        beta: price of divergence from the reference.
        weights: [B], pairs where it is 0 do not count. The mean is over those that do; 0 if none does.

    Returns:
        Metrics `chosen`, `rejected`: mean implicit rewards `beta (log pi - log ref)`; `margin`, their difference;
        `accuracy`, share of pairs with a positive one; `pairs`, how many counted.

    Raises:
        ValueError: another `loss_type`, or `beta` not positive.
    """
    if not beta > 0:
        raise ValueError(f'beta={beta} must be positive')
    weights = jnp.ones(chosen.shape, bool) if weights is None else weights > 0
    chosen, rejected, ref_chosen, ref_rejected = (
        masked.zeroed(x, weights) for x in (chosen, rejected, ref_chosen, ref_rejected))
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    h = (chosen - rejected) - (ref_chosen - ref_rejected)
    if loss_type == 'sigmoid':
        losses = -jax.nn.log_sigmoid(beta * h)
    elif loss_type == 'ipo':
        losses = jnp.square(h - 1 / (2 * beta))
    else:
        raise ValueError(f'loss_type={loss_type!r} is not one of {LOSS_TYPES}')
    return masked.mean(losses, weights), jax.lax.stop_gradient({
        'chosen': masked.mean(beta * (chosen - ref_chosen), weights),
        'rejected': masked.mean(beta * (rejected - ref_rejected), weights),
        'margin': masked.mean(beta * h, weights), 'accuracy': masked.mean((h > 0).astype(jnp.float32), weights),
        'pairs': weights.sum().astype(jnp.float32)})


def best_worst(rewards: Array, *, ties: str = 'drop') -> tuple[Array, Array, Array]:
    """The best and the worst completion of each prompt.

    Args:
        rewards: [B, K], K >= 2; the first of several equal ones is taken. With K > 2 only the extremes are used. One
            that is not finite is missing, and its completion is not chosen.
        ties: what becomes of a prompt whose completions all have one reward (common: none of them ended, and all got
            the same penalty). 'drop' does not count it; 'order' makes the first the chosen and the second the rejected;
            'same' takes one completion for both, which has no gradient but counts in the mean. The last two are the
            published trainers' habits, with generation in the training library and with vLLM.

    Returns:
        `(chosen, rejected, counts)`: int32 [B] and [B], which of the K completions, and bool [B], whether the pair
        counts; a group with fewer than two rewards has none.

    Raises:
        ValueError: K < 2, or another `ties`.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f'rewards have shape {rewards.shape}, expected [prompts, completions]: a pair needs at least '
                         '2 completions of a prompt')
    if ties not in TIES:
        raise ValueError(f'ties={ties!r} is not one of {TIES}')
    given = jnp.isfinite(rewards)
    best = jnp.argmax(jnp.where(given, rewards, -jnp.inf), 1)
    worst = jnp.argmin(jnp.where(given, rewards, jnp.inf), 1)
    tied = _gap(rewards) == 0
    counts = given.sum(1) > 1
    if ties == 'drop':
        counts &= ~tied
    if ties != 'same':
        second = jnp.argmax(given & (jnp.arange(rewards.shape[1]) != best[:, None]), 1)
        worst = jnp.where(tied, second, worst)
    return best.astype(jnp.int32), worst.astype(jnp.int32), counts


def _gap(rewards: Array) -> Array:
    """Best minus worst of the finite rewards [B, K]: [B], -inf where there is none."""
    given = jnp.isfinite(rewards)
    return jnp.where(given, rewards, -jnp.inf).max(1) - jnp.where(given, rewards, jnp.inf).min(1)


def online_dpo(logprobs: Array, ref_logprobs: Array, mask: Array, rewards: Array, *, beta: float = 0.1,
               loss_type: str = 'sigmoid', ties: str = 'drop') -> Loss:
    """DPO on the best and worst of K fresh completions (arXiv 2402.04792; async RLHF §3.1).

    There is no correction for stale samples: a pair is a pair, whoever wrote it.

    Args:
        logprobs, ref_logprobs: [B, K, L] of the sampled tokens under policy and reference (`token_logprobs`).
        mask: [B, K, L].
        rewards: [B, K], K >= 2; those that are not finite are missing.
        beta, loss_type: as in `dpo`.
        ties: as in `best_worst`.

    With K > 2 most completions end up unused: to spare their forward passes, pick the pairs with `best_worst` and
    `responses.pick` first and call `dpo`.

    Returns:
        The metrics of `dpo`, and those of `group_metrics`.
    """
    chosen, rejected, counts = best_worst(rewards, ties=ties)
    pair = jnp.stack([chosen, rejected], 1)
    s, ref = (pick(sequence_logprobs(x, mask), pair) for x in (logprobs, ref_logprobs))
    loss, metrics = dpo(s[:, 0], s[:, 1], ref[:, 0], ref[:, 1], beta=beta, loss_type=loss_type, weights=counts)
    return loss, metrics | jax.lax.stop_gradient(group_metrics(rewards))


def group_metrics(rewards: Array) -> dict[str, Array]:
    """Measures of rewards [B, K] that pairs are made of.

    Returns:
        `reward`, mean of those that are finite; `missing_rewards`, share of the others; `tied`, share of prompts whose
        rewards all agree, and `reward_gap`, mean of best minus worst, both of prompts with two rewards at least.
    """
    rewards = rewards.astype(jnp.float32)
    given = jnp.isfinite(rewards)
    gap, paired = _gap(rewards), given.sum(1) > 1
    return {'reward': masked.mean(rewards, given), 'missing_rewards': 1 - given.mean(dtype=jnp.float32),
            'tied': masked.mean((gap == 0).astype(jnp.float32), paired), 'reward_gap': masked.mean(gap, paired)}


def best_of_n(logprobs: Array, mask: Array, rewards: Array) -> Loss:
    """Fine-tuning on the best of K completions (async RLHF §3.4): `-mean_b sum_t log pi(best_b)_t`.

    No reference and no KL; sums are not divided by length; of equal rewards the first wins.

    Args:
        logprobs, mask: [B, K, L].
        rewards: [B, K]; K = 1 is plain fine-tuning on samples. One that is not finite is missing and cannot be the
            best; a prompt without any does not count.

    Returns:
        Metrics `reward` (of all) and `best_reward`.
    """
    rewards = rewards.astype(jnp.float32)
    given = jnp.isfinite(rewards)
    counts, ranked = given.any(1), jnp.where(given, rewards, -jnp.inf)
    best = pick(sequence_logprobs(logprobs, mask), jnp.argmax(ranked, 1)[:, None])[:, 0]
    return -masked.mean(best, counts), jax.lax.stop_gradient({
        'reward': masked.mean(rewards, given), 'best_reward': masked.mean(ranked.max(1), counts)})

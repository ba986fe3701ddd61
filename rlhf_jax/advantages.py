"""Advantages: generalised advantage estimation for a critic, leave-one-out and group baselines without one."""
import jax
import jax.numpy as jnp

from rlhf_jax import masked

Array = jax.Array


def gae(rewards: Array, values: Array, *, gamma: float = 1.0, lam: float = 0.95, last_value: Array | float = 0.0,
        continues: Array | None = None) -> tuple[Array, Array]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma c_t V_{t+1} - V_t        A_t = delta_t + gamma lam c_t A_{t+1}

    Args:
        rewards, values: [..., T]; for responses, zero past their end.
        last_value: [...], V_T of the state after the last step.
        continues: [..., T], c_t: 0 where an episode ends after step t (rollouts that hold several). None: all 1.

    Returns:
        `(advantages, returns)`, both [..., T]; `returns = advantages + values` are the critic's targets.
    """
    values = jnp.asarray(values, jnp.promote_types(values.dtype, jnp.float32))
    rewards = jnp.asarray(rewards, values.dtype)
    last = jnp.broadcast_to(jnp.asarray(last_value, values.dtype), values.shape[:-1])
    following = jnp.concatenate([values[..., 1:], last[..., None]], -1)
    c = jnp.ones_like(values) if continues is None else jnp.asarray(continues, values.dtype)
    deltas = rewards + gamma * c * following - values

    def back(advantage, at):
        delta, c = at
        advantage = delta + gamma * lam * c * advantage
        return advantage, advantage

    steps_first = jnp.moveaxis(deltas, -1, 0), jnp.moveaxis(c, -1, 0)
    _, advantages = jax.lax.scan(back, jnp.zeros_like(last), steps_first, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, advantages + values


def whiten(advantages: Array, mask: Array) -> Array:
    """Zero mean and unit variance over every counted token of the batch, 0 elsewhere: [..., L] -> [..., L].

    Over the whole batch. Whitening a single sequence by itself would take out the sign of its reward.
    """
    return jnp.where(mask > 0, masked.whiten(advantages, mask), 0)


def leave_one_out(rewards: Array) -> Array:
    """RLOO (arXiv 2402.14740): each reward minus the mean of the other completions of its prompt.

    Args:
        rewards: [B, K], K >= 2. One that is not finite is missing: the others are compared with each other, and its own
            advantage is 0, as is that of a reward that is alone.

    Returns:
        [B, K] float32.

    Raises:
        ValueError: K < 2.
    """
    rewards, given, others = _groups(rewards, 'a leave-one-out baseline')
    baseline = (rewards.sum(1, keepdims=True) - rewards) / jnp.maximum(others, 1)
    return jnp.where(given & (others > 0), rewards - baseline, 0.0)


def group_normalized(rewards: Array, *, scale: bool = True, eps: float = 1e-7) -> Array:
    """GRPO (arXiv 2402.03300, §4.1.2): `(r - mean) / (std + eps)` over the completions of each prompt.

    The standard deviation is the unbiased one. A group whose rewards all agree gets zeros. KL belongs into the loss
    (`losses.grpo`) and not into these rewards: divided by their deviation, it alone would decide in such a group.

    Args:
        rewards: [B, K], K >= 2. One that is not finite is missing: mean and deviation are of the others, and its own
            advantage is 0.
        scale: False leaves the standard deviation out.

    Returns:
        [B, K] float32.

    Raises:
        ValueError: K < 2.
    """
    rewards, given, others = _groups(rewards, 'a group')
    centered = jnp.where(given, rewards - rewards.sum(1, keepdims=True) / jnp.maximum(others + 1, 1), 0.0)
    # Rounding of the mean alone would leave a tied group with a spurious sign.
    highest = jnp.where(given, rewards, -jnp.inf).max(1, keepdims=True)
    lowest = jnp.where(given, rewards, jnp.inf).min(1, keepdims=True)
    centered = jnp.where(highest <= lowest, 0.0, centered)
    if scale:
        variance = (centered * centered).sum(1, keepdims=True) / jnp.maximum(others, 1)
        centered = centered / (jnp.sqrt(variance) + eps)
    return centered


def _groups(rewards: Array, what: str) -> tuple[Array, Array, Array]:
    """Rewards [B, K] in at least float32 with 0 for missing ones, which are given, and how many others are: [B, 1].

    A ValueError says why `what` cannot be made of other shapes.
    """
    rewards = jnp.asarray(rewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f'rewards have shape {rewards.shape}, expected [prompts, completions]: {what} needs at least '
                         '2 completions of a prompt')
    rewards = rewards.astype(jnp.promote_types(rewards.dtype, jnp.float32))
    given = jnp.isfinite(rewards)
    return jnp.where(given, rewards, 0.0), given, given.sum(1, keepdims=True) - 1

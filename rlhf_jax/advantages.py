"""Advantages: generalised advantage estimation for a critic, leave-one-out and group baselines without one."""
import jax
import jax.numpy as jnp

from rlhf_jax import masked
from rlhf_jax.responses import by_prompt

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
    """Zero mean and unit variance over every counted token of the batch, 0 elsewhere: [N, L] -> [N, L].

    Over the whole batch. Whitening a single sequence by itself would take out the sign of its reward.
    """
    return jnp.where(mask > 0, masked.whiten(advantages, mask), 0)


def leave_one_out(rewards: Array, num_samples: int) -> Array:
    """RLOO (arXiv 2402.14740): each reward minus the mean of the other completions of its prompt.

    Args:
        rewards: [K * B], K-major.
        num_samples: K >= 2.

    Raises:
        ValueError: K < 2, or rows that are no multiple of K.
    """
    if num_samples < 2:
        raise ValueError(f'num_samples={num_samples}: a leave-one-out baseline needs at least 2')
    r = by_prompt(_float(rewards), num_samples)
    return (r - (r.sum(0) - r) / (num_samples - 1)).reshape(-1)


def group_normalized(rewards: Array, num_samples: int, *, scale: bool = True, eps: float = 1e-7) -> Array:
    """GRPO (arXiv 2402.03300, §4.1.2): `(r - mean) / (std + eps)` over the completions of each prompt.

    The standard deviation is the unbiased one. A group whose rewards all agree gets zeros.

    Args:
        rewards: [K * B], K-major.
        num_samples: K >= 2.
        scale: False leaves the standard deviation out.

    Raises:
        ValueError: K < 2, or rows that are no multiple of K.
    """
    if num_samples < 2:
        raise ValueError(f'num_samples={num_samples}: a group needs at least 2 completions of a prompt')
    r = by_prompt(_float(rewards), num_samples)
    centered = r - r.mean(0)
    # Rounding of the mean alone would leave a tied group with a spurious sign.
    centered = jnp.where((r == r[0]).all(0), 0.0, centered)
    if scale:
        centered = centered / (jnp.sqrt((centered * centered).sum(0) / (num_samples - 1)) + eps)
    return centered.reshape(-1)


def _float(x: Array) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

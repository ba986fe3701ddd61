"""Divergence from a reference policy: estimators, its price in the reward, and controllers of that price."""
import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import masked

Array = jax.Array

ESTIMATORS = ('k1', 'k2', 'k3')


def estimate(logprobs: Array, ref_logprobs: Array, kind: str = 'k1') -> Array:
    """KL(policy || reference) at each token sampled from the policy, `d = logprobs - ref_logprobs`: [...] -> [...].

        k1 = d                      unbiased, of either sign
        k2 = d^2 / 2                biased, never negative
        k3 = exp(-d) - 1 + d        unbiased, never negative

    After http://joschu.net/blog/kl-approx.html.

    Raises:
        ValueError: another `kind`.
    """
    d = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if kind == 'k1':
        return d
    if kind == 'k2':
        return 0.5 * d * d
    if kind == 'k3':
        return jnp.expm1(-d) + d
    raise ValueError(f'kl.kind={kind!r} is not one of {ESTIMATORS}')


def sequence_kl(logprobs: Array, ref_logprobs: Array, mask: Array, kind: str = 'k1') -> Array:
    """Sum of `estimate` over each response: [..., L] -> [...], in nats."""
    return masked.total(estimate(masked.zeroed(logprobs, mask), masked.zeroed(ref_logprobs, mask), kind), mask, -1)


def token_rewards(scores: Array, kl: Array, mask: Array, coefficient: float | Array, *,
                  after_eos: bool = False) -> Array:
    """Rewards of each token for PPO: `-coefficient * kl_t`, plus the response's score at its end.

    Args:
        scores: [...], one a response.
        kl: [..., L] per token.
        mask: [..., L].
        coefficient: beta.
        after_eos: put the score one position past EOS where there is one, as the published PPO runs did (and count
            values up to that position too, `value_mask`); by default it stands at the last token.

    Returns:
        [..., L] float32.
    """
    num_tokens = mask.shape[-1]
    length = (mask > 0).sum(-1)
    end = jnp.minimum(length, num_tokens - 1) if after_eos else length - 1
    at_end = jnp.arange(num_tokens) == end[..., None]
    return masked.zeroed(-coefficient * kl, mask) + jnp.where(at_end, scores[..., None].astype(jnp.float32), 0.0)


def value_mask(mask: Array, *, after_eos: bool = False) -> Array:
    """Positions whose values count: those of `mask`, and with `after_eos` the one that follows. bool [..., L]."""
    mask = mask > 0
    if not after_eos:
        return mask
    return mask | (jnp.arange(mask.shape[-1]) == mask.sum(-1)[..., None])


def penalized_scores(scores: Array, kl: Array, mask: Array, coefficient: float | Array) -> Array:
    """One reward for each response, `score - coefficient * sum_t kl_t`: [...], [..., L] -> [...]."""
    return scores.astype(jnp.float32) - coefficient * masked.total(kl, mask, -1)


@dataclasses.dataclass(frozen=True)
class FixedController:
    """A coefficient that stays what it is."""

    def update(self, coefficient: Array | float, kl: Array | float) -> Array | float:
        return coefficient


@dataclasses.dataclass(frozen=True)
class AdaptiveController:
    """Proportional control towards a target KL (arXiv 1909.08593):

        beta <- beta (1 + rate * clip(kl / target - 1, -clip, clip))

    A KL that stays far below `target` makes it a pure decay, whatever the policy does.

    Attributes:
        target: in the unit of the `kl` it is fed, nats a token or nats a sequence.
        rate: TRL's is batch size / horizon (10000); RL4LMs' is 0.1.
        clip: bound on the relative error.
    """
    target: float
    rate: float
    clip: float = 0.2

    def __post_init__(self):
        if not self.target > 0:
            raise ValueError(f'kl.target={self.target} must be positive')
        if not self.rate >= 0 or not self.clip >= 0:
            raise ValueError(f'kl.rate={self.rate} and kl.clip={self.clip} must not be negative')

    def update(self, coefficient: Array | float, kl: Array | float) -> Array | float:
        """The next coefficient, after the mean `kl` of an iteration."""
        return coefficient * (1 + self.rate * jnp.clip(kl / self.target - 1, -self.clip, self.clip))


def rl4lms_controller(target: float) -> AdaptiveController:
    """Per-token KL in nats, once an iteration (Elastic Reset's IMDB runs)."""
    return AdaptiveController(target=target, rate=0.1)


def trl_controller(batch_size: int, target: float = 6.0, horizon: int = 10000) -> AdaptiveController:
    """Per-sequence KL in nats, once a batch of `batch_size` sequences over all processes (its StackLLaMA runs)."""
    return AdaptiveController(target=target, rate=batch_size / horizon)

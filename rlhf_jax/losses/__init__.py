"""Training losses of language models: arrays in, `(loss, metrics)` out.

`loss` is a float32 scalar to differentiate; `metrics` are float32 scalars that carry no gradient. Shapes and the
meaning of `mask`, `logprobs` and `rewards` are those of `rlhf_jax`. Nothing here knows a model: log-probabilities come
from `rlhf_jax.logprobs`, advantages from `rlhf_jax.advantages`.
"""
from rlhf_jax.losses.policy_gradient import (
    decoupled_ppo,
    grpo,
    importance_weights,
    ppo,
    proximal_rloo,
    rloo,
    value_loss,
)
from rlhf_jax.losses.preference import best_of_n, best_worst, dpo, group_metrics, online_dpo
from rlhf_jax.losses.ranking import hardest_negatives
from rlhf_jax.losses.supervised import reward_model, sft

__all__ = ['best_of_n', 'best_worst', 'decoupled_ppo', 'dpo', 'group_metrics', 'grpo', 'hardest_negatives',
           'importance_weights', 'online_dpo', 'ppo', 'proximal_rloo', 'reward_model', 'rloo', 'sft', 'value_loss']

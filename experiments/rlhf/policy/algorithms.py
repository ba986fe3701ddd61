"""What the policy algorithms make of a rollout batch: rows to train on, and the loss of some of them.

A batch and its rows have prompts on their leading axis and completions on the second, [B, K, ...], so that a part of
the rows always holds whole groups. `prepare` sees the whole batch once, before its first update: whatever a loss needs
from other completions (baselines, pairs, whitening) is a column of the rows then, and the loss of any part of them is
just a mean over that part. `weights` says how much each prompt counts in that mean, so that microbatches of unequal
content add up to the loss of all (but for PPO's critic with `after_eos`, which counts a position more in some rows).
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.runtime import launch
from rlhf_jax import advantages as advantages_lib
from rlhf_jax import kl as kl_lib
from rlhf_jax import losses, masked
from rlhf_jax.logprobs import sequence_logprobs

Array = jax.Array
Rows = dict[str, Array]
Metrics = dict[str, Array]


class Scorers(NamedTuple):
    """Functions of rows [B, C, ...] without gradient: log-probabilities of the responses [B, C, L] under the reference
    and under the learner's weights as they are before the batch, and values [B, C, L]."""
    reference: Callable[[Rows], Array]
    policy: Callable[[Rows], Array]
    values: Callable[[Rows], Array]


class Algorithm(NamedTuple):
    """prepare: (settings, batch, scorers, KL coefficient) -> (rows, metrics). loss: (settings, logprobs [b, C, L],
    values [b, C, L] or None, rows) -> (loss, metrics). weights: (settings, rows) -> [B]."""
    prepare: Callable[[Any, Rows, Scorers, Array], tuple[Rows, Metrics]]
    loss: Callable[[Any, Array, Array | None, Rows], tuple[Array, Metrics]]
    weights: Callable[[Any, Rows], Array]
    critic: bool = False
    least_samples: int = 2


TEXT = ('tokens', 'prompt_mask', 'mask')  # what a forward pass reads


# ---- Axes ------------------------------------------------------------------------------------------------------------

def k_major(x: Array) -> Array:
    """[B, K, ...] -> [K B, ...], the order of `rlhf_jax`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def by_prompt(x: Array, num_samples: int) -> Array:
    """Inverse of `k_major`."""
    return x.reshape(num_samples, -1, *x.shape[1:]).swapaxes(0, 1)


def flat(x: Array) -> Array:
    """[b, C, ...] -> [b C, ...], where the order does not matter."""
    return x.reshape(-1, *x.shape[2:])


def pick(x: Array, index: Array) -> Array:
    """Of [B, K, ...] the completions `index` [B, C] -> [B, C, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)


def count_tokens(_, rows: Rows) -> Array:
    return rows['mask'].sum((1, 2)).astype(jnp.float32)


def count_prompts(_, rows: Rows) -> Array:
    return jnp.ones(rows['mask'].shape[0], jnp.float32)


# ---- KL --------------------------------------------------------------------------------------------------------------

def drift(settings: Any, batch: Rows, ref: Array) -> tuple[Array, Metrics]:
    """KL of each token under its estimator, [B, K, L], and its measures: nats a response and a token, by k1."""
    total = kl_lib.sequence_kl(flat(batch['logprobs']), flat(ref), flat(batch['mask']))
    kl = kl_lib.estimate(masked.zeroed(batch['logprobs'], batch['mask']), masked.zeroed(ref, batch['mask']),
                         settings.kl_estimator)
    return kl, {'kl': total.mean(), 'kl_per_token': total.sum() / jnp.maximum(batch['mask'].sum(), 1)}


# ---- Online DPO, Best-of-N -------------------------------------------------------------------------------------------

def _prepare_dpo(settings, batch, scorers, _):
    num_samples = settings.num_samples
    best, worst, counts = losses.best_worst(k_major(batch['rewards']), num_samples, ties=settings.ties)
    index = jnp.stack([best, worst], 1) // batch['rewards'].shape[0]  # rows of a K-major batch -> completions
    rows = {name: pick(batch[name], index) for name in (*TEXT, 'logprobs')}
    ref = scorers.reference(rows)
    _, metrics = drift(settings, rows, ref)
    gap = batch['rewards'].max(1) - batch['rewards'].min(1)
    rows |= {'ref': sequence_logprobs(ref, rows['mask']), 'counts': counts}
    return rows, metrics | {'tied': (gap == 0).mean(dtype=jnp.float32), 'reward_gap': gap.mean()}


def _dpo(settings, logprobs, _, rows):
    s = sequence_logprobs(logprobs, rows['mask'])
    return losses.dpo(s[:, 0], s[:, 1], rows['ref'][:, 0], rows['ref'][:, 1], beta=settings.beta,
                      loss_type=settings.loss_type, weights=rows['counts'])


def _prepare_best_of_n(settings, batch, scorers, _):
    _, metrics = drift(settings, batch, scorers.reference(batch))
    best = jnp.argmax(batch['rewards'], 1)[:, None]
    rows = {name: pick(batch[name], best) for name in (*TEXT, 'logprobs', 'rewards')}
    return rows, metrics | {'best_reward': batch['rewards'].max(1).mean()}


def _best_of_n(settings, logprobs, _, rows):
    loss, metrics = losses.best_of_n(flat(logprobs), flat(rows['mask']), flat(rows['rewards']), 1)
    return loss, {'nll': loss, 'best_logprob': -loss}


# ---- RLOO, GRPO ------------------------------------------------------------------------------------------------------

def _penalized(settings, batch, scorers, coefficient):
    """Rewards [K B] less the price of their KL, the reference's log-probabilities and metrics."""
    ref = scorers.reference(batch)
    kl, metrics = drift(settings, batch, ref)
    scores = kl_lib.penalized_scores(k_major(batch['rewards']), k_major(kl), k_major(batch['mask']), coefficient)
    return scores, ref, metrics


def _with_weights(settings, rows, scorers, level):
    """`rows` with importance weights for what stale samples differ by, where these are asked for."""
    if settings.correction in ('truncate', 'mask'):
        weights = losses.importance_weights(scorers.policy(rows), rows['logprobs'], rows['mask'],
                                            cap=settings.correction_cap, level=level, beyond=settings.correction)
        rows['weights'] = weights
    return rows


def _prepare_rloo(settings, batch, scorers, coefficient):
    scores, _, metrics = _penalized(settings, batch, scorers, coefficient)
    advantages = by_prompt(advantages_lib.leave_one_out(scores, settings.num_samples), settings.num_samples)
    rows = {name: batch[name] for name in (*TEXT, 'logprobs')} | {'advantages': advantages}
    return _with_weights(settings, rows, scorers, 'sequence'), metrics


def _rloo(settings, logprobs, _, rows):
    weights = flat(rows['weights']) if 'weights' in rows else None
    return losses.rloo(flat(logprobs), flat(rows['advantages']), flat(rows['mask']), weights=weights)


def _prepare_proximal_rloo(settings, batch, scorers, coefficient):
    scores, _, metrics = _penalized(settings, batch, scorers, coefficient)
    advantages = by_prompt(advantages_lib.leave_one_out(scores, settings.num_samples), settings.num_samples)
    return {name: batch[name] for name in (*TEXT, 'logprobs')} | {'advantages': advantages}, metrics


def _proximal_rloo(settings, logprobs, _, rows):
    return losses.proximal_rloo(flat(logprobs), flat(rows['logprobs']), flat(rows['advantages']), flat(rows['mask']),
                                clip=settings.clip)


def _prepare_grpo(settings, batch, scorers, coefficient):
    scores, ref, metrics = _penalized(settings, batch, scorers, coefficient)
    advantages = advantages_lib.group_normalized(scores, settings.num_samples, scale=settings.scale_rewards)
    rows = {name: batch[name] for name in (*TEXT, 'logprobs')}
    rows |= {'advantages': by_prompt(advantages, settings.num_samples), 'ref': ref}
    return _with_weights(settings, rows, scorers, 'token'), metrics


def _grpo(settings, logprobs, _, rows):
    return losses.grpo(flat(logprobs), flat(rows['logprobs']), flat(rows['advantages']), flat(rows['mask']),
                       ref_logprobs=flat(rows['ref']), beta=settings.ref_beta, clip=settings.clip,
                       clip_high=settings.clip_high or None, mean_over=settings.mean_over,
                       weights=flat(rows['weights']) if 'weights' in rows else None)


def _count_grpo(settings, rows):
    return count_tokens(settings, rows) if settings.mean_over == 'token' else count_prompts(settings, rows)


# ---- PPO -------------------------------------------------------------------------------------------------------------

def _prepare_ppo(settings, batch, scorers, coefficient):
    kl, metrics = drift(settings, batch, scorers.reference(batch))
    mask, scores = flat(batch['mask']), flat(batch['rewards'])
    values_mask = kl_lib.value_mask(mask, after_eos=settings.after_eos)
    values = masked.zeroed(flat(scorers.values(batch)), values_mask)
    rewards = kl_lib.token_rewards(scores, flat(kl), mask, coefficient, after_eos=settings.after_eos)
    advantages, returns = advantages_lib.gae(rewards, values, gamma=settings.gamma, lam=settings.lam)
    advantages = advantages_lib.whiten(advantages, mask) if settings.whiten else masked.zeroed(advantages, mask)
    columns = {'advantages': advantages, 'returns': returns, 'old_values': values, 'values_mask': values_mask}
    shape = batch['mask'].shape
    rows = {name: batch[name] for name in (*TEXT, 'logprobs')}
    rows |= {name: x.reshape(shape) for name, x in columns.items()}
    if settings.correction == 'decoupled':
        rows['proximal'] = scorers.policy(batch)
    return _with_weights(settings, rows, scorers, 'token'), metrics | {'return': masked.mean(returns, values_mask)}


def _ppo(settings, logprobs, values, rows):
    new, mask, advantages = flat(logprobs), flat(rows['mask']), flat(rows['advantages'])
    bounds = dict(clip=settings.clip, clip_high=settings.clip_high or None)
    if settings.correction == 'decoupled':
        loss, metrics = losses.decoupled_ppo(new, flat(rows['proximal']), flat(rows['logprobs']), advantages, mask,
                                             cap=settings.correction_cap, **bounds)
    else:
        weights = flat(rows['weights']) if 'weights' in rows else None
        loss, metrics = losses.ppo(new, flat(rows['logprobs']), advantages, mask, weights=weights, **bounds)
    critic, more = losses.value_loss(flat(values), flat(rows['old_values']), flat(rows['returns']),
                                     flat(rows['values_mask']), clip=settings.value_clip or None)
    return loss + settings.value_coefficient * critic, metrics | more | {'value_loss': critic}


ALGORITHMS: Mapping[str, Algorithm] = {
    'online_dpo': Algorithm(_prepare_dpo, _dpo, lambda _, rows: rows['counts'].astype(jnp.float32)),
    'best_of_n': Algorithm(_prepare_best_of_n, _best_of_n, count_prompts),
    'rloo': Algorithm(_prepare_rloo, _rloo, count_prompts),
    'proximal_rloo': Algorithm(_prepare_proximal_rloo, _proximal_rloo, count_prompts),
    'grpo': Algorithm(_prepare_grpo, _grpo, _count_grpo),
    'ppo': Algorithm(_prepare_ppo, _ppo, count_tokens, critic=True, least_samples=1),
}
# Which corrections of stale samples mean something to which algorithm. Pairs need none; Proximal RLOO's ratio is
# already taken against the sampler.
CORRECTIONS = {'ppo': ('none', 'truncate', 'mask', 'decoupled'), 'rloo': ('none', 'truncate', 'mask'),
               'grpo': ('none', 'truncate', 'mask')}


def get(settings: Any) -> Algorithm:
    """The algorithm that `config.algorithm` describes.

    Raises:
        ValueError: an unknown one, or settings that mean nothing to it.
    """
    launch.check_choice('algorithm.name', settings.name, ALGORITHMS)
    algorithm = ALGORITHMS[settings.name]
    if settings.num_samples < algorithm.least_samples:
        raise ValueError(f'algorithm.num_samples={settings.num_samples}: {settings.name} needs at least '
                         f'{algorithm.least_samples} completions of a prompt')
    allowed = CORRECTIONS.get(settings.name, ('none',))
    if settings.correction not in allowed:
        raise ValueError(f'algorithm.correction={settings.correction!r}: {settings.name} has {allowed}')
    for name, choices in (('ties', ('drop', 'order', 'same')), ('loss_type', ('sigmoid', 'ipo')),
                          ('kl_estimator', kl_lib.ESTIMATORS), ('kl_unit', ('token', 'sequence')),
                          ('critic', ('separate', 'shared')), ('mean_over', ('sequence', 'token'))):
        launch.check_choice(f'algorithm.{name}', settings[name], choices)
    for name, least in (('num_minibatches', 1), ('num_epochs', 1), ('kl_coefficient', 0), ('kl_target', 0),
                        ('value_coefficient', 0), ('value_clip', 0), ('clip_high', 0), ('ref_beta', 0),
                        ('correction_cap', 1e-9)):
        if settings[name] < least:
            raise ValueError(f'algorithm.{name}={settings[name]} must be at least {least}')
    for name in ('beta', 'clip'):
        if not settings[name] > 0:
            raise ValueError(f'algorithm.{name}={settings[name]} must be positive')
    for name in ('clip', 'gamma', 'lam'):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f'algorithm.{name}={settings[name]} must be at most 1 and not negative')
    if settings.critic_weights and not (algorithm.critic and settings.critic == 'separate'):
        raise ValueError(f'algorithm.critic_weights={settings.critic_weights}: ' + (
            f"algorithm.critic={settings.critic!r} has no network of its own" if algorithm.critic else
            f'{settings.name} has no critic') + '; leave it empty')
    return algorithm

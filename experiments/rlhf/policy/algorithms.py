"""What the policy algorithms make of a rollout batch: rows to train on, and the loss of some of them.

A batch is [B, K, ...]; its rows are [B, C, ...], the C completions of each prompt that are trained on; a part of the
rows is [b, C, ...]. Prompts lead, so that a part always holds whole groups. `prepare` sees the whole batch once, before
its first update: whatever a loss needs from other completions (baselines, pairs, whitening) is a column of the rows
then, and the loss of any part of them is just a mean over that part. `weights` says how much each prompt counts in that
mean, so that microbatches of unequal content add up to the loss of all (but for PPO's critic with `after_eos`, which
counts a position more in some rows).
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.rlhf.policy.kind import RATIOS, SEQUENCE_RATIOS, SUMS, VALUES
from experiments.rlhf.policy.models import TEXT
from experiments.runtime import checks
from rlhf_jax import advantages as advantages_lib
from rlhf_jax import kl as kl_lib
from rlhf_jax import losses, masked
from rlhf_jax.logprobs import sequence_logprobs
from rlhf_jax.responses import pick

Array = jax.Array
Rows = dict[str, Array]
Metrics = dict[str, Array]


class Scorers(NamedTuple):
    """Functions of rows [B, C, ...] without gradient, and what their numbers mean (`kind.Networks`).

    Attributes:
        reference, policy: log-probabilities [B, C, L] of the responses under the reference, and under the learner's
            weights as they are before the batch.
        values: [B, C, L].
        columns: fields that they read.
        as_drawn, scale: whether they compare with the log-probabilities as drawn; what sums are multiplied by.
    """
    reference: Callable[[Rows], Array]
    policy: Callable[[Rows], Array]
    values: Callable[[Rows], Array]
    columns: tuple[str, ...] = TEXT
    as_drawn: bool = True
    scale: float = 1.0

    def sampled(self, rows: Rows) -> Array:
        """Log-probabilities [B, C, L] of the responses under the weights that drew them, comparable with `reference`;
        where only scores can be compared, under the learner's before the batch."""
        return rows['logprobs'] if self.as_drawn else self.policy(rows)

    def whole(self, total: Array) -> Array:
        """A sum over the counted tokens as an estimate of that over all tokens."""
        return total if self.scale == 1 else self.scale * total


class Algorithm(NamedTuple):
    """One way to learn from samples.

    Attributes:
        prepare: (settings, batch, scorers, KL coefficient) -> (rows, metrics).
        loss: (settings, scores [b, C, L], values [b, C, L] or None, rows) -> (loss, metrics).
        weights: (settings, rows) -> [B].
        use: what it does with the scores, of `kind.SUMS`, `RATIOS`, `SEQUENCE_RATIOS`.
        critic: whether it needs values.
        least_samples: completions a prompt.
    """
    prepare: Callable[[Any, Rows, Scorers, Array], tuple[Rows, Metrics]]
    loss: Callable[[Any, Array, Array | None, Rows], tuple[Array, Metrics]]
    weights: Callable[[Any, Rows], Array]
    use: str
    critic: bool = False
    least_samples: int = 2


def uses(algorithm: Algorithm, settings: Any) -> tuple[str, ...]:
    """All that `algorithm` with `settings` does with the scores of a policy; first what no setting of it can change."""
    of_sequences = settings.name == 'rloo' and settings.correction in ('truncate', 'mask')
    return (*((VALUES,) if algorithm.critic else ()), algorithm.use, *((SEQUENCE_RATIOS,) if of_sequences else ()))


def with_rewards(batch: Rows) -> Rows:
    """The batch with no token counting in a completion whose reward is missing (not finite): it is not trained on."""
    return batch | {'mask': batch['mask'] & jnp.isfinite(batch['rewards'])[..., None]}


def completions(scorers: Scorers, batch: Rows, *more: str, index: Array | None = None) -> Rows:
    """What a model reads of the completions, their `logprobs` as drawn, and columns named in `more`; of the completions
    `index` [B, C] only, if it is given."""
    rows = {name: batch[name] for name in (*scorers.columns, 'logprobs', *more) if name in batch}
    return rows if index is None else {name: pick(x, index) for name, x in rows.items()}


# ---- Weights of prompts ----------------------------------------------------------------------------------------------

def count_tokens(_, rows: Rows) -> Array:
    """How many tokens of each prompt's completions count: float32 [B]."""
    return rows['mask'].sum((1, 2)).astype(jnp.float32)


def count_prompts(_, rows: Rows) -> Array:
    """One for each prompt: float32 [B]."""
    return jnp.ones(rows['mask'].shape[0], jnp.float32)


# ---- KL --------------------------------------------------------------------------------------------------------------

def drift(settings: Any, scorers: Scorers, batch: Rows, ref: Array) -> tuple[Array, Metrics]:
    """KL of each token under its estimator, [B, K, L], and its measures: nats a response and a token, by k1."""
    logprobs, mask = scorers.sampled(batch), batch['mask']
    total = scorers.whole(kl_lib.sequence_kl(logprobs, ref, mask))
    mean = masked.mean(total, mask.any(-1))
    kl = kl_lib.estimate(masked.zeroed(logprobs, mask), masked.zeroed(ref, mask), settings.kl_estimator)
    return kl, {'kl': mean, 'kl_per_token': total.sum() / jnp.maximum(scorers.whole(mask.sum()), 1)}


# ---- Online DPO, Best-of-N -------------------------------------------------------------------------------------------

def _prepare_dpo(settings, batch, scorers, _):
    best, worst, counts = losses.best_worst(batch['rewards'], ties=settings.ties)
    pair = jnp.stack([best, worst], 1)
    ref = scorers.reference(batch)
    _, metrics = drift(settings, scorers, batch, ref)  # of all: the two chosen by reward are not the policy's average
    rows = completions(scorers, batch, index=pair)
    rows |= {'ref': sequence_logprobs(pick(ref, pair), rows['mask']), 'counts': counts}
    measures = losses.group_metrics(batch['rewards'])
    return rows, metrics | {name: measures[name] for name in ('tied', 'reward_gap')}


def _dpo(settings, logprobs, _, rows):
    chosen, rejected = sequence_logprobs(logprobs, rows['mask']).T
    ref_chosen, ref_rejected = rows['ref'].T
    return losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=settings.beta, loss_type=settings.loss_type,
                      weights=rows['counts'])


def _prepare_best_of_n(settings, batch, scorers, _):
    _, metrics = drift(settings, scorers, batch, scorers.reference(batch))
    given = jnp.isfinite(batch['rewards'])
    ranked = jnp.where(given, batch['rewards'], -jnp.inf)
    rows = completions(scorers, batch, 'rewards', index=jnp.argmax(ranked, 1)[:, None])
    return rows, metrics | {'best_reward': masked.mean(ranked.max(1), given.any(1))}


def _best_of_n(settings, logprobs, _, rows):
    loss, metrics = losses.best_of_n(logprobs, rows['mask'], rows['rewards'])
    return loss, {'nll': loss, 'best_logprob': -loss}


def _count_best_of_n(_, rows):
    return jnp.isfinite(rows['rewards'][:, 0]).astype(jnp.float32)


# ---- Stale samples under ratios of tokens ----------------------------------------------------------------------------

def _with_proximal(settings, rows, scorers):
    """`rows` with the log-probabilities around which ratios are clipped where stale samples are corrected: those of
    the learner before the batch. Weights carry what it differs by from the sampler, and ratios only what is learnt
    from there on; ratios to the sampler beside such weights would count the difference twice."""
    return rows if settings.correction == 'none' else rows | {'proximal': scorers.policy(rows)}


def _bounds(settings):
    """How the weights of a correction are bounded; PPO's decoupled form cuts them down."""
    return dict(cap=settings.correction_cap, beyond='mask' if settings.correction == 'mask' else 'truncate')


def _correction(settings, rows):
    """Importance weights of the tokens of `rows`, None without a correction."""
    if 'proximal' not in rows:
        return None
    return losses.importance_weights(rows['proximal'], rows['logprobs'], rows['mask'], **_bounds(settings))


# ---- RLOO, GRPO ------------------------------------------------------------------------------------------------------

def _left_out(settings, batch, scorers, coefficient):
    """Rows with advantages over the other completions, of rewards less the price of their KL; and metrics."""
    kl, metrics = drift(settings, scorers, batch, scorers.reference(batch))
    scores = kl_lib.penalized_scores(batch['rewards'], scorers.whole(kl), batch['mask'], coefficient)
    # The loss multiplies them with a sum over counted tokens.
    advantages = scorers.whole(advantages_lib.leave_one_out(scores))
    return completions(scorers, batch) | {'advantages': advantages}, metrics


def _prepare_rloo(settings, batch, scorers, coefficient):
    rows, metrics = _left_out(settings, batch, scorers, coefficient)
    if settings.correction != 'none':
        rows['weights'] = losses.importance_weights(
            scorers.policy(rows), rows['logprobs'], rows['mask'], level='sequence', **_bounds(settings))
    return rows, metrics


def _rloo(settings, logprobs, _, rows):
    return losses.rloo(logprobs, rows['advantages'], rows['mask'], weights=rows.get('weights'))


def _proximal_rloo(settings, logprobs, _, rows):
    return losses.proximal_rloo(logprobs, rows['logprobs'], rows['advantages'], rows['mask'], clip=settings.clip,
                                clip_high=settings.clip_high or None)


def _prepare_grpo(settings, batch, scorers, coefficient):
    """KL is priced in the loss: see `losses.grpo`."""
    ref = scorers.reference(batch)
    _, metrics = drift(settings, scorers, batch, ref)
    rows = completions(scorers, batch) | {
        'advantages': advantages_lib.group_normalized(batch['rewards'], scale=settings.scale_rewards), 'ref': ref,
        'kl_coefficient': jnp.full((len(ref), 1, 1), coefficient)}
    return _with_proximal(settings, rows, scorers), metrics


def _grpo(settings, logprobs, _, rows):
    return losses.grpo(logprobs, rows.get('proximal', rows['logprobs']), rows['advantages'], rows['mask'],
                       ref_logprobs=rows['ref'], beta=rows['kl_coefficient'], clip=settings.clip,
                       clip_high=settings.clip_high or None, mean_over=settings.mean_over,
                       weights=_correction(settings, rows))


def _count_grpo(settings, rows):
    return count_tokens(settings, rows) if settings.mean_over == 'token' else count_prompts(settings, rows)


# ---- PPO -------------------------------------------------------------------------------------------------------------

def _prepare_ppo(settings, batch, scorers, coefficient):
    kl, metrics = drift(settings, scorers, batch, scorers.reference(batch))
    mask, given = batch['mask'], jnp.isfinite(batch['rewards'])
    values_mask = kl_lib.value_mask(mask, after_eos=settings.after_eos) & given[..., None]
    values = masked.zeroed(scorers.values(batch), values_mask)
    rewards = kl_lib.token_rewards(masked.zeroed(batch['rewards'], given), kl, mask, coefficient,
                                   after_eos=settings.after_eos)
    advantages, returns = advantages_lib.gae(rewards, values, gamma=settings.gamma, lam=settings.lam)
    advantages = advantages_lib.whiten(advantages, mask) if settings.whiten else masked.zeroed(advantages, mask)
    rows = completions(scorers, batch) | {'advantages': advantages, 'returns': returns, 'old_values': values,
                           'values_mask': values_mask}
    return _with_proximal(settings, rows, scorers), metrics | {'return': masked.mean(returns, values_mask)}


def _ppo(settings, logprobs, values, rows):
    mask, advantages = rows['mask'], rows['advantages']
    clips = dict(clip=settings.clip, clip_high=settings.clip_high or None)
    if settings.correction == 'none':
        loss, metrics = losses.ppo(logprobs, rows['logprobs'], advantages, mask, **clips)
    else:
        loss, metrics = losses.decoupled_ppo(logprobs, rows['proximal'], rows['logprobs'], advantages, mask,
                                             **clips, **_bounds(settings))
    critic, more = losses.value_loss(values, rows['old_values'], rows['returns'], rows['values_mask'],
                                     clip=settings.value_clip or None)
    return loss + settings.value_coefficient * critic, metrics | more | {'value_loss': critic}


ALGORITHMS: Mapping[str, Algorithm] = {
    'online_dpo': Algorithm(_prepare_dpo, _dpo, lambda _, rows: rows['counts'].astype(jnp.float32), SUMS),
    'best_of_n': Algorithm(_prepare_best_of_n, _best_of_n, _count_best_of_n, SUMS),
    'rloo': Algorithm(_prepare_rloo, _rloo, count_prompts, RATIOS),
    'proximal_rloo': Algorithm(_left_out, _proximal_rloo, count_prompts, SEQUENCE_RATIOS),
    'grpo': Algorithm(_prepare_grpo, _grpo, _count_grpo, RATIOS),
    'ppo': Algorithm(_prepare_ppo, _ppo, count_tokens, RATIOS, critic=True, least_samples=1),
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
    checks.choice('algorithm.name', settings.name, ALGORITHMS)
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
        checks.choice(f'algorithm.{name}', settings[name], choices)
    for name, least in (('num_minibatches', 1), ('num_epochs', 1), ('kl_coefficient', 0), ('kl_target', 0),
                        ('stop_kl', 0), ('value_coefficient', 0), ('value_clip', 0), ('clip_high', 0),
                        ('correction_cap', 1e-9)):
        if settings[name] < least:
            raise ValueError(f'algorithm.{name}={settings[name]} must be at least {least}')
    for name in ('beta', 'clip'):
        if not settings[name] > 0:
            raise ValueError(f'algorithm.{name}={settings[name]} must be positive')
    for name in ('clip', 'gamma', 'lam'):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f'algorithm.{name}={settings[name]} must be at most 1 and not negative')
    _check_mask(settings)
    if settings.name == 'grpo' and settings.kl_estimator == 'k2':
        raise ValueError("algorithm.kl_estimator='k2': grpo prices KL in its loss, estimated by k3, and not in the "
                         'reward; leave it at its default')
    if settings.critic_weights and not (algorithm.critic and settings.critic == 'separate'):
        raise ValueError(f'algorithm.critic_weights={settings.critic_weights}: ' + (
            f"algorithm.critic={settings.critic!r} has no network of its own" if algorithm.critic else
            f'{settings.name} has no critic') + '; leave it empty')
    return algorithm


def _check_mask(settings: Any) -> None:
    """Raises a ValueError for a mask of NLPO that means nothing."""
    mask = settings.mask
    if not 0 <= mask.top_p < 1:
        raise ValueError(f'algorithm.mask.top_p={mask.top_p} must be at least 0 and below 1; 0: no mask')
    for name in ('min_tokens', 'every'):
        if mask[name] < 1:
            raise ValueError(f'algorithm.mask.{name}={mask[name]} must be at least 1')
    if not mask.top_p:
        return
    if settings.name != 'ppo':
        raise ValueError(f'algorithm.mask.top_p={mask.top_p}: {settings.name} has no mask, only ppo; set it to 0')
    if settings.correction != 'none':
        raise ValueError(f"algorithm.correction={settings.correction!r}: under algorithm.mask no sample is stale; set "
                         "it to 'none'")

"""What the algorithms make of a rollout batch, against loops over completions and tokens in NumPy; no model."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rlhf import base
from experiments.rlhf.policy import algorithms

B, K, L = 4, 3, 5


def settings(name, **fields):
    config = base.policy().copy_and_resolve_references().unlock().algorithm
    config.update(dict(name=name, num_samples=K) | fields)
    return config


@pytest.fixture(scope='module')
def case():
    """A batch, and what its tokens are worth to the reference, the learner before the batch and in it, the critic."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, L + 1, (B, K))
    mask = np.arange(L) < lengths[..., None]
    draw = lambda mean, scale: np.where(mask, rng.normal(mean, scale, mask.shape), np.nan).astype(np.float32)
    batch = {'tokens': np.zeros((B, K, 2 + L), np.int32), 'prompt_mask': np.ones((B, K, 2), bool), 'mask': mask,
             'logprobs': draw(-2, .3), 'rewards': rng.normal(size=(B, K)).astype(np.float32)}
    batch['rewards'][1] = 0.5  # tied
    worth = {'reference': draw(-2, .3), 'policy': draw(-2, .3), 'new': draw(-2, .3),
             'values': rng.normal(0, .5, mask.shape).astype(np.float32),
             'new_values': rng.normal(0, .5, mask.shape).astype(np.float32), 'place': np.arange(B * K).reshape(B, K)}
    return batch, worth


def prepared(config, case, *, policy='policy', sampler=None):
    """((rows, metrics) of the whole batch, name -> function of rows -> what their tokens are worth to it)."""
    batch, worth = dict(case[0]), case[1]
    if sampler is not None:
        batch['logprobs'] = worth[sampler]
    # Which completions the rows are is told by their tokens, which nobody else reads here.
    batch['tokens'] = np.broadcast_to(worth['place'][..., None], batch['tokens'].shape).astype(np.int32)
    number = lambda rows: np.searchsorted(worth['place'].ravel(), np.asarray(rows['tokens'])[..., 0])
    at = lambda name: lambda rows: jnp.asarray(worth[name].reshape(-1, L))[number(rows)]
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    scorers = algorithms.Scorers(at('reference'), at(policy), at('values'))
    return algorithms.get(config).prepare(config, batch, scorers, config.kl_coefficient), at


def loss_of(config, case, *, policy='policy', sampler=None):
    """(loss of the whole batch, function of prompts -> (loss, weights) of a part, metrics)."""
    (rows, metrics), at = prepared(config, case, policy=policy, sampler=sampler)
    algorithm = algorithms.get(config)

    def part(prompts):
        some = {name: x[np.array(prompts)] for name, x in rows.items()}
        values = at('new_values')(some) if algorithm.critic else None
        return float(algorithm.loss(config, at('new')(some), values, some)[0]), algorithm.weights(config, some).sum()
    return part(range(B))[0], part, metrics


def tokens(case, b, k):
    return range(case[0]['mask'][b, k].sum())


def total(case, name, b, k):
    x = case[0]['logprobs'] if name == 'logprobs' else case[1][name]
    return float(sum(x[b, k, t] for t in tokens(case, b, k)))


def kl(case, b, k, estimator='k1'):
    batch, worth = case
    d = [float(batch['logprobs'][b, k, t]) - float(worth['reference'][b, k, t]) for t in tokens(case, b, k)]
    return [{'k1': x, 'k2': x * x / 2, 'k3': np.exp(-x) - 1 + x}[estimator] for x in d]


def clipped(advantage, ratio, low=.2, high=.2):
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))


# ---- By hand ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('loss_type,ties', itertools.product(['sigmoid', 'ipo'], ['drop', 'order', 'same']))
def test_online_dpo(loss_type, ties, case):
    found, losses = case[0]['rewards'], []
    for b in range(B):
        best, worst = found[b].argmax(), found[b].argmin()
        if found[b, best] == found[b, worst]:
            if ties == 'drop':
                continue
            best, worst = (0, 1) if ties == 'order' else (0, 0)
        h = (total(case, 'new', b, best) - total(case, 'new', b, worst)
             - total(case, 'reference', b, best) + total(case, 'reference', b, worst))
        losses.append(np.log1p(np.exp(-.3 * h)) if loss_type == 'sigmoid' else (h - 1 / .6) ** 2)
    got, _, metrics = loss_of(settings('online_dpo', loss_type=loss_type, ties=ties, beta=.3), case)
    assert got == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics['kl'] == pytest.approx(np.mean([sum(kl(case, b, k)) for b in range(B) for k in range(K)]), abs=1e-5)
    assert metrics['tied'] == 1 / B
    assert metrics['reward_gap'] == pytest.approx(np.ptp(found, 1).mean(), rel=1e-6)


def test_best_of_n(case):
    best = case[0]['rewards'].argmax(1)
    got, _, metrics = loss_of(settings('best_of_n'), case)
    assert got == pytest.approx(-np.mean([total(case, 'new', b, k) for b, k in enumerate(best)]), rel=1e-5)
    assert metrics['kl'] == pytest.approx(np.mean([sum(kl(case, b, k)) for b in range(B) for k in range(K)]), abs=1e-5)


def scores(case, coefficient, estimator='k1'):
    return np.array([[case[0]['rewards'][b, k] - coefficient * sum(kl(case, b, k, estimator)) for k in range(K)]
                     for b in range(B)])


def left_out(found):
    return found - (found.sum(1, keepdims=True) - found) / (K - 1)


@pytest.mark.parametrize('correction', ['none', 'truncate', 'mask'])
def test_rloo(correction, case):
    advantages = left_out(scores(case, .3))
    losses = []
    for b, k in np.ndindex(B, K):
        w = np.exp(total(case, 'policy', b, k) - total(case, 'logprobs', b, k))
        w = {'none': 1, 'truncate': min(w, 1.1), 'mask': w * (w <= 1.1)}[correction]
        losses.append(-w * advantages[b, k] * total(case, 'new', b, k))
    got, _, _ = loss_of(settings('rloo', kl_coefficient=.3, correction=correction, correction_cap=1.1), case)
    assert got == pytest.approx(np.mean(losses), rel=1e-5)


def test_proximal_rloo(case):
    """The ratio is taken against the sampler, whatever the learner was."""
    advantages = left_out(scores(case, .3, 'k2'))
    ratios = {(b, k): np.exp(total(case, 'new', b, k) - total(case, 'logprobs', b, k)) for b, k in np.ndindex(B, K)}
    found = []
    for high in (.2, .6):
        losses = [clipped(advantages[i], ratio, high=high) for i, ratio in ratios.items()]
        config = settings('proximal_rloo', kl_coefficient=.3, kl_estimator='k2', clip_high=high if high != .2 else 0)
        found.append(loss_of(config, case)[0])
        assert found[-1] == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize('mean_over,correction,scale', [('sequence', 'none', True), ('token', 'mask', True),
                                                       ('sequence', 'truncate', False)])
def test_grpo(mean_over, correction, scale, case):
    """KL is priced in the loss, by k3, and does not enter the rewards."""
    batch, worth = case
    rewards = np.float64(batch['rewards'])
    advantages = rewards - rewards.mean(1, keepdims=True)
    if scale:
        advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-7
    losses = []
    for b, k in np.ndindex(B, K):
        row = []
        for t in tokens(case, b, k):
            new, old, ref, own = (float(x[b, k, t]) for x in (worth['new'], batch['logprobs'], worth['reference'],
                                                             worth['policy']))
            w = np.exp(own - old)
            w = {'none': 1, 'truncate': min(w, 1.1), 'mask': w * (w <= 1.1)}[correction]
            center = old if correction == 'none' else own
            row.append(w * clipped(advantages[b, k], np.exp(new - center), .2, .4)
                       + .3 * (np.exp(ref - new) - 1 - (ref - new)))
        losses.append(row)
    expected = np.mean(sum(losses, [])) if mean_over == 'token' else np.mean([np.mean(row) for row in losses])
    got, _, _ = loss_of(settings('grpo', kl_coefficient=.3, clip_high=.4, mean_over=mean_over, correction=correction,
                                 correction_cap=1.1, scale_rewards=scale), case)
    assert got == pytest.approx(expected, rel=1e-4)


def with_rewards(case, rewards):
    """The case with other rewards, its batch as the step hands it over."""
    batch = dict(case[0]) | {'rewards': np.asarray(rewards, np.float32)}
    return algorithms.with_rewards(batch), case[1]


def test_grpo_trains_no_tied_group(case):
    """Neither does it where the policy has left the sampler, and so where tokens differ in their KL."""
    tied = with_rewards(case, np.ones((B, K)))
    (rows, _), _ = prepared(settings('grpo', kl_coefficient=.3), tied)
    np.testing.assert_array_equal(rows['advantages'], 0)
    price = loss_of(settings('grpo', kl_coefficient=.3), tied)[0]
    assert price > 0 and loss_of(settings('grpo', kl_coefficient=.6), tied)[0] == pytest.approx(2 * price, rel=1e-5)
    assert loss_of(settings('grpo', kl_coefficient=0), tied)[0] == 0


@pytest.mark.parametrize('name', list(algorithms.ALGORITHMS))
def test_a_completion_without_reward_is_not_trained_on(name, case):
    """Its group's baseline, pair or best is of the others, its tokens do not count, and nothing becomes NaN."""
    rewards = case[0]['rewards'].copy()
    rewards[0, 1], rewards[2, :2], rewards[3] = np.nan, np.nan, np.nan
    config = settings(name, kl_coefficient=.3)
    (rows, metrics), at = prepared(config, with_rewards(case, rewards))
    assert all(np.isfinite(x) for x in metrics.values())
    new = jnp.nan_to_num(at('new')(rows))
    algorithm, values = algorithms.get(config), at('new_values')(rows)
    loss = lambda new, values: algorithm.loss(config, new, values if algorithm.critic else None, rows)[0]
    grads = jax.grad(loss, (0, 1))(new, values)
    assert np.isfinite(loss(new, values)) and all(np.isfinite(x).all() for x in grads)
    trained = {tuple(np.argwhere(case[1]['place'] == i)[0]) for i in np.asarray(rows['tokens'])[
        np.abs(grads[0]).sum(-1) > 0][:, 0]}
    assert trained and not trained & {(0, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}
    if name in ('rloo', 'grpo'):
        kept = [0, 2]
        alone = with_rewards(case, rewards)
        alone = {n: x[:1, kept] for n, x in alone[0].items()}, {n: x[:1, kept] for n, x in alone[1].items()}
        (of_others, _), _ = prepared(config, alone)
        np.testing.assert_allclose(rows['advantages'][0, kept], of_others['advantages'][0], rtol=1e-5)


@pytest.mark.parametrize('correction', ['none', 'truncate', 'mask', 'decoupled'])
@pytest.mark.parametrize('after_eos', [False, True])
def test_ppo(correction, after_eos, case):
    batch, worth = case
    gamma, lam, advantages, returns = .9, .8, {}, {}
    for b, k in np.ndindex(B, K):
        length = len(tokens(case, b, k))
        end = min(length, L - 1) if after_eos else length - 1
        reward = np.zeros(L)
        reward[:length] = -.3 * np.array(kl(case, b, k, 'k3'))
        reward[end] += batch['rewards'][b, k]
        value = np.append(np.where(np.arange(L) < length + after_eos, worth['values'][b, k], 0), 0)
        following = 0
        for t in reversed(range(L)):
            following = reward[t] + gamma * value[t + 1] - value[t] + gamma * lam * following
            advantages[b, k, t], returns[b, k, t] = following, following + value[t]
    counted = [(b, k, t) for b, k in np.ndindex(B, K) for t in tokens(case, b, k)]
    found = np.array([advantages[i] for i in counted])
    mean, deviation = found.mean(), found.std(ddof=1)
    losses = []
    for i in counted:
        new, old, own = float(worth['new'][i]), float(batch['logprobs'][i]), float(worth['policy'][i])
        w = np.exp(own - old)
        w = {'none': 1, 'truncate': min(w, 1.1), 'mask': w * (w <= 1.1), 'decoupled': min(w, 1.1)}[correction]
        center = old if correction == 'none' else own
        losses.append(w * clipped((advantages[i] - mean) / deviation, np.exp(new - center)))
    errors = []
    for b, k, t in np.ndindex(B, K, L):
        if t < min(len(tokens(case, b, k)) + after_eos, L):
            old, new, to = worth['values'][b, k, t], worth['new_values'][b, k, t], returns[b, k, t]
            errors.append(max((new - to) ** 2, (old + np.clip(new - old, -.2, .2) - to) ** 2))
    got, _, _ = loss_of(settings('ppo', gamma=gamma, lam=lam, kl_coefficient=.3, kl_estimator='k3',
                                 correction=correction, correction_cap=1.1, after_eos=after_eos,
                                 value_coefficient=.4), case)
    assert got == pytest.approx(np.mean(losses) + .4 * .5 * np.mean(errors), rel=1e-4)


# ---- Parts of a batch, and stale samples -----------------------------------------------------------------------------

ALL = {name: dict(name=name) for name in algorithms.ALGORITHMS}
ALL['grpo by token'] = dict(name='grpo', mean_over='token')


@pytest.mark.parametrize('name', ALL)
def test_parts_weigh_what_they_count(name, case):
    """The mean of microbatches, by their weights, is the loss of all: tokens, prompts, or pairs that are not tied."""
    config = settings(**ALL[name])
    whole, part, _ = loss_of(config, case)
    for split in ([(0, 1), (2, 3)], [(0, 2), (1, 3)], [(1,), (0, 2, 3)]):
        found = [part(prompts) for prompts in split]
        share = np.array([w for _, w in found])
        assert np.dot([x for x, _ in found], share / share.sum()) == pytest.approx(whole, rel=2e-5), split


@pytest.mark.parametrize('name,correction', [(name, c) for name, found in algorithms.CORRECTIONS.items()
                                             for c in found if c != 'none'])
def test_corrections_change_stale_samples_and_no_fresh_ones(name, correction, case):
    plain, corrected = settings(name), settings(name, correction=correction, correction_cap=1.1)
    # Fresh: the learner is the sampler.
    assert loss_of(plain, case, policy='policy', sampler='policy')[0] == pytest.approx(
        loss_of(corrected, case, policy='policy', sampler='policy')[0], rel=1e-6)
    assert abs(loss_of(plain, case)[0] - loss_of(corrected, case)[0]) > 1e-3


@pytest.mark.parametrize('name,correction', [('ppo', 'truncate'), ('ppo', 'mask'), ('ppo', 'decoupled'),
                                             ('grpo', 'truncate'), ('rloo', 'truncate')])
def test_a_corrected_gradient_counts_staleness_once(name, correction, case):
    """Before the first update, and with no bound in reach, a stale token's gradient is that of a fresh one times what
    the two policies differ by: of the token, or of its sequence where the whole sequence is weighed."""
    def gradient(correction, sampler):
        config = settings(name, correction=correction, correction_cap=1e6, clip=1.0, kl_coefficient=0)
        (rows, _), at = prepared(config, case, sampler=sampler)
        algorithm, values = algorithms.get(config), at('new_values')(rows)
        loss = lambda new: algorithm.loss(config, new, values if algorithm.critic else None, rows)[0]
        return np.asarray(jax.grad(loss)(at('policy')(rows)))
    mask = case[0]['mask']
    fresh, stale = gradient('none', 'policy'), gradient(correction, None)
    differ = np.where(mask, case[1]['policy'] - case[0]['logprobs'], 0)
    weights = np.exp(differ.sum(-1, keepdims=True) if name == 'rloo' else differ)
    assert np.abs(weights - 1).max() > .1
    np.testing.assert_allclose(stale[mask], (fresh * weights)[mask], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('fields,message', [
    (dict(name='rloo', num_samples=1), 'rloo needs at least 2 completions'),
    (dict(name='proximal_rloo', correction='truncate'), r"correction='truncate': proximal_rloo has \('none',\)"),
    (dict(name='ppo', critic='both'), "algorithm.critic='both' is not one of"),
    (dict(name='ppo', clip=1.5), 'algorithm.clip=1.5 must be at most 1'),
    (dict(name='ppo', lam=-.1), 'algorithm.lam=-0.1'),
    (dict(name='ppo', critic='shared', critic_weights='x'), "critic_weights=x: algorithm.critic='shared' has no"),
    (dict(name='grpo', critic_weights='x'), 'critic_weights=x: grpo has no critic; leave it empty'),
    (dict(name='grpo', num_epochs=0), 'algorithm.num_epochs=0 must be at least 1'),
    (dict(name='grpo', kl_estimator='k2'), "kl_estimator='k2': grpo prices KL in its loss"),
])
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        algorithms.get(settings(**fields))


def test_ppo_needs_one_sample_only():
    assert algorithms.get(settings('ppo', num_samples=1)).critic

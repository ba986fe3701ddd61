"""Parts of a policy's training step that need no model."""
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.rlhf import base
from experiments.rlhf.policy import algorithms
from experiments.rlhf.policy import step as policy_step
from experiments.rlhf.policy.kind import Networks
from experiments.runtime import optim
from rlhf_jax import elastic_reset as er
from rlhf_jax import kl


def test_metrics_of_updates_are_means_but_for_the_gap_before_the_first():
    """Two epochs of three minibatches: only before any update should learner and sampler agree."""
    x = jnp.arange(6.0).reshape(2, 3) + 1
    assert policy_step.summary({'loss': x, 'logprob_gap': x, 'logprob_gap_max': x}) == {
        'loss': 3.5, 'logprob_gap': 1, 'logprob_gap_max': 1}


def test_metrics_of_a_batch():
    mask = np.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 0]]], bool)
    batch = {'mask': mask, 'logprobs': np.where(mask, -0.5, np.nan), 'rewards': np.array([[1, np.nan], [2, 6]]),
             'gold': np.array([[np.nan, 1], [3, 5]]), 'ended': np.array([[0, 1], [1, 1]], bool),
             'replaced': np.array([[1, 0], [0, 0]], bool), 'policy_version': np.full(mask.shape, 3)}
    metrics = policy_step.batch_metrics({name: jnp.asarray(x) for name, x in batch.items()}, 4)
    assert {name: pytest.approx(float(x), rel=1e-6) for name, x in metrics.items()} == {
        'reward': 3, 'reward_std': np.std([1, 2, 6]), 'missing_rewards': 0.25, 'length': 2, 'ended': 0.75,
        'entropy_estimate': 0.5, 'token_staleness': 1, 'replaced': 0.25, 'gold': 3}


def test_microbatches_weigh_what_they_count():
    rows = {'x': jnp.arange(8.0), 'counts': jnp.array([1., 0, 0, 0, 1, 1, 1, 1])}
    loss = lambda w, rows: ((w * rows['x'] * rows['counts']).sum() / jnp.maximum(rows['counts'].sum(), 1), {})
    whole = policy_step.value_and_grad(loss, jnp.float32(2), rows, rows['counts'], 1, 1)
    parts = policy_step.value_and_grad(loss, jnp.float32(2), rows, rows['counts'], 4, 1)
    np.testing.assert_allclose([parts[0][0], parts[1]], [whole[0][0], whole[1]], rtol=1e-6)


# ---- Updates that are left out ---------------------------------------------------------------------------------------

class Table(Networks):
    """A policy that draws each token from one table of logits, whatever the prompt: no model has to be compiled."""
    rules, columns = (), ('tokens', 'mask')

    def init(self, key):
        return {'policy': {'logits': jnp.zeros(5)}}

    def forward(self, params, rows):
        length = rows['mask'].shape[-1]
        return jax.nn.log_softmax(params['policy']['logits'])[rows['tokens'][..., -length:]], None


ELASTIC = er.method('elastic_reset', 2, decay=0.5, tick_on='epoch', reset_on='iteration', policy=r'policy/.*')


def one_step(optimizer=None, elastic=ELASTIC, begun_at=0, drawn=1 / 5, **algorithm):
    """State and metrics after one batch of 4 prompts with 2 samples of 3 tokens, each `drawn` with this probability."""
    config = base.policy()
    config.batch_size = 4
    config.algorithm.update(dict(name='rloo', num_samples=2, kl_coefficient=0.0) | algorithm)
    step = policy_step.PolicyStep(config, algorithms.get(config.algorithm), Table(config), elastic,
                                  optimizer or optax.adam(0.3), 1)
    tokens = np.random.default_rng(0).integers(0, 5, (4, 2, 3))
    batch = {'tokens': tokens, 'prompt_mask': np.ones((4, 2, 0), bool), 'mask': np.ones((4, 2, 3), bool),
             'logprobs': np.full((4, 2, 3), math.log(drawn)), 'rewards': (tokens == 2).sum(-1).astype(float),
             'ended': np.ones((4, 2), bool), 'replaced': np.zeros((4, 2), bool),
             'policy_version': np.zeros((4, 2, 3), int)}
    state = step.init(jax.random.key(0)).replace(step=jnp.int32(begun_at))
    state, metrics = jax.jit(step)(state, {name: jnp.asarray(x) for name, x in batch.items()})
    return jax.device_get(state.replace(rng=None)), jax.device_get(metrics)


def test_updates_stop_once_the_policy_is_too_far_from_what_drew_the_batch():
    """The first update is always made, for it begins at the sampler; a bound that nothing reaches changes nothing."""
    whole, _ = one_step(num_epochs=3)
    free, metrics = one_step(num_epochs=3, stop_kl=1e9)
    chex.assert_trees_all_close(free, whole, rtol=1e-6)
    assert metrics['stopped_updates'] == 0 and metrics['sampler_kl'] > 0
    once, _ = one_step(num_epochs=1)
    stopped, metrics = one_step(num_epochs=3, stop_kl=1e-9)
    chex.assert_trees_all_close(stopped, once, rtol=1e-6)  # moments and their count too; one tick
    assert metrics['stopped_updates'] == pytest.approx(2 / 3)
    assert np.abs(whole.params['policy']['logits'] - once.params['policy']['logits']).max() > 0.1
    within, metrics = one_step(num_epochs=2, num_minibatches=2, stop_kl=1e-9)
    assert metrics['stopped_updates'] == 0.75  # an epoch in which one update was made ticks, the other does not
    np.testing.assert_allclose(within.extra['elastic'].ema['policy']['logits'],
                               within.params['policy']['logits'] / 2, rtol=1e-6)


def test_schedules_go_on_where_updates_stop():
    """They last as long as the run does, whatever of it is left out."""
    config = base.policy().optimizer
    config.update(learning_rate=dict(peak=0.3, decay='linear', warmup_steps=0), groups=())
    optimizer = optim.adamw(config, {'policy': {'logits': jnp.zeros(5)}}, 12, clock=lambda n: n // 4 + 1)
    for of_run, algorithm in ((12, dict(num_epochs=12)), (8, dict(num_epochs=4, num_minibatches=2))):
        state, metrics = one_step(optimizer, stop_kl=1e-9, **algorithm)
        assert metrics['stopped_updates'] == 1 - 1 / of_run
        adam, = (x for x in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(x))
        *_, clock = (x for x in jax.tree.leaves(state.opt_state) if np.shape(x) == ())
        assert (adam.count, clock) == (1, of_run)


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


# ---- Resets and the coefficient --------------------------------------------------------------------------------------

def test_resets_count_all_updates_of_the_run():
    resets = []
    for begun_at, period in ((0, 4), (0, 5), (1, 8), (1, 9)):  # updates 0-3 and 4-7
        elastic = er.method('elastic_reset', period, decay=0.5, policy=r'policy/.*')
        state, metrics = one_step(elastic=elastic, begun_at=begun_at, num_epochs=2, num_minibatches=2)
        resets.append((metrics['reset'], not state.extra['elastic'].ema['policy']['logits'].any()))
    assert resets == [(1, True), (0, False)] * 2


def test_of_several_resets_of_a_batch_the_first_is_reported():
    elastic = er.method('reset_to_ema', 1, decay=0.5, policy=r'policy/.*')
    _, once = one_step(elastic=elastic, num_epochs=1)
    _, twice = one_step(elastic=elastic, num_epochs=2)
    assert (once['reset'], twice['reset']) == (1, 1)
    np.testing.assert_allclose([once['kept'], twice['kept']], 0.5, rtol=1e-6)


@pytest.mark.parametrize('unit, measure, moved', [('token', 'kl_per_token', 0.98), ('sequence', 'kl', 1.02)])
def test_the_coefficient_seeks_a_kl_of_its_unit(unit, measure, moved):
    drawn = math.exp(0.05) / 5  # 0.05 nats a token and 0.15 a response above the reference
    state, metrics = one_step(drawn=drawn, kl_target=0.1, kl_rate=0.1, kl_unit=unit, kl_coefficient=0.1)
    np.testing.assert_allclose([metrics['kl_per_token'], metrics['kl']], [0.05, 0.15], rtol=1e-4)
    want = kl.AdaptiveController(0.1, 0.1).update(0.1, metrics[measure])
    np.testing.assert_allclose([state.extra['kl_coefficient'], want], 0.1 * moved, rtol=1e-6)


def test_a_bound_on_updates_needs_scores_of_what_was_drawn():
    with pytest.raises(ValueError, match='algorithm.stop_kl=-1.0 must be at least 0'):
        one_step(stop_kl=-1.0)

    class Bound(Table):
        as_drawn = False
    config = base.policy()
    config.algorithm.stop_kl = 0.1
    with pytest.raises(ValueError, match='algorithm.stop_kl=0.1: this policy scores a bound'):
        policy_step.PolicyStep(config, None, Bound(config), None, optax.sgd(1.0), 1)

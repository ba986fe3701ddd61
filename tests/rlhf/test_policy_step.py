"""Parts of a policy's training step that need no model."""
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rlhf.policy import step as policy_step


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

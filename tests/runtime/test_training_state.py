"""The state of one model and its step."""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runtime.training import Training


def training(decay=None):
    """Of one weight, whose gradient is 1, with a draw among the metrics."""
    loss = lambda params, state, batch, rng: (params['w'] * batch['x'].mean(), {'u': jax.random.uniform(rng)})
    return Training(lambda key: {'w': jnp.float32(1)}, loss, optax.sgd(0.5), decay, 1, 1)


BATCH = {'x': jnp.ones(2)}


def test_the_average_counts_updates_from_one():
    ours = training(lambda n: 1 / (1 + n))
    start = ours.init(jax.random.key(0))
    state, _ = ours.step(start, BATCH)
    assert float(state.params['w']) == 0.5 and float(state.ema['w']) == (1 + 0.5) / 2


def test_each_step_draws_anew_from_one_key():
    ours, drawn = training(), []
    state = start = ours.init(jax.random.key(0))
    for _ in range(2):
        state, metrics = ours.step(state, BATCH)
        drawn.append(float(metrics['u']))
    assert drawn == [float(jax.random.uniform(jax.random.fold_in(start.rng, step))) for step in (0, 1)]
    assert drawn[0] != drawn[1]
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(start.rng))

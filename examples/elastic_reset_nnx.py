"""Elastic Reset around a `flax.nnx` model: `python examples/elastic_reset_nnx.py`.

A small classifier learns task A; then it is trained by policy gradient on a reward that only wants class 0, which makes
it forget A. Every 20 steps its weights go back to their moving average and the average to where the training began.
Prints reward and what is left of task A, with resets and without.
"""
import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rlhf_jax import elastic_reset


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 4, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


def train(state, graph, loss, steps, config=None):
    """`steps` of Adam on `loss(model, key)`, under `config` where there is one."""
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(state)
    elastic = elastic_reset.init(config, state) if config else None

    @jax.jit
    def step(state, opt_state, key):
        grads = jax.grad(lambda state: loss(nnx.merge(graph, state), key))(state)
        updates, opt_state = optimizer.update(grads, opt_state, state)
        return optax.apply_updates(state, updates), opt_state

    for k in range(steps):
        state, opt_state = step(state, opt_state, jax.random.key(k))
        if config and any(due := config.due('step', k)):
            elastic, state, opt_state = elastic_reset.apply(config, elastic, state, opt_state, due)
    return state


def main(steps: int = 200) -> dict[str, tuple[float, float]]:
    graph, state = nnx.split(Classifier(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (512, 8))
    labels = jnp.argmax(x[:, :4], -1)  # task A: which of the first four is largest

    def supervised(model, key):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    def policy_gradient(model, key):
        logits = model(x)
        drawn = jax.random.categorical(key, logits)
        advantage = (drawn == 0) - (drawn == 0).mean()
        return -(jax.nn.log_softmax(logits)[jnp.arange(len(x)), drawn] * advantage).mean()

    def measured(state):
        """(reward, accuracy on task A)"""
        probabilities = jax.nn.softmax(nnx.merge(graph, state)(x))
        return float(probabilities[:, 0].mean()), float((probabilities.argmax(-1) == labels).mean())

    state = train(state, graph, supervised, steps)
    config = elastic_reset.ElasticReset(period=20, decay=0.9)
    runs = {'at the start': state, 'policy gradient': train(state, graph, policy_gradient, steps),
            'with Elastic Reset': train(state, graph, policy_gradient, steps, config)}
    found = {name: measured(run) for name, run in runs.items()}
    for name, (reward, accuracy) in found.items():
        print(f'{name:20s} reward {reward:.3f}   task A {accuracy:.3f}')
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=200)
    main(parser.parse_args().steps)

"""Policies: the step of each algorithm, and the run around it, synchronous, stale, in processes, killed and resumed."""
import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.rlhf import base
from experiments import train
from experiments.rlhf import language, policy, rollouts
from experiments.runtime import loop, optim, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.metrics import read_metrics
from rlhf_jax import kl as kl_lib
from rlhf_jax import convert
from rlhf_jax.convert import files
from rlhf_jax.rollout import publish

B, P, L = 8, 14, 8
TESTS = pathlib.Path(__file__).parent


def config_of(**fields):
    """Eight bare sums a batch, two completions of eight bytes each; `a__b=x` sets `config.a.b`."""
    config = base.policy().copy_and_resolve_references().unlock()
    config.model.update(dict(size='70m', width=32, depth=2, num_heads=2, vocab_size=264, max_length=32))
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 6, B, 1, 3
    config.data.num_rows = 50
    config.data.options = dict(num_steps=1, words=False, max_number=30)
    config.sampling.update(dict(max_new_tokens=L, max_prompt=P, temperature=0.7))
    config.reward.update(dict(kind='function', function='policy_rewards:ascii_share'))
    config.optimizer.learning_rate.update(dict(peak=1e-2, decay='constant'))
    for name, value in fields.items():
        *path, last = name.split('__')
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


@pytest.fixture(scope='module', autouse=True)
def built_once():
    """One step for each config and mesh: jax then compiles it once. How batches come about is not the step's business,
    so runs that differ in that alone share it; they share the conversion of weights for decoding as well."""
    steps, decoders, build, decoding = {}, {}, train.build, rollouts.Decoding

    def once(config, mesh):
        plain = config.copy_and_resolve_references()
        plain.rollout, plain.checkpoint_every = base.policy().rollout, 0
        key, built = (plain.to_json(), mesh), build(config.copy_and_resolve_references(), mesh)
        first = steps.setdefault(key, built)
        return dataclasses.replace(built, init=first.init, step=first.step, loss=first.loss)

    def convert_once(config, mesh):
        key = config.model.to_json(), config.lora.to_json(), mesh
        if key not in decoders:
            decoders[key] = decoding(config, mesh)
        return decoders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'build', once)
        patch.setattr(rollouts, 'Decoding', convert_once)
        yield


def devices(count, **sizes):
    return mesh_lib.make_mesh(sizes, jax.devices()[:count])


# ---- One step, on a batch that is made up ------------------------------------------------------------------------------

def stirred(tree, scale=0.05):
    """Every weight moved a little: heads start at zero, and the policy where its reference is."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    noise = lambda path, x: np.random.default_rng(zlib.crc32(partition.path_name(path).encode())).normal(size=x.shape)
    return jax.tree_util.tree_unflatten(structure, [np.asarray(x + scale * noise(path, x), x.dtype) for path, x in flat])


def rollout(config, seed=0):
    """A batch as the step gets it: responses of unequal length, some prompts tied, log-probabilities a little stale."""
    rng, num_samples = np.random.default_rng(seed), config.algorithm.num_samples
    shape = (config.batch_size, num_samples)
    lengths = rng.integers(1, L + 1, shape)
    mask = np.arange(L) < lengths[..., None]
    prompts = np.arange(P) >= P - rng.integers(3, P + 1, (config.batch_size, 1, 1))
    rewards = rng.normal(size=shape).astype(np.float32)
    rewards[:config.batch_size // 4] = 0.5
    return {'tokens': np.concatenate([np.repeat(rng.integers(0, 256, (config.batch_size, 1, P)), num_samples, 1),
                                      rng.integers(0, 256, (*shape, L))], 2).astype(np.int32),
            'prompt_mask': np.broadcast_to(prompts, (*shape, P)).copy(), 'mask': mask,
            'logprobs': np.where(mask, rng.normal(-5.6, 0.2, (*shape, L)), 0).astype(np.float32),
            'policy_version': np.zeros((*shape, L), np.int32), 'rewards': rewards, 'ended': lengths < L,
            'replaced': np.zeros(shape, bool)}


@functools.lru_cache(maxsize=None)
def _compiled(text, mesh, config):
    experiment = train.build(config.value, mesh)
    shardings = partition.state_shardings(jax.eval_shape(experiment.init, jax.random.key(0)), experiment.rules, mesh)
    step = jax.jit(experiment.step, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
                   out_shardings=(shardings, mesh_lib.replicated(mesh)))
    state = jax.jit(experiment.init)(jax.random.key(0))
    return experiment, shardings, step, state.replace(params=stirred(state.params))


class _Same:
    """A config that `lru_cache` does not look at: its text is the key."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return True


def start(config, mesh=None):
    """(state, step): the policy stands away from its reference. `step` keeps its arguments, and fetches what it gives."""
    mesh = mesh or devices(1)
    _, shardings, step, state = _compiled(config.to_json(), mesh, _Same(config))

    def run(state, batch):
        with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            state, metrics = step(jax.device_put(state, shardings),
                                  jax.device_put(batch, mesh_lib.batch_sharding(mesh)))
        return jax.device_get(state), {name: float(x) for name, x in jax.device_get(metrics).items()}
    return jax.device_get(state), run


def adam(state):
    is_adam = lambda s: isinstance(s, optax.ScaleByAdamState)
    return next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))


def assert_equal(tree, other, *, but=()):
    a, b = partition.flatten(tree), partition.flatten(other)
    assert set(a) == set(b)
    for name in a:
        x, y = a[name], b[name]
        if jnp.issubdtype(getattr(x, 'dtype', None), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=name)


def assert_differs(tree, other):
    assert any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other)))


TWICE_TWO = dict(algorithm__num_minibatches=2, algorithm__num_epochs=2, optimizer__learning_rate__peak=2e-3)
KINDS = {
    'online_dpo': {},
    'online_dpo_ipo_of_4': dict(algorithm__name='online_dpo', algorithm__loss_type='ipo', algorithm__num_samples=4,
                                algorithm__ties='order'),
    'ppo': dict(algorithm__gamma=0.98),
    'ppo_shared': dict(algorithm__name='ppo', algorithm__critic='shared', algorithm__correction='decoupled',
                       algorithm__after_eos=True, algorithm__kl_estimator='k3'),
    'rloo': dict(algorithm__correction='truncate', algorithm__kl_target=0.05, algorithm__kl_rate=0.3),
    'proximal_rloo': {},
    'grpo': dict(algorithm__ref_beta=0.2, algorithm__mean_over='token', algorithm__correction='mask',
                 algorithm__clip_high=0.4, algorithm__kl_target=0.5, algorithm__kl_unit='sequence'),
    'best_of_n': {},
}


def kind(name, **fields):
    return config_of(**({'algorithm__name': name} | TWICE_TWO | KINDS[name] | fields))


# If a value here moves, the training step computes something else: say in the commit what and why it should.
GOLDEN = {}


@functools.lru_cache(maxsize=None)
def stepped(name):
    """(state before, state after, metrics) of one step of four updates."""
    config = kind(name)
    state, step = start(config)
    after, metrics = step(state, rollout(config))
    return state, after, metrics


@pytest.mark.parametrize('name', KINDS)
def test_golden_metrics_of_a_step(name):
    before, after, metrics = stepped(name)
    for metric, value in GOLDEN[name].items():
        assert metrics[metric] == pytest.approx(value, rel=5e-5, abs=1e-6), metric
    assert metrics['token_staleness'] == 0 and int(after.step) == 1
    assert int(adam(after).count) == 4
    assert_differs(after.params, before.params)

"""Policies: the step of each algorithm, and the run around it, synchronous, stale, in processes, killed and resumed."""
import functools
import os
import pathlib
import signal
import subprocess
import sys
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.rlhf import base
from experiments import train
from experiments.rlhf.models import architecture
from experiments.rlhf.policy import algorithms, roles, waves
from experiments.rlhf.policy import experiment as policy
from experiments.rlhf.policy import generator as generator_lib
from experiments.rlhf.policy import step as policy_step
from experiments.rlhf.policy.models import PolicyModels
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import optim, partition
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.metrics import read_metrics
from experiments.runtime.signals import Stopped
from policy_runs import L, P, config_of, devices, shared_steps
from rlhf_jax import convert
from rlhf_jax import kl as kl_lib
from rlhf_jax.rollout import publish
from rlhf_jax.weights import files

TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope='module', autouse=True)
def built_once():
    with shared_steps():
        yield


# ---- One step, on a batch that is made up ----------------------------------------------------------------------------

def stirred(tree, scale=0.05):
    """Every weight moved a little: heads start at zero, and the policy where its reference is."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    noise = lambda path, x: np.random.default_rng(zlib.crc32(partition.path_name(path).encode())).normal(size=x.shape)
    moved = [np.asarray(x + scale * noise(path, x), x.dtype) for path, x in flat]
    return jax.tree_util.tree_unflatten(structure, moved)


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
            'logprobs': np.where(mask, rng.normal(-5.5, 0.2, (*shape, L)), 0).astype(np.float32),
            'policy_version': np.zeros((*shape, L), np.int32), 'rewards': rewards, 'ended': lengths < L,
            'replaced': np.zeros(shape, bool)}


@functools.lru_cache(maxsize=None)
def _compiled(text, mesh, config):
    experiment = train.build(config.value, mesh)
    shardings = partition.state_shardings(jax.eval_shape(experiment.init, jax.random.key(0)), experiment.rules, mesh)
    step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
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
    """(state, step), both on the host: the policy stands away from its reference."""
    mesh = mesh or devices(1)
    _, shardings, step, state = _compiled(config.to_json(), mesh, _Same(config))

    def run(state, batch):
        own = jax.random.wrap_key_data(np.asarray(jax.random.key_data(state.rng)))  # the step takes all it is given
        state = state.replace(rng=own)
        with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            state, metrics = step(jax.device_put(state, shardings),
                                  jax.device_put(batch, mesh_lib.batch_sharding(mesh)))
        return jax.device_get(state), {name: float(x) for name, x in jax.device_get(metrics).items()}
    return jax.device_get(state.replace(rng=jax.random.key(0))), run


def adam(state):
    is_adam = lambda s: isinstance(s, optax.ScaleByAdamState)
    return next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))


def assert_equal(tree, other):
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
    'rloo': dict(algorithm__correction='truncate', algorithm__kl_target=0.08, algorithm__kl_rate=0.3),
    'proximal_rloo': {},
    'grpo': dict(algorithm__kl_coefficient=0.2, algorithm__mean_over='token', algorithm__correction='mask',
                 algorithm__clip_high=0.4, algorithm__kl_target=0.32, algorithm__kl_unit='sequence'),
    'best_of_n': {},
}


def kind(name, **fields):
    return config_of(**({'algorithm__name': name} | TWICE_TWO | KINDS[name] | fields))


# If a value here moves, the training step computes something else: say in the commit what and why it should.
GOLDEN = {
    'online_dpo': {'loss': 0.598277, 'grad_norm': 0.9629555, 'kl': 0.3392363, 'margin': 0.2214789, 'pairs': 3.0,
        'logprob_gap': 0.3592465},
    'online_dpo_ipo_of_4': {'loss': 16.02018, 'grad_norm': 177.9108, 'kl': 0.3738322, 'margin': 0.2957286,
        'pairs': 4.0, 'logprob_gap': 0.4528554},
    'ppo': {'loss': -0.03755603, 'grad_norm': 1.316578, 'kl': 0.3392363, 'old_kl': 0.1484609,
        'clip_fraction': 0.5728921, 'value_loss': 0.5359805, 'return': 0.1776381, 'explained_variance': -1.781175,
        'logprob_gap': 0.3592465},
    'ppo_shared': {'loss': 0.09579741, 'grad_norm': 1.772353, 'kl': 0.3392363, 'old_kl': 0.06551375,
        'clip_fraction': 0.4137116, 'value_loss': 1.011253, 'return': 0.05300296, 'explained_variance': -1.601441,
        'behaviour_kl': 0.123822, 'weight': 0.9004526, 'logprob_gap': 0.3592465},
    'rloo': {'loss': 1.566113, 'grad_norm': 5.635223, 'kl': 0.3392363, 'advantage_std': 0.6699819,
        'sequence_logprob': -26.33681, 'logprob_gap': 0.3592465},
    'proximal_rloo': {'loss': 0.0006930158, 'grad_norm': 2.776472, 'kl': 0.3392363, 'old_kl': 28.72341,
        'clip_fraction': 0.625, 'logprob_gap': 0.3592465},
    'grpo': {'loss': -0.01791772, 'grad_norm': 0.9769329, 'kl': 0.3392363, 'old_kl': 0.1185996,
        'clip_fraction': 0.2257683, 'weight': 0.8578994, 'ref_kl': 0.1881405, 'logprob_gap': 0.3592465},
    'best_of_n': {'loss': 28.32774, 'grad_norm': 15.27473, 'kl': 0.3392363, 'logprob_gap': 0.3988169},
}


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


def plain_dpo(config, params, reference, batch):
    """The loss of Online DPO, pair by pair."""
    module, pairs = architecture.decoder(config.model), []
    for b, rewards in enumerate(batch['rewards']):
        if rewards.max() > rewards.min():
            pairs += [(b, rewards.argmax()), (b, rewards.argmin())]
    row = lambda name: np.stack([batch[name][pair] for pair in pairs])
    tokens, mask = row('tokens'), row('mask')

    def sums(weights):
        whole = np.concatenate([row('prompt_mask'), mask], 1)
        logits = module.apply({'params': weights}, tokens, mask=whole) / config.sampling.temperature
        logprobs = jax.nn.log_softmax(logits[:, P - 1:-1])
        return (jnp.take_along_axis(logprobs, tokens[:, P:, None], 2)[..., 0] * mask).sum(1)
    h = sums(params) - sums(reference)
    return jnp.log1p(jnp.exp(-config.algorithm.beta * (h[::2] - h[1::2]))).mean()


def test_a_step_is_the_plain_gradient():
    config = config_of()
    batch, (before, step) = rollout(config), start(config)
    after, metrics = step(before, batch)
    reference = before.extra['reference']['policy']
    plain = jax.jit(jax.value_and_grad(lambda params: plain_dpo(config, params, reference, batch)))
    loss, grads = plain(before.params['policy'])
    assert metrics['loss'] == pytest.approx(float(loss), rel=1e-5)
    assert metrics['grad_norm'] == pytest.approx(float(optim.norm(grads)), rel=1e-5)
    assert metrics['pairs'] == 6 and metrics['tied'] == 0.25
    for name, got in partition.flatten(adam(after).mu['policy']).items():  # 0.1 of the gradient, after one update
        np.testing.assert_allclose(got, 0.1 * partition.flatten(grads)[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('name', ['online_dpo', 'ppo'])
def test_microbatches_add_up_to_the_batch(name):
    """Though they hold unequal numbers of tokens, and tied pairs that do not count."""
    whole = config_of(algorithm__name=name)
    parts = config_of(algorithm__name=name, accumulate=2)
    batch = rollout(whole)
    (a, one), (b, two) = (step(state, batch) for state, step in (start(whole), start(parts)))
    tokens = batch['mask'].reshape(2, -1).sum(1)
    assert tokens[0] != tokens[1]
    assert one['loss'] == pytest.approx(two['loss'], rel=1e-5)
    assert one['grad_norm'] == pytest.approx(two['grad_norm'], rel=1e-5)
    assert one.get('pairs') == two.get('pairs')
    for name, got in partition.flatten(adam(b).mu).items():
        np.testing.assert_allclose(got, partition.flatten(adam(a).mu)[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('name', ['online_dpo', 'ppo'])
def test_sharded_equals_unsharded(name):
    config = config_of(algorithm__name=name)
    batch = rollout(config)
    state, step = start(config)
    sharded, step_sharded = start(config, mesh_lib.make_mesh(dict(data=2, fsdp=2, tensor=2)))
    assert_equal(state.params, sharded.params)
    (a, want), (b, got) = step(state, batch), step_sharded(sharded, batch)
    assert {k: pytest.approx(v, rel=2e-5, abs=1e-5) for k, v in want.items()} == got
    for name, x in partition.flatten(adam(b).mu).items():
        np.testing.assert_allclose(x, partition.flatten(adam(a).mu)[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_learner_and_sampler_agree_before_the_first_update_only():
    """`logprob_gap` is read before a batch's first update; the ratios of the later ones have moved."""
    config = kind('ppo')
    before, step = start(config)
    batch = rollout(config)
    models = PolicyModels(config, has_critic=algorithms.get(config.algorithm).critic)
    own = jax.jit(lambda params, rows: models.forward(params, rows)[0])(before.params, batch)
    _, metrics = step(before, batch | {'logprobs': np.where(batch['mask'], own, 0)})
    assert metrics['logprob_gap_max'] < 1e-5 and metrics['logprob_gap'] < 1e-6
    assert abs(metrics['ratio'] - 1) > 1e-3 and metrics['old_kl'] > 1e-4
    assert stepped('ppo')[2]['logprob_gap'] > 0.1


@pytest.mark.parametrize('name,measure', [('rloo', 'kl_per_token'), ('grpo', 'kl')])
def test_the_coefficient_of_kl_follows_its_controller(name, measure):
    before, after, metrics = stepped(name)
    a = kind(name).algorithm
    assert abs(metrics[measure] / a.kl_target - 1) < 0.2  # where the controller is proportional
    expected = kl_lib.AdaptiveController(a.kl_target, a.kl_rate).update(a.kl_coefficient, metrics[measure])
    assert float(after.extra['kl_coefficient']) == pytest.approx(float(expected), rel=1e-6)
    assert float(after.extra['kl_coefficient']) != metrics['kl_coefficient'] == pytest.approx(a.kl_coefficient)


def test_parts_of_rows_come_back_in_order():
    rows = {'x': jnp.arange(24.0).reshape(12, 2)}
    got = policy_step.in_parts(lambda part: part['x'] * 2, rows, 3, 2)
    np.testing.assert_array_equal(got, rows['x'] * 2)


def test_bfloat16_compute_keeps_float32_masters():
    """A step of 1e-6 is far below what bfloat16 weights could take up."""
    config = config_of(algorithm__name='best_of_n', model__dtype='bfloat16', optimizer__learning_rate__peak=1e-6,
                       elastic__method='fixed_reference')
    before, step = start(config)
    after, metrics = step(before, rollout(config))
    for name, x in partition.flatten(after.params).items():
        assert x.dtype == np.float32, name
    moved = lambda a, b: np.mean([(x != y).mean() for (n, x), y in zip(partition.flatten(a).items(), jax.tree.leaves(b))
                                  if 'blocks' in n and 'kernel' in n])
    assert moved(after.params, before.params) > 0.95
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(after.extra['elastic']))
    assert moved(after.extra['elastic'].ema, before.extra['elastic'].ema) > 0.95
    assert metrics['logprob_gap'] > 1e-3
    frozen = train.build(config_of(reference__dtype='bfloat16'), devices(1))
    reference = jax.eval_shape(frozen.init, jax.random.key(0)).extra['reference']
    assert {x.dtype for x in jax.tree.leaves(reference)} == {jnp.dtype(jnp.bfloat16)}


# ---- Learning rate ---------------------------------------------------------------------------------------------------

def learning_rates(num_minibatches, lr_per, monkeypatch):
    """lr / lr0 of each update of a run of 131072 prompts in minibatches of 512, as the optimizer reads its schedule."""
    seen = []
    spied = lambda groups, learning_rate, weight_decay: seen.append(learning_rate) or optax.identity()
    monkeypatch.setattr(optim, 'scale_by_groups', spied)
    config = config_of(lr_per=lr_per, algorithm__num_minibatches=num_minibatches, batch_size=512 * num_minibatches,
                       num_steps=256 // num_minibatches, optimizer__learning_rate__decay='linear')
    policy.build(config, devices(1))
    return np.asarray(jax.vmap(seen[0])(jnp.arange(256))) / 3e-2


@pytest.mark.parametrize('num_minibatches,mean', [(1, .4980), (2, .4961), (4, .4922), (8, .4844), (16, .4688),
                                                  (32, .4375), (64, .3750)])
def test_published_learning_rates(num_minibatches, mean, monkeypatch):
    """Moved once a rollout batch, ahead of it, the rate falls with the number of minibatches; the last are at 0."""
    rates = learning_rates(num_minibatches, 'batch', monkeypatch)
    assert abs(rates.mean() - mean) < 5.1e-5  # the table has four decimals
    assert (rates == 0).mean() == num_minibatches / 256
    by_step = learning_rates(num_minibatches, 'step', monkeypatch)
    assert by_step.mean() == pytest.approx(0.5 + 1 / 512, abs=1e-5) and by_step.min() > 0 and by_step[0] == 1


# ---- Elastic Reset in the step ---------------------------------------------------------------------------------------

def elastic(algorithm, **fields):
    return config_of(**dict(algorithm__name=algorithm, algorithm__num_minibatches=2, elastic__method='elastic_reset',
                            elastic__period=2, elastic__decay=0.8) | fields)


def reset_or_not(config):
    """(state before, without a reset, with one, metrics with one): one step, after which a reset is due or not."""
    state, step = start(config)
    state = state.replace(step=np.int32(0))
    batch = rollout(config)
    (plain, _), (reset, metrics) = (step(state.replace(step=np.int32(k)), batch) for k in (0, 1))
    return state, plain, reset, metrics


def test_a_reset_is_bitwise_and_leaves_optimizer_and_critic():
    before, plain, reset, metrics = reset_or_not(elastic('ppo'))
    old = plain.extra['elastic'].ema['policy']
    assert_equal(reset.params['policy'], old)
    assert_equal(reset.extra['elastic'].ema, before.extra['elastic'].init)
    assert_equal(reset.extra['elastic'].init, before.extra['elastic'].init)
    assert_equal(reset.params['value'], plain.params['value'])
    assert_equal(reset.opt_state, plain.opt_state)
    assert_differs(plain.params['policy'], old)
    assert_differs(old, before.extra['elastic'].init)
    assert_differs(plain.params['value'], before.params['value'])
    assert 'value' not in plain.extra['elastic'].ema
    # Two ticks on the way: with w_t the policy after update t, ema - init = .2 (w_2 - init) + .16 (w_1 - init).
    away = lambda tree: np.concatenate([np.ravel(x - y) for x, y in zip(
        jax.tree.leaves(tree), jax.tree.leaves(before.extra['elastic'].init['policy']))]).astype(np.float64)
    moved = away(plain.params['policy'])
    assert metrics['reset'] == 1
    assert metrics['kept'] == pytest.approx(away(old) @ moved / (moved @ moved), rel=1e-4)
    assert 0.2 < metrics['kept'] < 0.5


def test_decay_zero_keeps_the_policy_and_the_average_becomes_the_reference():
    config = elastic('best_of_n', elastic__decay=0.0, elastic__kl_reference='ema')
    before, plain, reset, metrics = reset_or_not(config)
    assert_equal(reset.params, plain.params)
    assert metrics['kept'] == pytest.approx(1, abs=1e-6)
    _, step = start(config)
    kl = lambda state: step(state, rollout(config))[1]['kl']
    assert kl(before) == kl(reset) != pytest.approx(kl(plain), abs=1e-3)  # a reset puts the average back, too


def test_decay_one_returns_to_the_start_and_the_reference_stays():
    config = elastic('best_of_n', elastic__decay=1.0)
    before, plain, reset, metrics = reset_or_not(config)
    assert_equal(reset.params['policy'], before.extra['elastic'].init['policy'])
    assert metrics['kept'] == 0
    _, step = start(config)
    assert len({step(state, rollout(config))[1]['kl'] for state in (before, plain, reset)}) == 1


def test_only_adapters_are_averaged_and_reset():
    before, plain, reset, _ = reset_or_not(elastic('best_of_n', lora__rank=2))
    owned = set(partition.flatten(before.extra['elastic'].init['policy']))
    flat = lambda state: partition.flatten(state.params['policy'])
    average = partition.flatten(plain.extra['elastic'].ema['policy'])
    assert owned and owned == {name for name in flat(before) if name.endswith(('lora_a', 'lora_b'))}
    for name, x in flat(before).items():
        if name in owned:
            np.testing.assert_array_equal(flat(reset)[name], average[name])
            assert (flat(plain)[name] != x).any(), name
        else:
            np.testing.assert_array_equal(flat(plain)[name], x, err_msg=name)
            np.testing.assert_array_equal(flat(reset)[name], x, err_msg=name)
    assert len(jax.tree.leaves(adam(before).mu)) == len(owned) + sum(
        'lora_scale' in name and 'lora_scale' not in ''.join(owned) for name in partition.flatten(adam(before).mu))


# ---- Whole runs ------------------------------------------------------------------------------------------------------

class Kill(Exception):
    pass


def kill_at(step):
    def hook(n, state, metrics):
        if n == step:
            raise Kill
    return hook


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(settings of the rollouts, ...) -> (final state, rows of metrics) of a run to its end, each trained once."""
    done = {}

    def run(count=1, **fields):
        key = count, tuple(sorted(fields.items()))
        if key not in done:
            workdir = tmp_path_factory.mktemp('run')
            state = train.train(config_of(**fields), workdir, mesh=devices(count, data=count))
            done[key] = jax.device_get(state), read_metrics(workdir / 'metrics.jsonl')
        return done[key]
    return run


STEPS = [1, 2, 3, 4, 5, 6, 8]
SERIAL = dict(rollout__threaded=False)
STALE = dict(count=2, rollout__max_staleness=1, rollout__devices=2)


def test_synchronous_training_is_the_plain_loop(trained):
    config, mesh = config_of(), devices(1)
    experiment = train.build(config, mesh)
    generator, decoding = generator_lib.Generator(config, mesh), generator_lib.Decoding(config, mesh)
    state = jax.device_get(jax.jit(experiment.init)(jax.random.key(0)))
    _, step = start(config)
    for n in range(config.num_steps):
        batch = generator(decoding.convert(state.params['policy']), index=n, version=n)
        batch['policy_version'] = np.full(batch['mask'].shape, n, np.int32)
        state, _ = step(state, batch)
    threaded, rows = trained()
    serial, _ = trained(**SERIAL)
    assert_equal(threaded, state)
    assert_equal(serial, state)
    assert [row['step'] for row in rows] == STEPS  # the last two are reported together
    assert [row['rollout_staleness'] for row in rows] == [0] * 7 == [row['token_staleness'] for row in rows]
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-5) and all(row['logprob_gap_max'] < 1e-5 for row in rows)
    assert rows[-1]['reward'] > rows[0]['reward'] + 0.1


def test_stale_training_equals_its_serial_emulation(trained):
    threaded, rows = trained(**STALE)
    serial, serial_rows = trained(**STALE | SERIAL)
    assert_equal(threaded, serial)
    assert_differs(threaded.params, trained()[0].params)
    for found in (rows, serial_rows):
        assert [row['rollout_staleness'] for row in found] == [0, 1, 1, 1, 1, 1, 1]
        assert [row['token_staleness'] for row in found] == [0, 1, 1, 1, 1, 1, 1]
        assert found[0]['logprob_gap_max'] < 1e-5 < 1e-3 < min(row['logprob_gap_max'] for row in found[1:])


@pytest.mark.parametrize('mode', ['threaded', 'serial'])
def test_killed_and_resumed_is_bit_identical(mode, trained, tmp_path):
    """The batch in flight comes from weights that are gone: it has to be in the checkpoint."""
    settings = STALE | (SERIAL if mode == 'serial' else {})
    config, mesh = config_of(**{k: v for k, v in settings.items() if k != 'count'}), devices(2, data=2)
    with pytest.raises(Kill):
        train.train(config, tmp_path, mesh=mesh, hooks=[kill_at(5)])
    resumed = train.train(config, tmp_path, mesh=mesh)
    assert_equal(jax.device_get(resumed), trained(**STALE)[0])
    rows = read_metrics(tmp_path / 'metrics.jsonl')
    assert [row['step'] for row in rows] == STEPS
    assert [row['rollout_staleness'] for row in rows] == [0, 1, 1, 1, 1, 1, 1]
    assert rows[3]['rollout_generate_seconds'] == 0  # it was not generated again


def test_stopped_by_a_signal_and_resumed(trained, tmp_path):
    config = config_of(**{k: v for k, v in STALE.items() if k != 'count'})
    stop = lambda n, state, metrics: os.kill(os.getpid(), signal.SIGTERM) if n == 2 else None
    with pytest.raises(Stopped, match='0'):
        train.train(config, tmp_path, mesh=devices(2, data=2), hooks=[stop])
    assert_equal(jax.device_get(train.train(config, tmp_path, mesh=devices(2, data=2))), trained(**STALE)[0])


def test_resets_are_trained_on_and_published(tmp_path, monkeypatch):
    config, mesh = elastic('ppo', num_steps=5), devices(1)
    published, states, handed = {}, {}, publish.InProcess.publish

    def spy(self, version, params):
        published[version] = jax.device_get(params)
        handed(self, version, params)
    monkeypatch.setattr(publish.InProcess, 'publish', spy)
    keep = lambda n, state, metrics: states.update({n: jax.device_get(state)})
    train.train(config, tmp_path, mesh=mesh, hooks=[keep])
    rows = read_metrics(tmp_path / 'metrics.jsonl')
    resets = policy.elastic_config(config).resets(5)
    assert resets == [1, 3] and [row['reset'] for row in rows] == [0, 1, 0, 0.5]
    convert_weights = generator_lib.Decoding(config, mesh).convert
    for version in (1, 2, 3, 4):
        assert_equal(published[version], jax.device_get(convert_weights(states[version].params['policy'])))
    assert_equal(states[2].extra['elastic'].ema, states[2].extra['elastic'].init)
    assert rows[2]['logprob_gap_max'] < 1e-5  # batch 2 was sampled by the reset policy


def test_devices_apart():
    """`rollout.devices` leaves the learner the others."""
    config = config_of(rollout__devices=2, mesh=dict(data=-1, fsdp=1, tensor=1), batch_size=12)
    learner = train.mesh_of(config)
    generator = roles.generator_mesh(config, learner)
    assert learner.devices.size == 6 and generator.devices.size == 2
    assert not set(learner.devices.flat) & set(generator.devices.flat)
    shared = roles.generator_mesh(config_of(), devices(3, data=-1))
    assert list(shared.devices.flat) == jax.devices()[:3]


@pytest.mark.parametrize('scored', ['drawn', 'all'])
def test_learner_and_sampler_agree_where_sampling_is_cut(scored, tmp_path):
    """The first step on samples of the policy itself: ratio 1, nothing clipped, KL 0 from an identical reference; also
    on held-out prompts, after an update that is next to none."""
    config = config_of(algorithm__name='proximal_rloo', sampling__top_k=30, sampling__top_p=0.8, num_steps=1,
                       sampling__min_new_tokens=6, sampling__scored=scored, eval_every=1, eval_prompts=8,
                       data__heldout='train', optimizer__learning_rate__peak=1e-7)
    train.train(config, tmp_path, mesh=devices(1))
    first, held_out = read_metrics(tmp_path / 'metrics.jsonl')[:2]
    found = first | held_out
    assert found['ratio'] == pytest.approx(1, abs=1e-4) and found['clip_fraction'] == 0
    assert found['logprob_gap_max'] < 1e-4 and found['kl'] == pytest.approx(0, abs=1e-4)
    assert found['length'] > 6 and found['reward_std'] > 0
    assert found['eval_kl'] == pytest.approx(0, abs=1e-3)


def test_completions_without_reward_are_counted_and_left_out(tmp_path, caplog):
    config = config_of(algorithm__name='rloo', reward__function='policy_rewards:none', num_steps=2)
    train.train(config, tmp_path, mesh=devices(1))
    rows = read_metrics(tmp_path / 'metrics.jsonl')
    assert [row['missing_rewards'] for row in rows] == [1 / 16] * len(rows)
    assert all(np.isfinite(row['loss']) and 0 < row['reward'] < 1 and row['reward_std'] > 0 for row in rows)
    assert caplog.text.count('1 of 16 completions have no reward (None or NaN): they are left out') == 1


# ---- Processes -------------------------------------------------------------------------------------------------------

def generator_process(workdir):
    env = os.environ | {'PYTHONPATH': f'{TESTS.parents[1]}{os.pathsep}{TESTS}', 'JAX_PLATFORMS': 'cpu',
                        'JAX_NUM_CPU_DEVICES': '1'}
    flags = [f'--workdir={workdir}', '--trust', '--wait=120']
    return subprocess.Popen([sys.executable, '-m', 'experiments.generate', *flags],
                            cwd=TESTS.parents[1], env=env)


@pytest.mark.parametrize('transport', ['files', 'transfer'])
def test_a_generator_process_makes_the_batches_of_one_process(transport, trained, tmp_path):
    """Also when it is killed and started again (where the transport keeps weights for a second reader)."""
    if transport == 'transfer':
        try:
            publish.Transfer(tmp_path)
        except NotImplementedError as error:
            pytest.skip(str(error))
    workdir = tmp_path / 'run'
    generators = [generator_process(workdir)]

    def kill(n, state, metrics):
        if n == 3 and transport == 'files':
            generators[0].send_signal(signal.SIGKILL)
            generators[0].wait()
            generators.append(generator_process(workdir))
    config = config_of(rollout__max_staleness=1, rollout__transport=transport, rollout__timeout=300.0)
    try:
        state = train.train(config, workdir, mesh=devices(1), hooks=[kill])
        assert generators[-1].wait(120) == 0  # sent home
    finally:
        for process in generators:
            process.kill()
    expected, _ = trained(rollout__max_staleness=1)
    assert_equal(jax.device_get(state), expected)
    rows = read_metrics(workdir / 'metrics.jsonl')
    assert [row['rollout_staleness'] for row in rows] == [0, 1, 1, 1, 1, 1, 1]
    assert all(row['rollout_generate_seconds'] > 0 for row in rows)


# ---- Other ways to sample --------------------------------------------------------------------------------------------

class Rising:
    """A transport to which somebody publishes between any two looks; all versions are `params`."""

    def __init__(self, params, version):
        self.params, self.version, self.fetched = params, version, []

    def newest(self):
        self.version += 1
        return self.version

    def fetch(self, version):
        self.fetched.append(version)
        return self.params


@pytest.fixture(scope='module')
def sampled():
    """(weights for decoding, batch 3 under version 2) in the plain way."""
    config, mesh = config_of(), devices(1)
    decoding = generator_lib.Decoding(config, mesh)
    params = decoding.convert(stirred(jax.jit(architecture.init_decoder(config))(jax.random.key(0))))
    return params, generator_lib.Generator(config, mesh)(params, index=3, version=2)


def test_weights_taken_up_on_the_way(sampled):
    """Tokens of one response are of several versions, each with its own; with equal weights nothing else changes."""
    params, plain = sampled
    weights = Rising(params, 1)
    batch = generator_lib.Generator(config_of(rollout__chunk=3, rollout__max_staleness=1), devices(1), weights)(
        params, index=3, version=2)
    np.testing.assert_array_equal(batch['tokens'], plain['tokens'])
    np.testing.assert_allclose(batch['logprobs'], plain['logprobs'], atol=1e-5)
    # Before each chunk a look: 2 (what it has), 3, 4. The first token comes with the first chunk of three.
    versions = batch['policy_version'].reshape(-1, L)
    for row, length in zip(versions, batch['mask'].reshape(-1, L).sum(1)):
        assert list(row[:length]) == [2, 2, 2, 2, 3, 3, 3, 4][:length]
        assert (row[length:] == 4).all()
    assert weights.fetched == [3, 4]


def test_slots_give_the_same_samples(sampled):
    params, plain = sampled
    batch = generator_lib.Generator(config_of(rollout__slots=8), devices(1))(params, index=3, version=2)
    for name in ('tokens', 'mask', 'rewards', 'ended'):
        np.testing.assert_array_equal(batch[name], plain[name], err_msg=name)
    np.testing.assert_allclose(batch['logprobs'], plain['logprobs'], atol=1e-5)


@pytest.mark.parametrize('prompts', [2, 1])
def test_waves_give_the_same_samples(sampled, prompts):
    """A completion has a key of its own; `rollout.memory` says how many prompts a device completes at a time."""
    params, plain = sampled
    config, mesh = config_of(), devices(1)
    config.rollout.memory = waves.wave_bytes(config, prompts, mesh) / waves.GIB
    assert waves.count(config, mesh) == 8 // prompts
    batch = generator_lib.Generator(config, mesh)(params, index=3, version=2)
    for name in ('tokens', 'mask', 'rewards', 'ended'):
        np.testing.assert_array_equal(batch[name], plain[name], err_msg=name)
    np.testing.assert_allclose(batch['logprobs'], plain['logprobs'], rtol=5e-7)  # products of fewer rows: the last bits


def test_a_prompt_that_comes_twice_in_a_batch_is_answered_anew():
    """A data set smaller than a batch, or the seam between two epochs."""
    config, mesh = config_of(data__num_rows=5), devices(1)
    params = generator_lib.Decoding(config, mesh).convert(jax.jit(architecture.init_decoder(config))(jax.random.key(0)))
    batch = generator_lib.Generator(config, mesh)(params, index=0, version=0)
    assert len({row.tobytes() for row in batch['tokens'][:, 0, :P]}) == 5
    assert len({row.tobytes() for row in batch['tokens'].reshape(16, -1)[:, P:]}) == 16


# ---- Starting weights ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """{'sft', 'hf', 'reward_model'}: folders; and the parameters in them."""
    root = tmp_path_factory.mktemp('weights')
    config = config_of()
    module, params = architecture.decoder(config.model), jax.jit(architecture.init_decoder(config))(jax.random.key(5))
    files.save(root / 'hf', convert.to_torch('gpt_neox', module, params), convert.config_of('gpt_neox', module))
    scored = architecture.reward_model(config.model)
    value = stirred(jax.jit(scored.init)(jax.random.key(6), jnp.zeros((1, 2), jnp.int32))['params'])
    files.save(root / 'reward_model', convert.to_torch('gpt_neox', scored, value),
               convert.config_of('gpt_neox', scored))
    sft = base.sft().copy_and_resolve_references().unlock()
    sft.model = config.model
    (root / 'sft').mkdir()
    (root / 'sft' / 'config.json').write_text(sft.to_json())
    checkpointer = Checkpointer(root / 'sft' / 'checkpoints')
    checkpointer.save(1, {'params': params})
    checkpointer.close()
    return root, params, value


def started(config):
    experiment = train.build(config, devices(1))
    return experiment.warm_start(jax.jit(experiment.init)(jax.random.key(1)))


@pytest.mark.parametrize('name', ['sft', 'hf'])
def test_warm_start(name, weights):
    root, params, _ = weights
    state = started(config_of(weights=str(root / name)))
    assert_equal(state.params['policy'], params)
    assert_equal(state.extra['reference']['policy'], params)
    state = started(config_of(weights=str(root / name), algorithm__name='ppo', elastic__method='elastic_reset',
                              elastic__period=2))
    assert_equal(state.params['policy'], params)
    assert_equal(state.extra['elastic'].init['policy'], params)
    assert_equal(state.params['value']['backbone'], {k: v for k, v in params.items() if k != 'lm_head'})


def test_policy_and_critic_may_start_from_the_same_weights(weights, tmp_path):
    """Though the step takes the buffers of both for its own."""
    config = config_of(algorithm__name='ppo', weights=str(weights[0] / 'hf'))
    with pytest.raises(Kill):
        train.train(config, tmp_path, mesh=devices(1), hooks=[kill_at(3)])
    rows = read_metrics(tmp_path / 'metrics.jsonl')
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-5) and np.isfinite(rows[0]['value_loss'])


def test_a_critic_may_start_from_a_reward_model(weights):
    root, params, value = weights
    path = str(root / 'reward_model')
    state = started(config_of(algorithm__name='ppo', algorithm__critic_weights=path, weights=str(root / 'hf')))
    assert_equal(state.params['policy'], params)
    found = partition.flatten(state.params['value'])
    for name, x in partition.flatten(value).items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    with pytest.raises(ValueError, match='model.width=16, but algorithm.critic_weights=.*reward_model have 32'):
        started(config_of(algorithm__name='ppo', algorithm__critic_weights=path, model__width=16))


def test_a_reward_model_scores_the_last_token(weights, trained):
    root, _, value = weights
    config = config_of(reward__kind='model', reward__model=str(root / 'reward_model'), reward__batch_size=6,
                       reward__gold='policy_rewards:ascii_share', num_steps=1)
    fresh = jax.jit(architecture.init_decoder(config))(jax.random.key(0))
    params = generator_lib.Decoding(config, devices(1)).convert(fresh)
    batch = generator_lib.Generator(config, devices(1))(params, index=0, version=0)
    module = architecture.reward_model(config.model)
    for i in ((0, 0), (3, 1), (7, 1)):
        mask = np.concatenate([batch['prompt_mask'][i], batch['mask'][i]])
        text = batch['tokens'][i][mask]
        scores = module.apply({'params': value}, text[None])
        assert batch['rewards'][i] == pytest.approx(float(scores[0, -1]), abs=1e-4)
    plain = generator_lib.Generator(config_of(), devices(1))(params, index=0, version=0)
    np.testing.assert_array_equal(batch['gold'], plain['rewards'])

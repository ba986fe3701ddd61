"""Every training step: golden values, killed and resumed, sharded and not. On the quickstart's tiny configs."""
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs.dlc import quickstart
from experiments import encode, train
from experiments.dlc import sources
from experiments.dlc.encoder import Encoder
from experiments.runtime import partition
from experiments.runtime import mesh as mesh_lib

KINDS = ('encoder', 'code', 'none', 'embedding', 'code_model')


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    """A code store made by an untrained encoder: enough to train on."""
    root = tmp_path_factory.mktemp('store')
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references()
    config.num_steps = 1
    train.train(config, root / 'encoder', mesh=one_device())
    encode.encode(Encoder.load(root / 'encoder'), sources.image_source(config.data, 'heldout'), root / 'codes', image_size=16)
    return root / 'codes'


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(kind, store):
    whole = quickstart.get_config('tiny').copy_and_resolve_references()
    config = whole.generators[kind] if kind in whole.generators else whole[kind]
    if kind == 'encoder':
        config.groups, config.model.drop_path = 8, 0.25
    else:
        config.data.path = str(store)
    return config


def run(config, mesh, steps):
    """Final state and the losses of a few steps, from scratch, on `mesh`."""
    experiment = train.build(config, mesh)
    shardings = partition.state_shardings(jax.eval_shape(experiment.init, jax.random.key(0)), experiment.rules, mesh)
    batches, losses = experiment.open_batches(), []
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        state = jax.jit(experiment.init, out_shardings=shardings)(jax.random.key(0))
        step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
                       out_shardings=(shardings, mesh_lib.replicated(mesh)))
        for _ in range(steps):
            state, metrics = step(state, jax.device_put(next(batches), mesh_lib.batch_sharding(mesh)))
            losses.append({name: float(value) for name, value in metrics.items()})
    return state, losses


# If a value here moves, the training step computes something else: say in the commit what and why it should.
GOLDEN = {
    'encoder': {
        'loss': (10.3385, 10.07921, 9.780837),
        'loss_local': (4.720125, 4.635878, 4.346697),
        'loss_koleo': (0.7387081, 0.7445491, 0.9762959),
        'loss_ibot': (3.163898, 3.138, 3.210302)},
    'code': {
        'loss': (1.011845, 1.011606, 1.003071),
        'vb': (0.01515941, 0.01103644, 0.01001506),
        'grad_norm': (0.4909079, 0.5164075, 0.4972659)},
    'none': {
        'loss': (1.011845, 1.011606, 1.003071),
        'vb': (0.01515941, 0.01103644, 0.01001506),
        'grad_norm': (0.4909079, 0.5164075, 0.4972659)},
    'embedding': {
        'loss': (1.011845, 1.011606, 1.003071),
        'vb': (0.01515941, 0.01103644, 0.01001506),
        'grad_norm': (0.4909079, 0.5164075, 0.4972659)},
}


@functools.lru_cache(maxsize=None)
def unsharded(kind, store):
    return run(config_of(kind, store), one_device(), 3)


@pytest.mark.parametrize('kind', sorted(GOLDEN))
def test_golden_metrics_of_three_steps(kind, store):
    _, losses = unsharded(kind, store)
    for name, values in GOLDEN[kind].items():
        np.testing.assert_allclose([row[name] for row in losses], values, rtol=2e-5, err_msg=f'{kind}: {name}')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sizes', [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)], ids=['data2-fsdp2-tensor2', 'fsdp8'])
def test_sharded_equals_unsharded(kind, sizes, store):
    expected, expected_losses = unsharded(kind, store)
    state, losses = run(config_of(kind, store), mesh_lib.make_mesh(sizes), 3)
    for got, want in zip(losses, expected_losses):
        assert got['loss'] == pytest.approx(want['loss'], rel=2e-5)
    a, b = partition.flatten(state.params), partition.flatten(expected.params)
    for name in a:
        # Adam divides by the root of a tiny second moment, so rounding in a near-zero gradient moves a weight by a
        # fraction of the learning rate: compare on that scale.
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, rtol=1e-4, err_msg=name)


class Kill(Exception):
    pass


@pytest.mark.parametrize('kind', KINDS)
def test_killed_and_resumed_is_bit_identical(kind, store, tmp_path):
    def kill(step, state, metrics):
        if step == 6:
            raise Kill
    config = config_of(kind, store)
    whole = train.train(config, tmp_path / 'whole')
    with pytest.raises(Kill):
        train.train(config, tmp_path / 'cut', hooks=[kill])
    resumed = train.train(config, tmp_path / 'cut')
    assert int(resumed.step) == config.num_steps
    for name, leaf in partition.flatten(whole).items():
        other = partition.flatten(resumed)[name]
        if name == 'rng':
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other, err_msg=name)


def test_accumulated_encoder_step_is_finite_and_close(store):
    """Two microbatches: the same loss up to what is per microbatch (centers see half the batch, as two GPUs would)."""
    config = config_of('encoder', store)
    config.model.drop_path = 0.0
    _, whole = run(config, one_device(), 1)
    config.accumulate = 2
    _, parts = run(config, one_device(), 1)
    assert parts[0]['loss'] == pytest.approx(whole[0]['loss'], rel=1e-4)

"""Every training step: golden values, killed and resumed, sharded and not. On the quickstart's tiny configs."""
import functools
import zlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs.dlc import quickstart, quickstart_text
from experiments import train
from experiments.dlc.data import codestore_writer, digit_pairs, sources
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition

# A generator's condition changes an input of its step, not how the step is laid out or resumed: one stands for all.
TRAINED = ('encoder', 'code', 'code_model', 'text_to_code')


@pytest.fixture(scope='module', autouse=True)
def built_once():
    """One experiment for each config and mesh: jax then compiles its step once, however often a test trains it.

    A persistent compilation cache would do the same across workers, but programs that XLA:CPU reads back from one may
    order their collectives differently on each of several devices, and hang.
    """
    built, build = {}, train.build

    def once(config, mesh):
        key = config.to_json(), mesh
        if key not in built:
            built[key] = build(config.copy_and_resolve_references(), mesh)
        return built[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'build', once)
        yield


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    """Held-out digits with codes, embeddings and captions drawn at random: enough to train on."""
    path, rng = tmp_path_factory.mktemp('store') / 'codes', np.random.default_rng(0)
    source = sources.image_source(quickstart.get_config('tiny').encoder.data, 'heldout')
    meta = dict(num_codes=16, vocab_size=16, captions=True)
    with codestore_writer.writer(path, num=len(source), meta=meta) as opened:
        opened.append({'codes': rng.integers(0, 16, (len(source), 16)), 'labels': source.labels,
                       'images': source.images, 'embeddings': rng.normal(size=(len(source), 32)).astype(np.float32)},
                      names=[source.name(i) for i in range(len(source))],
                      captions=[digit_pairs.caption(*rng.integers(0, (10, 10, 4))) for _ in range(len(source))])
    return path


def one_device():
    return mesh_lib.make_mesh({}, jax.devices()[:1])


def config_of(kind, store):
    whole = quickstart.get_config('tiny').copy_and_resolve_references()
    if kind == 'text_to_code':
        config = quickstart_text.get_config('tiny').text_to_code.copy_and_resolve_references()
        config.model.num_codes = config.model.vocab_size = 16
        config.data.path, config.eval_every, config.mesh = str(store), 0, whole.encoder.mesh
        config.model.vocab_multiple = 8
        return config
    config = whole.generators[kind] if kind in whole.generators else whole[kind]
    if kind == 'encoder':
        config.groups, config.model.drop_path = 8, 0.25
    else:
        config.data.path = str(store)
    return config


def stirred(tree):
    """Every weight moved a little: a DiT starts with gates at zero, where no condition reaches the loss."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    noise = lambda path, x: np.random.default_rng(zlib.crc32(partition.path_name(path).encode())).normal(size=x.shape)
    return jax.tree_util.tree_unflatten(structure, [np.asarray(x + 0.05 * noise(path, x), x.dtype) for path, x in flat])


def stirred_start(experiment):
    state = jax.jit(experiment.init)(jax.random.key(0))
    return state.replace(params=stirred(state.params), ema=stirred(state.ema))


def run(config, mesh, steps):
    """Final state and the losses of a few steps, from a start that is `stirred`, on `mesh`."""
    experiment = train.build(config, mesh)
    shardings = partition.state_shardings(jax.eval_shape(experiment.init, jax.random.key(0)), experiment.rules, mesh)
    batches, losses = experiment.open_batches(), []
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        state = jax.device_put(stirred_start(experiment), shardings)
        step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
                       out_shardings=(shardings, mesh_lib.replicated(mesh)))
        for _ in range(steps):
            state, metrics = step(state, jax.device_put(next(batches), mesh_lib.batch_sharding(mesh)))
            losses.append({name: float(value) for name, value in metrics.items()})
    return state, losses


# If a value here moves, the training step computes something else: say in the commit what and why it should.
GOLDEN = {
    'encoder': {
        'loss': (9.597246, 9.35825, 9.332188),
        'loss_local': (4.645153, 4.451489, 4.40796),
        'loss_koleo': (0.03567655, 0.1171874, 0.3134862),
        'loss_ibot': (2.7285, 2.627741, 2.662995)},
    'code': {
        'loss': (1.217925, 1.117645, 1.161537),
        'vb': (0.01938407, 0.0122853, 0.01160269),
        'grad_norm': (2.14935, 2.132209, 2.037043)},
    'none': {
        'loss': (1.214448, 1.115246, 1.157498),
        'vb': (0.01928894, 0.01227418, 0.01157832),
        'grad_norm': (2.132959, 2.142454, 2.03115)},
    'embedding': {
        'loss': (1.209434, 1.103683, 1.165552),
        'vb': (0.0191665, 0.01213071, 0.01163796),
        'grad_norm': (2.054043, 2.088825, 2.023784)},
    'text_to_code': {
        'loss': (1.380787, 1.520448, 1.280982),
        'masked': (0.4902344, 0.5175781, 0.4492188),
        'grad_norm': (0.605735, 0.8730795, 0.6826809)},
    'embedding_model': {
        'loss': (1.045508, 1.093093, 1.011759),
        'grad_norm': (0.2920426, 0.3179719, 0.2843958)},
    'code_model': {
        'loss': (50.16687, 51.51381, 44.87456),
        'nats_per_token': (3.135429, 3.219613, 2.80466),
        'grad_norm': (16.48222, 16.62554, 9.947751)},
}


@functools.lru_cache(maxsize=None)
def unsharded(kind, store):
    return run(config_of(kind, store), one_device(), 3)


@pytest.mark.parametrize('kind', GOLDEN)
def test_golden_metrics_of_three_steps(kind, store):
    _, losses = unsharded(kind, store)
    for name, values in GOLDEN[kind].items():
        np.testing.assert_allclose([row[name] for row in losses], values, rtol=2e-5, err_msg=f'{kind}: {name}')


@pytest.mark.parametrize('kind', TRAINED)
def test_sharded_equals_unsharded(kind, store):
    expected, expected_losses = unsharded(kind, store)
    state, losses = run(config_of(kind, store), mesh_lib.make_mesh(dict(data=2, fsdp=2, tensor=2)), 3)
    for got, want in zip(losses, expected_losses):
        assert got['loss'] == pytest.approx(want['loss'], rel=2e-5)
    a, b = partition.flatten(state.params), partition.flatten(expected.params)
    for name in a:
        # Adam divides by the root of a tiny second moment, so rounding in a near-zero gradient moves a weight by a
        # fraction of the learning rate: compare on that scale.
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, rtol=1e-4, err_msg=name)


class Kill(Exception):
    pass


@pytest.mark.parametrize('kind', TRAINED)
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


def accumulating(centering, store):
    """The encoder's config in two microbatches. Its `groups` are given: masks and neighbours do not depend on that."""
    config = config_of('encoder', store)
    config.model.drop_path, config.loss.centering, config.accumulate = 0.0, centering, 2
    return config


def test_microbatches_with_centers_take_the_step_of_the_whole_batch(store):
    """Targets come row by row from centers of earlier steps, and every term is a mean over rows, crops or groups."""
    config = accumulating('center', store)
    parts_state, (parts,) = run(config, one_device(), 1)
    config.accumulate = 1
    whole_state, (whole,) = run(config, one_device(), 1)
    for name in set(whole) - {'sem_usage'}:  # which is no mean: the perplexity of the mean code of the rows at hand
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name
    np.testing.assert_allclose(parts_state.extra['dino'], whole_state.extra['dino'], rtol=1e-4, atol=1e-7)


def test_microbatches_with_sinkhorn_are_each_a_batch_of_their_own(store):
    """Sinkhorn-Knopp spreads the rows at hand over the prototypes, so each microbatch has targets of its own: the step
    is the mean over microbatches, not that of the whole batch."""
    config = accumulating('sinkhorn_knopp', store)
    stepped, (got,) = run(config, one_device(), 1)
    experiment, batch = train.build(config, one_device()), next(train.build(config, one_device()).open_batches())
    state, loss = stirred_start(experiment), jax.jit(experiment.loss)
    halves = [loss(state.params, state, {name: np.split(x, 2)[i] for name, x in batch.items()}, jax.random.key(1))
              for i in range(2)]
    assert got['loss'] == pytest.approx(np.mean([value for value, _ in halves]), rel=1e-5)
    for name in halves[0][1]['metrics']:
        assert got[name] == pytest.approx(np.mean([aux['metrics'][name] for _, aux in halves]), rel=1e-5), name
    for name in ('dino', 'ibot'):  # centers start at 0 and move by 1 - momentum
        mean = np.mean([aux['means'][name] for _, aux in halves], axis=0)
        np.testing.assert_allclose(stepped.extra[name], (1 - config.loss.center_momentum) * mean, rtol=1e-4, atol=1e-7)

"""The generator of continuous embeddings: its network, what it keeps of the data, and samples."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.dlc import quickstart
from dlc_jax.models import rdm
from experiments import train
from experiments.dlc import embedding_model
from experiments.dlc.data import codestore_writer
from experiments.dlc.embedding_model import EmbeddingModel
from experiments.runtime import mesh as mesh_lib
from random_params import random_params

DIM = 6
TINY = dict(embedding_dim=DIM, width=16, depth=2, time_dim=8)


def test_published_size_has_the_parameters_of_its_layers():
    model = rdm.RDM(embedding_dim=256, **rdm.SIZES['L12'])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256)), jnp.zeros(1, jnp.int32))['params']
    w, t, d = 1536, 256, 256
    block = 2 * (2 * w) + (w * w + w) + (t * w + w) + (w * w + w)
    whole = (d * w + w) + (w * t + t) + (t * t + t) + 12 * block + 2 * w + (w * d + d)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == whole == 62_721_280


def test_starts_at_zero_and_reads_embedding_and_time():
    model = rdm.RDM(**TINY)
    x, t = jax.random.normal(jax.random.key(1), (3, DIM)), jnp.array([0, 500, 999])
    fresh = jax.jit(model.init)(jax.random.key(0), x, t)
    run = jax.jit(model.apply)
    assert (run(fresh, x, t) == 0).all()
    params = {'params': random_params(model, x, t)}
    out = np.asarray(run(params, x, t))
    assert out.shape == (3, DIM) and np.abs(out - run(params, x + 1, t)).min() > 1e-4
    assert np.abs(out - run(params, x, t[::-1]))[[0, 2]].max() > 1e-3
    np.testing.assert_allclose(out[1:], run(params, jnp.roll(x, -1, 0), jnp.roll(t, -1))[:2], rtol=1e-5)  # row by row


@pytest.mark.parametrize('x, t, match', [((3, DIM + 1), 3, 'embedding_dim=6'), ((DIM,), 1, 'embedding_dim=6'),
                                         ((3, DIM), 1, 'one timestep a row')])
def test_shapes_that_do_not_fit_are_named(x, t, match):
    model = rdm.RDM(**TINY)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(x), jnp.zeros(t, jnp.int32))


# ---- In an experiment ------------------------------------------------------------------------------------------------

EMBEDDINGS = np.random.default_rng(0).normal([0, 1, 2, 3, 4, 5], [1, 2, 3, 0.1, 0.2, 0], (40, DIM)).astype(np.float32)


def tiny_config(path, embeddings=EMBEDDINGS):
    with codestore_writer.writer(path, num=len(embeddings), meta=dict(num_codes=2, vocab_size=3)) as store:
        store.append({'codes': np.zeros((len(embeddings), 2), np.uint8), 'embeddings': embeddings},
                     names=[str(i) for i in range(len(embeddings))])
    config = quickstart.get_config('tiny').embedding_model.copy_and_resolve_references()
    config.data.path, config.batch_size = str(path), 8
    config.model.update(dict(width=16, embedding_dim=DIM, time_dim=8))
    config.optimizer.weight_decay.peak = 1.0
    return config


def test_statistics_are_those_of_each_coordinate():
    found = embedding_model.statistics(EMBEDDINGS, block=7)
    np.testing.assert_allclose(found['mean'], EMBEDDINGS.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found['std'][:5], EMBEDDINGS.std(0)[:5], rtol=1e-5)
    assert found['std'][5] == 1  # a coordinate that does not vary


def steps(config, count=2):
    """States after the warm start and after `count` steps, and the losses between."""
    mesh = mesh_lib.make_mesh({}, jax.devices()[:1])
    experiment = train.build(config, mesh)
    first = state = experiment.warm_start(jax.jit(experiment.init)(jax.random.key(0)))
    step, batches, losses = jax.jit(experiment.step), experiment.open_batches(), []
    for _ in range(count):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics['loss']))
    return first, state, losses


def test_the_datas_statistics_travel_with_the_weights_and_are_not_trained(tmp_path):
    first, last, losses = steps(tiny_config(tmp_path / 'store'))
    known = embedding_model.statistics(EMBEDDINGS)
    for params in (first.params, first.ema, last.params, last.ema):  # whatever the weight decay
        for name in known:
            np.testing.assert_array_equal(params['embeddings'][name], known[name], err_msg=name)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.params['network'], last.params['network'])
    assert any(jax.tree.leaves(moved))
    # The loss is that of standardized coordinates: the same whatever their unit and origin.
    *_, scaled = steps(tiny_config(tmp_path / 'scaled', EMBEDDINGS * 10 + 7))
    np.testing.assert_allclose(scaled, losses, rtol=1e-3)


def test_samples_have_the_datas_scale_and_depend_on_their_row_alone(tmp_path):
    config = tiny_config(tmp_path / 'store')
    params = {'network': random_params(embedding_model.make_model(config), jnp.zeros((1, DIM)), jnp.zeros(1, int)),
              'embeddings': {'mean': jnp.zeros(DIM), 'std': jnp.ones(DIM)}}
    draw = lambda params, batch_size: EmbeddingModel(config, params).sample(jax.random.key(2), 5, batch_size=batch_size)
    plain = draw(params, 8)
    assert plain.shape == (5, DIM) and np.abs(np.diff(plain, axis=0)).min() > 1e-4
    np.testing.assert_allclose(draw(params, 2), plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
    known = jax.tree.map(jnp.asarray, embedding_model.statistics(EMBEDDINGS))
    np.testing.assert_allclose(draw(params | {'embeddings': known}, 8), plain * known['std'] + known['mean'], rtol=1e-5,
                               atol=1e-5)


def test_a_store_of_other_embeddings_is_named(tmp_path):
    config = tiny_config(tmp_path / 'store')
    config.model.embedding_dim = DIM + 1
    with pytest.raises(ValueError, match='embeddings have 6 dimensions but model.embedding_dim=7'):
        embedding_model.open_batches(config)

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.metrics.inception_features import inception_features
from dlc_jax.models.inception import AVERAGE, MAX, PARTITION_RULES, InceptionOutput, InceptionV3, Mixed, resize_bilinear


def test_published_shapes_and_count():
    module = InceptionV3()
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))['params']
    assert sum(x.size for x in jax.tree.leaves(params)) == 23_885_392  # what the released file holds, with statistics
    out = jax.eval_shape(lambda p, x: module.apply({'params': p}, x), params, jnp.zeros((2, 40, 64, 3), jnp.uint8))
    assert (out.pool.shape, out.spatial.shape) == ((2, 2048), (2, 7 * 17 * 17))
    assert out.logits.shape == out.unbiased_logits.shape == (2, 1008)
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        assert any(re.fullmatch(pattern, '/'.join(k.key for k in path)) for pattern, _ in PARTITION_RULES)


def test_resize_samples_at_multiples_without_half_pixel_shift():
    ramp = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 3, 1))
    up = np.asarray(resize_bilinear(ramp, 8))
    np.testing.assert_allclose(up[0, :, 0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_array_equal(resize_bilinear(ramp, 2)[0, :, 0, 0], [0, 2])  # no antialiasing
    np.testing.assert_allclose(resize_bilinear(ramp.swapaxes(1, 2), 8)[0, 0, :, 0], up[0, :, 0, 0])
    image = jax.random.uniform(jax.random.key(0), (1, 9, 9, 3))
    np.testing.assert_array_equal(resize_bilinear(image, 9), image)


def test_pools_ignore_their_padding():
    x = -jnp.ones((1, 3, 3, 2))
    for pool in (AVERAGE, MAX):
        np.testing.assert_allclose(Mixed(((pool,),), unit=None).apply({}, x), x, rtol=1e-6)


@pytest.mark.parametrize('module, images, message', [
    (InceptionV3(), np.zeros((2, 32, 32, 1), np.uint8), 'repeat a single channel'),
    (InceptionV3(image_size=64), np.zeros((2, 32, 32, 3), np.uint8), 'at least 75'),
])
def test_bad_input_is_named(module, images, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), images)


class Means:
    """Stands in for the network: features that tell which image they came from."""

    def apply(self, variables, x):
        assert x.shape[0] == 4  # one program: every call has the full batch
        value = variables['params'] * x.astype(jnp.float32).mean((1, 2))
        return InceptionOutput(value, value, value, value)


@pytest.mark.parametrize('cuts', [(10,), (1,) * 10, (3, 0, 6, 1), (4, 4, 2)])
@pytest.mark.parametrize('devices', [1, 4])
def test_features_do_not_depend_on_how_the_stream_is_cut(cuts, devices):
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 6, 3), np.uint8)
    stream = iter(np.split(images, np.cumsum(cuts)[:-1]))
    mesh = jax.make_mesh((devices,), ('data',), devices=jax.devices()[:devices])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    out = inception_features(Means(), jnp.float32(2), stream, batch_size=4, sharding=sharding)
    assert isinstance(out.pool, np.ndarray) and out.pool.dtype == np.float32
    np.testing.assert_allclose(out.pool, 2 * images.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize('batches, message', [
    ([], 'holds no image'),
    ([np.zeros((2, 4, 4, 3), np.float32)], 'must be uint8'),
    ([np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 5, 3), np.uint8)], r'\(4, 5\) after images of \(4, 4\)'),
])
def test_bad_streams_are_named(batches, message):
    with pytest.raises(ValueError, match=message):
        inception_features(Means(), jnp.float32(1), batches, batch_size=4)


def test_real_network_is_batch_invariant():
    module = InceptionV3(image_size=75)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images[:1])['params']
    rng = np.random.default_rng(1)  # compiling the initialisers of 94 layers would take longer than all the rest
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) * np.float32(2 * x.shape[-1] / x.size) ** 0.5
        if x.ndim > 1 else np.ones(x.shape, np.float32), shapes)
    out = inception_features(module, params, [images], batch_size=2)
    again = inception_features(module, params, iter(np.split(images, 3)), batch_size=2)
    chex.assert_trees_all_equal(out, again)
    assert out.pool.shape == (3, 2048) and np.isfinite(out.logits).all() and out.pool.std(0).max() > 0
    alone = inception_features(module, params, [images[2:]], batch_size=2)
    np.testing.assert_array_equal(alone.pool, out.pool[2:])  # the padding changes nothing

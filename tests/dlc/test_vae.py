import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.models.vae import PARTITION_RULES, AutoencoderKL, sample_posterior

TINY = dict(widths=(16, 32), depth=1, num_groups=8)


@pytest.fixture(scope='module')
def tiny():
    vae = AutoencoderKL(**TINY)
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
    rng = np.random.default_rng(0)  # compiling the initialisers would take longer than all the rest
    return vae, jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=0)
def encode(vae, params, images):
    return vae.apply({'params': params}, images, method='encode')


def test_released_configuration_has_the_released_parameter_count():
    vae = AutoencoderKL()
    params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))['params']
    assert sum(x.size for x in jax.tree.leaves(params)) == 83_653_863
    assert vae.stride == 8
    mean, logvar = jax.eval_shape(lambda p, x: vae.apply({'params': p}, x, method='encode'), params,
                                  jnp.zeros((2, 256, 192, 3)))
    assert mean.shape == logvar.shape == (2, 32, 24, 4)
    images = jax.eval_shape(lambda p, z: vae.apply({'params': p}, z, method='decode'), params, mean)
    assert images.shape == (2, 256, 192, 3)


def test_bfloat16_compute_keeps_float32_outputs(tiny):
    vae, params = tiny
    x = np.random.default_rng(1).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    low = AutoencoderKL(**TINY, dtype=jnp.bfloat16)
    mean, logvar = encode(low, params, x)
    assert mean.dtype == logvar.dtype == jnp.float32
    np.testing.assert_allclose(mean, encode(vae, params, x)[0], atol=0.05)
    images = jax.eval_shape(lambda p, z: low.apply({'params': p}, z, method='decode'), params, mean)
    assert images.dtype == jnp.float32


def test_logvar_is_clamped(tiny):
    vae, params = tiny
    bias = params['quant_conv']['bias']
    for value, bound in ((1e3, 20), (-1e3, -30)):
        params = {**params, 'quant_conv': {**params['quant_conv'], 'bias': jnp.full_like(bias, value)}}
        mean, logvar = encode(vae, params, np.zeros((1, 8, 8, 3), np.float32))
        assert np.all(np.asarray(logvar) == bound) and np.all(np.abs(mean) > 100)


def test_posterior_sample_has_the_posterior_moments():
    mean, logvar = jnp.full((64, 64), 3.0), jnp.full((64, 64), 2 * jnp.log(0.5))
    z = np.asarray(sample_posterior(jax.random.key(0), mean, logvar))
    assert abs(z.mean() - 3) < 0.03 and abs(z.std() - 0.5) < 0.03
    np.testing.assert_array_equal(sample_posterior(jax.random.key(0), mean, jnp.full((64, 64), -1e9)), mean)


def test_every_parameter_has_a_partition_rule(tiny):
    for path, _ in jax.tree_util.tree_leaves_with_path(tiny[1]):
        name = '/'.join(k.key for k in path)
        assert any(re.fullmatch(pattern, name) for pattern, _ in PARTITION_RULES), name


@pytest.mark.parametrize('call, message', [
    (lambda vae, p: vae.apply(p, jnp.zeros((1, 9, 8, 3)), method='encode'), '9x8 is not divisible by 2'),
    (lambda vae, p: vae.apply(p, jnp.zeros((1, 8, 8, 1)), method='encode'), r'must be \[B, H, W, 3\]'),
    (lambda vae, p: vae.apply(p, jnp.zeros((1, 8, 8, 3), jnp.uint8), method='encode'), 'must be float'),
    (lambda vae, p: vae.apply(p, jnp.zeros((1, 8, 8, 3)), method='decode'), r'must be \[B, h, w, 4\]'),
    (lambda vae, p: AutoencoderKL(widths=(16, 20), num_groups=8).apply(p, jnp.zeros((1, 8, 8, 3))), '20 is not div'),
])
def test_bad_input_is_named(tiny, call, message):
    vae, params = tiny
    with pytest.raises(ValueError, match=message):
        call(vae, {'params': params})

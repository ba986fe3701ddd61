"""With a key a row, what a sampler draws for a row is the same alone, among others and in any order."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import row_keys
from dlc_jax.diffusion.discrete import DiscreteDiffusion
from dlc_jax.diffusion.gaussian import GaussianDiffusion

KEYS = jax.random.split(jax.random.key(0), 6)


def gaussian(keys, rows, **sampler):
    process = GaussianDiffusion(num_timesteps=20, variance='fixed_small').respaced(4)
    return process.sample(lambda x, t: 0.1 * x, keys, (rows, 2, 2, 1), **sampler)


def discrete(process, keys, rows, **sampler):
    scores = lambda x, sigma: jnp.zeros((*x.shape, 7))
    vocab = DiscreteDiffusion(process=process, vocab_size=6 if process == 'absorbing' else 7)
    return vocab.sample(scores, keys, (rows, 5), num_steps=4, **sampler)


SAMPLERS = {
    'ddpm': gaussian, 'ddim': lambda k, n: gaussian(k, n, sampler='ddim', eta=0.5),
    'remasking': lambda k, n: discrete('absorbing', k, n, sampler='remasking', eta=0.2, window=(0.0, 1.0)),
    'first_hitting': lambda k, n: discrete('absorbing', k, n, sampler='first_hitting'),
    'uniform': lambda k, n: discrete('uniform', k, n, sampler='analytic')}


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_row_is_a_function_of_its_key(name):
    sample = jax.jit(SAMPLERS[name], static_argnums=1)
    whole = np.asarray(sample(KEYS, 6))
    np.testing.assert_allclose(sample(KEYS[::-1], 6), whole[::-1], atol=1e-6)
    np.testing.assert_allclose(sample(KEYS[2:4], 2), whole[2:4], atol=1e-6)
    assert any((whole[0] != row).any() for row in whole[1:])


def test_one_key_draws_the_batch_together():
    """As before there were keys of rows."""
    key = jax.random.key(1)
    np.testing.assert_array_equal(row_keys.draw(jax.random.normal, key, (3, 2)), jax.random.normal(key, (3, 2)))
    np.testing.assert_array_equal(row_keys.bernoulli(key, jnp.full((3, 2), 0.5)),
                                  jax.random.bernoulli(key, jnp.full((3, 2), 0.5), mode='high'))
    for ours, jax_own in zip(row_keys.split(key, 3), jax.random.split(key, 3)):
        assert ours == jax_own
    assert row_keys.fold_in(key, 3) == jax.random.fold_in(key, 3)


def test_as_many_keys_as_rows():
    with pytest.raises(ValueError, match='6 keys for 3 rows'):
        row_keys.draw(jax.random.normal, KEYS, (3, 2))
    old = jax.random.PRNGKey(0)
    assert not row_keys.are_rows(old) and row_keys.are_rows(jax.random.split(old, 3))

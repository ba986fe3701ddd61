import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dlc_jax.models import sedd
from experiments.runtime import partition

TINY = dict(vocab_size=5, length=6, width=32, depth=2, num_heads=4, cond_dim=16)


def make(**fields):
    """A tiny SEDD, parameters none of which is zero, tokens and sigma."""
    model = sedd.SEDD(**(TINY | fields))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.num_states, (4, 6)), jnp.int32)
    sigma = jnp.array([1e-3, 0.3, 1.0, 6.0])
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, sigma)['params']
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), params), tokens, sigma


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, sigma):
    return model.apply({'params': params}, tokens, sigma)


@pytest.mark.parametrize('size, length, vocab, count', [
    ('small', 512, 256, 93_168_897), ('small', 128, 1024, 94_054_401), ('small', 32, 4096, 98_702_337),
    ('medium', 512, 256, 322_549_249), ('medium', 128, 1024, 323_729_665), ('medium', 32, 4096, 329_925_889)])
def test_parameter_counts_are_the_papers(size, length, vocab, count):
    model = sedd.SEDD(vocab, length, **sedd.SIZES[size])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, length), jnp.int32), jnp.ones(1))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_own_token_scores_zero_after_training_too():
    model, params, tokens, sigma = make()
    out = apply(model, params, tokens, sigma)
    assert out.shape == (4, 6, 6)
    own = jnp.take_along_axis(out, tokens[..., None], -1)
    assert (own == 0).all() and (jnp.count_nonzero(out, axis=-1) == 5).all()


def test_uniform_process_has_no_mask_and_no_scale():
    model, params, tokens, sigma = make(process='uniform', scale_by_sigma=False)
    assert apply(model, params, tokens, sigma).shape == (4, 6, 5)
    assert params['embed'].shape == (5, 32)


def test_initialisation():
    """Every other token is equally likely; matrices as PyTorch draws them; gates and head at zero."""
    model, _, tokens, sigma = make(width=64, depth=1)
    params = jax.jit(model.init)(jax.random.key(0), tokens, sigma)['params']
    for name in ('embed', 'pos_embed'):
        assert 0.9 / 8 < jnp.abs(params[name]).max() <= 1 / 8, name
    qkv = params['blocks']['attn']['qkv']['kernel']  # fan-in 64, whatever the shape of the output
    assert 0.99 / 8 < jnp.abs(qkv).max() <= 1 / 8
    for path in (('blocks', 'adaln'), ('final', 'adaln'), ('final', 'linear')):
        assert not params[path[0]][path[1]]['kernel'].any(), path

    out, s = np.asarray(apply(model, params, tokens, sigma), np.float64), np.asarray(sigma, np.float64)
    want = np.broadcast_to((-np.log(np.expm1(s)) - np.log(5))[:, None, None], out.shape).copy()
    np.put_along_axis(want, np.asarray(tokens)[..., None], 0.0, -1)
    np.testing.assert_allclose(out, want, rtol=1e-5)


@pytest.mark.parametrize('fields, without', [({}, set()), ({'shared_embedding': False}, {'embed'}),
                                             ({'learned_positions': False}, {'pos_embed'})])
def test_position_is_seen_with_every_embedding(fields, without):
    model, params, _, sigma = make(**fields)
    assert not without & set(params)
    same = apply(model, params, jnp.full((4, 6), 3), sigma)
    if fields == {'learned_positions': False}:  # attention over equal values cannot tell where it looks
        np.testing.assert_allclose(same[:, 0], same[:, 1], atol=1e-5)
    else:
        assert jnp.abs(same[:, 0] - same[:, 1]).max() > 1e-2
    mixed = apply(model, params, jnp.tile(jnp.array([[0, 1, 2, 3, 4, 4]]), (4, 1)), sigma)
    assert jnp.abs(mixed[:, 4] - mixed[:, 5]).max() > 1e-3  # rotary


def test_bfloat16_blocks_return_float32_scores_close_to_float32():
    model, params, tokens, sigma = make(scale_by_sigma=False)  # so that the head's own digits show
    out = apply(sedd.SEDD(**TINY, scale_by_sigma=False, dtype=jnp.bfloat16), params, tokens, sigma)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, apply(model, params, tokens, sigma), atol=0.1)
    assert len(np.unique(np.asarray(out).view(np.uint32) & 0xFFFF)) > 10  # not bfloat16 values in float32 clothes


def test_dropout_acts_in_training_only():
    model, params, tokens, sigma = make(dropout=0.5)
    run = jax.jit(lambda p, key: model.apply({'params': p}, tokens, sigma, train=True, rngs={'dropout': key}))
    first, second = run(params, jax.random.key(0)), run(params, jax.random.key(1))
    evaluated = apply(model, params, tokens, sigma)  # with no rng at all
    assert jnp.abs(first - second).max() > 1e-3 and jnp.abs(first - evaluated).max() > 1e-3


def test_loop_and_memory_options_change_neither_scores_nor_gradients():
    model, params, tokens, sigma = make()
    other = sedd.SEDD(**TINY, remat='dots', unroll=True)
    grad = lambda m: jax.jit(jax.grad(lambda p: m.apply({'params': p}, tokens, sigma).sum()))(params)
    chex.assert_trees_all_close(grad(model), grad(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('fields', [{}, {'shared_embedding': False}])
def test_sharded_equals_unsharded(fields):
    model, params, tokens, sigma = make(**fields)
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    shardings = partition.param_shardings(params, sedd.PARTITION_RULES, mesh)
    split = {str(s.spec) for s in jax.tree.leaves(shardings)}
    assert any('tensor' in s for s in split) and any('fsdp' in s for s in split)
    got = apply(model, jax.device_put(params, shardings), tokens, sigma)
    np.testing.assert_allclose(got, apply(model, params, tokens, sigma), atol=1e-5)


def test_every_large_matrix_of_the_paper_model_is_split():
    model = sedd.SEDD(256, 512, **sedd.SIZES['medium'])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 512), jnp.int32), jnp.ones(1))['params']
    mesh = jax.make_mesh((1, 8, 1), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    shardings = partition.param_shardings(shapes, sedd.PARTITION_RULES, mesh)
    assert partition.bytes_per_device(shapes, shardings) < 1.02 * sum(x.size * 4 for x in jax.tree.leaves(shapes)) / 8


@pytest.mark.parametrize('fields, tokens, sigma, message', [
    (dict(process='absorb'), (2, 6), (2,), 'process'), (dict(process='uniform'), (2, 6), (2,), 'scale_by_sigma'),
    (dict(), (2, 7), (2,), 'length'), (dict(), (2, 6), (), 'sigma'), (dict(num_heads=5), (2, 6), (2,), 'num_heads')])
def test_bad_input_is_named(fields, tokens, sigma, message):
    model = sedd.SEDD(**(TINY | fields))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(tokens, jnp.int32), jnp.ones(sigma))


def test_a_token_outside_the_vocabulary_cannot_pass_unnoticed():
    model, params, tokens, sigma = make()
    assert jnp.isnan(apply(model, params, tokens.at[0, 0].set(6), sigma)).any()

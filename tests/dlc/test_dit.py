"""The DiT by itself: layout, initial state, conditions, null, dropout, sharding, bad input."""
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.models import dit
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from random_params import random_params

L, V, CLASSES, E = 6, 5, 3, 7
FIELDS = dict(input_size=8, channels=3, patch_size=2, width=16, depth=2, num_heads=2, num_codes=L, vocab_size=V,
              num_classes=CLASSES, embedding_dim=E)
B = 4
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B, 8, 8, 3))
T = jnp.array([0, 10, 500, 999])
COND = {'code': jax.random.randint(KEY, (B, L), 0, V), 'class': jnp.array([0, 1, 2, 1]),
        'embedding': jax.random.normal(KEY, (B, E)), 'none': None}


def make(condition='code', **fields):
    """A DiT and random parameters (at its own initial ones the output is zero)."""
    module = dit.DiT(**(FIELDS | fields), condition=condition)
    return module, random_params(module, X[:1], T[:1], None if condition == 'none' else COND[condition][:1])


NONE_DROPPED = jnp.full(B, False)


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def forward(module, params, cond, drop, x, t, key, train):
    return module.apply({'params': params}, x, t, cond, drop=drop, train=train, rngs={'dropout': key})


def run(module, params, cond, drop=NONE_DROPPED, *, x=X, t=T, train=False):
    return forward(module, params, cond, drop, x, t, KEY, train=train)


def test_patches_keep_row_column_channel_order():
    x = jnp.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    tokens = dit.patchify(x, 2)
    assert tokens.shape == (2, 16, 12)
    np.testing.assert_array_equal(tokens[1, 5].reshape(2, 2, 3), x[1, 2:4, 2:4])  # token 5 = row 1, column 1
    np.testing.assert_array_equal(dit.unpatchify(tokens, 2, 4), x)


def test_starts_at_zero_with_the_originals_distributions():
    module = dit.DiT(**(FIELDS | dict(width=64)))
    params = jax.jit(module.init)(KEY, X, T, COND['code'])['params']
    flat = partition.flatten(params)
    zero = [name for name, x in flat.items() if (x == 0).all()]  # every block the identity, the output zero
    assert set(zero) == {n for n in flat if n.endswith('bias')} | {
        'blocks/adaln/kernel', 'final/adaln/kernel', 'final/linear/kernel'}
    codes = np.asarray(flat['cond_embed/codes'])
    np.testing.assert_array_equal(codes[:, V], np.broadcast_to(codes[0, V], (L, 64)))  # null drawn once
    np.testing.assert_allclose(codes[:, :V].std(), 1 / 8, rtol=0.1)
    np.testing.assert_allclose(np.asarray(flat['time_embed/fc1/kernel']).std(), 0.02, rtol=0.1)
    for name, fan in (('blocks/attn/qkv/kernel', 64 + 192), ('blocks/attn/proj/kernel', 128),
                      ('blocks/mlp/fc1/kernel', 64 + 256), ('blocks/mlp/fc2/kernel', 64 + 256),
                      ('patch_embed/kernel', 12 + 64)):
        bound = np.sqrt(6 / fan)  # Xavier, uniform
        assert 0.9 * bound < np.abs(flat[name]).max() <= bound, name
        if name.startswith('blocks'):
            assert (flat[name][0] != flat[name][1]).any(), name


def test_named_sizes():
    assert dit.SIZES == {'S': dict(width=384, depth=12, num_heads=6), 'B': dict(width=768, depth=12, num_heads=12),
                         'L': dict(width=1024, depth=24, num_heads=16), 'XL': dict(width=1152, depth=28, num_heads=16)}


@pytest.mark.parametrize('patch_size, learn_sigma', [(4, True), (8, False)])
def test_patch_sizes_and_fixed_variance(patch_size, learn_sigma):
    module, params = make(patch_size=patch_size, learn_sigma=learn_sigma)
    out = run(module, params, COND['code'])
    assert out.shape == (B, 8, 8, 6 if learn_sigma else 3) and out.dtype == jnp.float32 and jnp.isfinite(out).all()


NULL = {'code': jnp.full((B, L), V), 'class': jnp.full(B, CLASSES)}


@pytest.mark.parametrize('condition', ['code', 'class', 'embedding'])
def test_condition_null_and_dropout(condition):
    module, params = make(condition)
    cond = COND[condition]
    plain, null = run(module, params, cond), run(module, params, cond, jnp.full(B, True))
    assert jnp.abs(plain - null).max() > 1e-3
    assert jnp.abs(plain - run(module, params, jnp.roll(cond, 1, axis=0))).max() > 1e-3  # the condition matters
    want = NULL[condition] if condition in NULL else jnp.broadcast_to(params['cond_embed']['null'], (B, E))
    np.testing.assert_allclose(null, run(module, params, want), rtol=1e-5, atol=1e-6)
    mixed = run(module, params, cond, jnp.array([True, False, True, False]))
    np.testing.assert_allclose(mixed, jnp.stack([null[0], plain[1], null[2], plain[3]]), rtol=1e-5, atol=1e-6)
    always = run(module.clone(cond_dropout=1.0), params, cond, train=True)
    np.testing.assert_allclose(always, null, rtol=1e-5, atol=1e-6)
    # In training, rows that the caller drops are dropped too.
    both = run(module.clone(cond_dropout=1e-9), params, cond, jnp.array([True, False, True, False]), train=True)
    np.testing.assert_allclose(both, mixed, rtol=1e-5, atol=1e-6)


def test_dropout_takes_whole_samples_at_its_rate():
    module, params = make()
    n = 400
    codes = jnp.tile(COND['code'][:1], (n, 1))
    out = run(module.clone(cond_dropout=0.3), params, codes, jnp.full(n, False), x=jnp.zeros((n, 8, 8, 3)),
              t=jnp.zeros(n, int), train=True)[:, 0, 0, 0]
    assert len(np.unique(np.round(out, 4))) == 2  # conditioned, or all positions on the null
    assert 0.2 < np.mean(np.abs(out - np.median(out)) > 1e-4) < 0.4


def test_without_condition_drop_changes_nothing():
    module, params = make('none')
    assert 'cond_embed' not in params
    np.testing.assert_array_equal(run(module, params, None), run(module, params, None, jnp.full(B, True)))


def test_soft_codes():
    module, params = make()
    codes = COND['code']
    soft = jax.nn.one_hot(codes, V)
    np.testing.assert_allclose(run(module, params, soft), run(module, params, codes), rtol=1e-4, atol=1e-5)
    drop = jnp.array([True, False, False, True])
    np.testing.assert_allclose(run(module, params, soft, drop), run(module, params, codes, drop), rtol=1e-4, atol=1e-5)
    blend = run(module, params, (soft + jnp.roll(soft, 1, axis=0)) / 2)
    assert jnp.abs(blend - run(module, params, codes)).max() > 1e-3


def test_a_code_outside_the_vocabulary_does_not_go_unnoticed():
    module, params = make()
    out = run(module, params, COND['code'].at[1, 2].set(V + 1))
    assert jnp.isnan(out[1]).all() and jnp.isfinite(out[jnp.array([0, 2, 3])]).all()


@functools.partial(jax.jit, static_argnums=0)
def gradient(module, params, cond):
    drop = jnp.array([True, False, False, False])
    return jax.grad(lambda p: (module.apply({'params': p}, X, T, cond, drop=drop) ** 2).sum())(params)


def test_every_parameter_gets_a_gradient():
    for condition in ('code', 'embedding'):
        module, params = make(condition)
        for name, grad in partition.flatten(gradient(module, params, COND[condition])).items():
            assert jnp.isfinite(grad).all() and (grad != 0).any(), (condition, name)


def test_remat_and_unroll_compute_the_same():
    module, params = make()
    want = gradient(module, params, COND['code'])
    got = gradient(module.clone(remat='dots', unroll=True), params, COND['code'])
    chex.assert_trees_all_close(got, want, rtol=2e-3, atol=1e-3)


def test_bfloat16_is_close():
    module, params = make()
    want = run(module, params, COND['code'])
    got = run(module.clone(dtype=jnp.bfloat16), params, COND['code'])
    assert got.dtype == jnp.float32
    assert jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()


def test_sharded_equals_unsharded():
    module, params = make()
    mesh = mesh_lib.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    shardings = partition.param_shardings(params, dit.PARTITION_RULES, mesh)
    split = [name for name, s in partition.flatten(shardings).items() if any(s.spec)]
    assert len(split) >= 8
    want = run(module, params, COND['code'])
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        rows = mesh_lib.batch_sharding(mesh)
        put = lambda x: jax.device_put(x, rows)
        got = run(module, jax.device_put(params, shardings), put(COND['code']), put(NONE_DROPPED), x=put(X), t=put(T))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('condition', dit.CONDITIONS)
def test_partition_rules_cover_every_parameter(condition):
    _, params = make(condition)
    partition.param_shardings(params, dit.PARTITION_RULES, mesh_lib.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))


@pytest.mark.parametrize('fields, args, word', [
    (dict(condition='text'), (), 'condition'),
    (dict(patch_size=3), (), 'patch_size'),
    (dict(num_codes=0), (), 'num_codes'),
    (dict(width=18), (), 'width'),
    (dict(num_heads=3), (), 'num_heads'),
    ({}, dict(x=X[:, :4]), 'input_size'),
    ({}, dict(t=T[:2]), 't has shape'),
    ({}, dict(cond=None), 'cond'),
    ({}, dict(cond=COND['code'][:, :3]), 'num_codes'),
    ({}, dict(cond=COND['code'][:2]), 'cond'),
    ({}, dict(cond=jnp.zeros((B, L, V + 1))), 'vocab_size'),
    (dict(condition='class'), dict(cond=COND['code']), 'condition'),
    (dict(condition='embedding'), dict(cond=jnp.zeros((B, E + 1))), 'embedding_dim'),
    (dict(remat='some'), (), 'remat'),
])
def test_bad_input_is_one_line_that_names_it(fields, args, word):
    module = dit.DiT(**(FIELDS | fields))
    inputs = dict(x=X, t=T, cond=COND['code']) | dict(args)
    with pytest.raises(ValueError, match=word) as error:
        jax.eval_shape(lambda: module.init(KEY, inputs['x'], inputs['t'], inputs['cond']))
    assert '\n' not in str(error.value)

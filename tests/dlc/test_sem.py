import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.models import sem, vit
from experiments.runtime import mesh as mesh_lib
from random_params import random_params
from rlhf_jax.weights.rules import flatten, param_shapes

TINY = dict(width=16, depth=1, num_heads=2, patch_size=4, num_registers=2, pos_grid=2, layer_scale=0.5,
            num_codes=4, vocab_size=6)
IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)


def make(**fields):
    model = sem.SEMEncoder(**TINY | fields)
    return model, random_params(model, IMAGES)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('train', 'only_codes'))
def run(model, params, images, temperature=None, **flags):
    return model.apply({'params': params}, images, temperature=temperature, **flags)


def joint_norm(z, scale, bias):
    z = z - z.mean((1, 2), keepdims=True)
    return z / np.sqrt((z ** 2).mean((1, 2), keepdims=True) + 1e-6) * scale + bias


# The published totals, less the 2 * 1024 values of sem_cls_norm, which the original allocates and never reads.
@pytest.mark.parametrize('form, published', [
    ('plain', 1_109_943_296), ('shared', 975_987_712), ('pos_shared', 976_512_000)])
def test_parameter_counts_of_the_published_encoders(form, published):
    model = sem.SEMEncoder(**vit.SIZES['L'], num_codes=512, vocab_size=256, form=form)
    shapes = flatten(param_shapes(model, jnp.zeros((1, 224, 224, 3))))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == published - 2 * 1024


def test_parameters_are_the_backbones_and_five_more():
    ours = flatten(param_shapes(make()[0], IMAGES))
    fields = {k: v for k, v in TINY.items() if k not in ('num_codes', 'vocab_size')}
    backbone = flatten(param_shapes(vit.VisionTransformer(**fields), IMAGES))
    assert {k: v.shape for k, v in ours.items() if k in backbone} == {k: v.shape for k, v in backbone.items()}
    assert {k: v.shape for k, v in ours.items() if k not in backbone} == {
        'sem_embed/kernel': (48, 4, 6), 'sem_norm/scale': (4, 6), 'sem_norm/bias': (4, 6), 'sem_out/kernel': (4, 6, 16)}


@pytest.mark.parametrize('form', sem.FORMS)
def test_class_token_is_rebuilt_from_the_sem_alone(form):
    model, params = make(form=form)
    out = run(model, params, IMAGES)
    assert out.logits.shape == out.sem.shape == (4, 4, 6) and out.dlc.dtype == jnp.int32
    s = np.asarray(out.sem)
    if form == 'plain':
        back = np.einsum('blv,lvd->bd', s, params['sem_out']['kernel'])
    else:
        each = np.einsum('blv,vd->bld', s, params['sem_out_shared']['kernel'])
        back = (each + (params['sem_bias'] if form == 'pos_shared' else 0)).mean(1)
    back = back - back.mean(-1, keepdims=True)
    back = back / np.sqrt((back ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.cls, back * params['norm']['scale'] + params['norm']['bias'], atol=1e-4)
    # pos_shared has no evaluation mode
    np.testing.assert_array_equal(run(model, params, IMAGES, train=True).cls, out.cls)


def test_one_layer_norm_spans_all_positions():
    model, params = make()
    params['sem_norm'] = {'scale': jnp.ones((4, 6)), 'bias': jnp.zeros((4, 6))}
    logits = np.asarray(run(model, params, IMAGES).logits)
    np.testing.assert_allclose(logits.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(logits.std((1, 2)), 1, atol=1e-3)
    assert np.abs(logits.mean(2)).max() > 0.05


def test_sem_reads_tokens_before_the_final_norm():
    model, params = make()
    out = run(model, params, IMAGES)
    u = np.asarray(out.prenorm[:, :3]).reshape(4, -1)
    z = joint_norm(np.einsum('bd,dlv->blv', u, params['sem_embed']['kernel']), **params['sem_norm'])
    np.testing.assert_allclose(out.logits, z, atol=1e-4)
    np.testing.assert_array_equal(out.dlc, z.argmax(-1))


def test_codes_do_not_need_the_way_back_nor_the_temperature():
    model, params = make()
    full = run(model, params, IMAGES)
    needed = {k: v for k, v in params.items() if k not in ('sem_out', 'norm')}
    bare = run(model, needed, IMAGES, only_codes=True)
    assert bare.cls is None and bare.patches is None
    np.testing.assert_array_equal(bare.dlc, full.dlc)
    codes = jax.jit(lambda p: model.apply({'params': p}, IMAGES, method='codes'))(needed)
    np.testing.assert_array_equal(codes, full.dlc)
    cold = run(model, needed, IMAGES, 1e-5, only_codes=True)
    np.testing.assert_array_equal(cold.dlc, full.dlc)
    np.testing.assert_allclose(cold.sem, jax.nn.one_hot(full.dlc, 6), atol=1e-6)
    warm = run(model, params, IMAGES, 3.0)
    np.testing.assert_allclose(warm.sem, jax.nn.softmax(full.logits / 3), atol=1e-6)
    np.testing.assert_allclose(run(model.clone(temperature=3.0), params, IMAGES).sem, warm.sem, atol=1e-6)


def test_lowest_index_wins_a_tie():
    model, params = make()
    params['sem_norm'] = {'scale': jnp.zeros((4, 6)), 'bias': jnp.zeros((4, 6)).at[:, jnp.array([2, 5])].set(1.0)}
    np.testing.assert_array_equal(run(model, params, IMAGES, only_codes=True).dlc, 2)


def test_gradients_pass_the_softmax_and_patches_pass_by():
    model, params = make()
    layers = {name: params[name] for name in ('sem_embed', 'sem_out')}

    def loss(layers):
        out = model.apply({'params': params | layers}, IMAGES)
        return (out.cls ** 3).sum(), (out.patches ** 3).sum()

    through_cls, through_patches = jax.jit(jax.jacrev(loss))(layers)
    assert all(np.abs(grad).max() > 1e-6 for grad in jax.tree.leaves(through_cls))
    assert not any(np.abs(grad).max() for grad in jax.tree.leaves(through_patches))


def test_sem_layers_start_as_torch_linear_layers_do():
    model = sem.SEMEncoder(**TINY | dict(num_codes=8, vocab_size=32))
    params = jax.jit(model.init)(jax.random.key(0), IMAGES[:1])['params']
    for name, fan_in in (('sem_embed', 48), ('sem_out', 256), ('patch_embed', 48)):
        kernel = np.asarray(params[name]['kernel'])
        assert np.abs(kernel).max() <= fan_in ** -0.5
        np.testing.assert_allclose(kernel.std(), (3 * fan_in) ** -0.5, rtol=0.1)
    assert np.abs(params['patch_embed']['bias']).max() > 0 and not np.asarray(params['mask_token']).any()
    np.testing.assert_allclose(np.asarray(params['blocks']['mlp']['fc1']['kernel']).std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(params['blocks']['ls1']['gamma'], 0.5)


def test_bfloat16_compute_keeps_logits_and_sem_in_float32():
    model, params = make(dtype=jnp.bfloat16)
    out = run(model, params, IMAGES)
    assert out.logits.dtype == out.sem.dtype == jnp.float32 and out.cls.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.sem.sum(-1), 1, atol=1e-6)
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)  # inputs are; sums must not be
    u = rounded(out.prenorm[:, :3]).reshape(4, -1)
    z = joint_norm(np.einsum('bd,dlv->blv', u, rounded(params['sem_embed']['kernel'])), **params['sem_norm'])
    np.testing.assert_allclose(out.logits, z, atol=1e-4)
    np.testing.assert_allclose(out.sem, run(make()[0], params, IMAGES).sem, atol=0.03)


@pytest.mark.parametrize('form', ['plain', 'pos_shared'])
def test_rules_cover_every_parameter_and_sharded_equals_unsharded(form):
    model, params = make(form=form)
    mesh = jax.make_mesh((1, 2, 4), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)
    model = model.clone(num_heads=4)
    params = random_params(model, IMAGES)

    def sharding(path, leaf):
        name = '/'.join(k.key for k in path)
        return NamedSharding(mesh, next(spec for pattern, spec in sem.PARTITION_RULES if re.fullmatch(pattern, name)))

    placed = jax.device_put(params, jax.tree_util.tree_map_with_path(sharding, params))
    rows = jax.device_put(IMAGES, NamedSharding(mesh, P(('data', 'fsdp'))))
    one = run(model, params, IMAGES)
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        many = run(model, placed, rows)
    assert many.sem.sharding.is_equivalent_to(NamedSharding(mesh, P('data', 'tensor', 'fsdp')), 3)  # rows come together
    np.testing.assert_array_equal(many.dlc, one.dlc)
    np.testing.assert_allclose(many.sem, one.sem, atol=1e-5)
    np.testing.assert_allclose(many.cls, one.cls, atol=1e-4)
    assert not placed['sem_embed']['kernel'].sharding.is_fully_replicated


@pytest.mark.parametrize('fields, temperature, message', [
    (dict(form='other'), None, "form='other'"),
    (dict(temperature=0.0), None, 'temperature=0.0 must be positive'),
    (dict(), -1.0, 'temperature=-1.0 must be positive'),
])
def test_bad_input_is_named(fields, temperature, message):
    model = sem.SEMEncoder(**TINY | fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, temperature=temperature))

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.models import vit
from random_params import random_params
from rlhf_jax.weights.rules import flatten, param_shapes

TINY = dict(width=16, depth=2, num_heads=2, patch_size=4, num_registers=2, pos_grid=3, layer_scale=0.5)


IMAGES = np.random.default_rng(1).normal(size=(8, 12, 8, 3)).astype(np.float32)  # 3 x 2 patches


def make(**fields):
    model = vit.VisionTransformer(**TINY | fields)
    return model, random_params(model, IMAGES)


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def run(model, params, images, masks=None, train=False, key=None):
    return model.apply({'params': params}, images, masks, train=train, rngs={'dropout': key} if train else None)


@pytest.mark.parametrize('size, total', [
    ('S', 22_058_112), ('B', 86_583_552), ('L', 304_372_736), ('g', 1_136_486_912)])
def test_parameter_counts_of_the_released_register_models(size, total):
    shapes = flatten(param_shapes(vit.VisionTransformer(**vit.SIZES[size]), jnp.zeros((1, 224, 224, 3))))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == total


def test_initial_scales_are_fields():
    model = vit.VisionTransformer(**TINY | dict(width=64, pos_grid=8, init_std=0.3, pos_init_std=0.5))
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)['params']
    assert params['pos_embed'].std() == pytest.approx(0.5, rel=0.05)
    for kernel in (params['blocks']['attn']['qkv']['kernel'], params['blocks']['mlp']['fc1']['kernel']):
        assert kernel.std() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize('ffn', ['mlp', 'swiglu'])
def test_shapes_and_order_of_tokens(ffn):
    model, params = make(ffn=ffn)
    out = run(model, params, IMAGES)
    assert out.cls.shape == (8, 16) and out.registers.shape == (8, 2, 16) and out.patches.shape == (8, 6, 16)
    assert out.prenorm.shape == (8, 9, 16)
    joined = jnp.concatenate([out.cls[:, None], out.registers, out.patches], 1)
    scale, bias = params['norm']['scale'], params['norm']['bias']
    x = out.prenorm - out.prenorm.mean(-1, keepdims=True)
    np.testing.assert_allclose(joined, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + bias, atol=1e-5)


def test_patchify_is_a_strided_convolution():
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, 8, 12, 3)).astype(np.float32), rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    conv = jax.lax.conv_general_dilated(images, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(vit.patchify(images, 4) @ kernel.reshape(-1, 5), conv.reshape(2, 6, 5), atol=1e-4)


def test_masked_patches_are_not_seen_but_keep_their_position():
    model, params = make()
    masks = jnp.zeros((8, 6), bool).at[:, jnp.array([1, 2])].set(True)
    apply = lambda x: run(model, params, x, masks).prenorm
    images = jnp.asarray(IMAGES)
    hidden = images.at[:, :4, 4:].add(1.0).at[:, 4:8, :4].add(-1.0)  # the pixels of patches 1 and 2
    np.testing.assert_array_equal(apply(images), apply(hidden))
    assert np.abs(apply(images) - apply(images.at[:, :4, :4].add(1.0))).max() > 1e-3
    tokens = run(model, params | {'blocks': jax.tree.map(jnp.zeros_like, params['blocks'])}, images, masks).prenorm
    position = vit.interpolate_pos_embed(params['pos_embed'], (3, 2))[0, 1:]
    np.testing.assert_allclose(tokens[0, 4], params['mask_token'][0] + position[1], atol=1e-6)
    np.testing.assert_allclose(tokens[0, 1:3], params['register_tokens'][0], atol=1e-6)  # no position


def test_position_embeddings_interpolate():
    pos = np.random.default_rng(0).normal(size=(1, 26, 4)).astype(np.float32)
    np.testing.assert_array_equal(vit.interpolate_pos_embed(pos, (5, 5)), pos)
    flat = jnp.ones((1, 26, 4)) * jnp.arange(4.0)
    for antialias in (True, False):
        out = vit.interpolate_pos_embed(pos, (2, 7), antialias=antialias)
        assert out.shape == (1, 15, 4) and out.dtype == jnp.float32
        np.testing.assert_array_equal(out[:, 0], pos[:, 0])
        still = vit.interpolate_pos_embed(flat, (2, 7), antialias=antialias)
        np.testing.assert_allclose(still, flat[:, :15], atol=1e-5)


def test_paths_drop_for_a_fixed_number_of_each_group():
    block = vit.Block(2, layer_scale=0.5, drop_path=0.3, drop_path_groups=2)
    x = np.random.default_rng(0).normal(size=(20, 3, 8)).astype(np.float32)
    params = random_params(block.clone(drop_path=0.0), x)
    params['ls2']['gamma'] *= 0  # only the attention branch shows
    residual = jax.jit(lambda key: block.apply({'params': params}, x, rngs={'dropout': key})[0] - x)
    dropped = residual(jax.random.key(3))
    full = jax.jit(lambda: block.clone(drop_path=0.0).apply({'params': params}, x)[0] - x)()
    went = np.abs(dropped).max((1, 2)) > 0
    assert went[:10].sum() == 7 and went[10:].sum() == 7
    assert (went[:10] != went[10:]).any()  # groups draw by themselves
    np.testing.assert_allclose(dropped[went], full[went] * 10 / 7, atol=1e-6)
    assert (went != (np.abs(residual(jax.random.key(4))).max((1, 2)) > 0)).any()


def test_paths_drop_in_training_only():
    model, params = make(drop_path=0.4)
    plain = run(model.clone(drop_path=0.0), params, IMAGES).prenorm
    np.testing.assert_array_equal(run(model, params, IMAGES).prenorm, plain)
    trained = run(model, params, IMAGES, train=True, key=jax.random.key(0)).prenorm
    assert np.abs(trained - plain).max() > 1e-3


def test_dropping_paths_within_shards_moves_no_example():
    block = vit.Block(2, drop_path=0.3, drop_path_groups=8)
    x = jax.ShapeDtypeStruct((80, 3, 8), jnp.float32)
    params = jax.eval_shape(block.init, {'params': jax.random.key(0), 'dropout': jax.random.key(0)}, x)['params']
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
    run = jax.jit(lambda p, x, key: block.apply({'params': p}, x, rngs={'dropout': key})[0],
                  in_shardings=(everywhere, rows, everywhere), out_shardings=rows)
    text = run.lower(params, x, jax.random.key(0)).compile().as_text()
    collectives = '(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
    moved = re.findall(rf'= (.*) {collectives}(?:-start)?\(', text)
    assert not [shapes for shapes in moved if 'f32[' in shapes]


def test_bfloat16_compute_keeps_float32_parameters():
    model, params = make()
    out = run(model.clone(dtype=jnp.bfloat16), params, IMAGES)
    assert out.cls.dtype == out.prenorm.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.cls.astype(jnp.float32), run(model, params, IMAGES).cls, atol=0.15)
    shapes = jax.eval_shape(model.clone(dtype=jnp.bfloat16).init, jax.random.key(0), IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_remat_and_unrolling_change_nothing():
    model, params = make(drop_path=0.3)

    def grads(m):
        loss = lambda p: (run(m, p, IMAGES, train=True, key=jax.random.key(0)).cls ** 2).sum()
        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(grads(model), grads(model.clone(remat='full')), rtol=2e-4, atol=2e-4)
    unrolled = run(model.clone(unroll=True), params, IMAGES).prenorm
    np.testing.assert_allclose(unrolled, run(model, params, IMAGES).prenorm, atol=1e-5)


@pytest.mark.parametrize('fields', [dict(), dict(ffn='swiglu', layer_scale=0.0, num_registers=0)])
def test_rules_cover_every_parameter_and_sharded_equals_unsharded(fields):
    model, params = make(**fields)
    mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 3)

    def sharding(path, leaf):
        name = '/'.join(k.key for k in path)
        spec = next(spec for pattern, spec in vit.PARTITION_RULES if re.fullmatch(pattern, name))
        return NamedSharding(mesh, spec)

    placed = jax.device_put(params, jax.tree_util.tree_map_with_path(sharding, params))
    rows = jax.device_put(IMAGES, NamedSharding(mesh, P(('data', 'fsdp'))))
    np.testing.assert_allclose(run(model, placed, rows).prenorm, run(model, params, IMAGES).prenorm, atol=1e-5)
    large = {name for name, leaf in flatten(placed).items()
             if leaf.ndim > 1 and name.endswith('kernel') and leaf.sharding.is_fully_replicated}
    assert not large


@pytest.mark.parametrize('fields, size, masks, message', [
    ({}, (10, 8), None, 'not divisible by patch_size=4'),
    ({}, (8, 8), (1, 5), r'masks have shape \(1, 5\)'),
    (dict(ffn='moe'), (8, 8), None, "ffn='moe'"),
    (dict(num_heads=3), (8, 8), None, 'not divisible by num_heads 3'),
    (dict(drop_path=0.3, drop_path_groups=2), (8, 8), None, 'drop_path_groups=2 does not divide the batch of 1'),
])
def test_bad_input_is_named(fields, size, masks, message):
    model = vit.VisionTransformer(**TINY | fields)
    with pytest.raises(ValueError, match=message):
        keys = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
        masks = None if masks is None else jnp.zeros(masks, bool)
        jax.eval_shape(lambda: model.init(keys, jnp.zeros((1, *size, 3)), masks, train=True))

"""The call that the decoders share: padding, packing, caches, the two layouts of their blocks."""
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from rlhf_jax.models import decoder, gpt2, gpt_neox, layers, llama
from rlhf_jax.weights.rules import flatten, param_shapes
from tiny_models import MODELS, random_params

FILES = {'gpt2': gpt2, 'gpt_neox': gpt_neox, 'llama': llama}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 7))
# Hand-counted: left padding, right padding, a hole, and three sequences packed.
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1], [1, 1, 2, 2, 2, 3]])
POSITIONS = np.array([[0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 2], [0, 1, 1, 1, 2, 3], [0, 1, 0, 1, 2, 0]])


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    """(name, module, params, jitted apply)."""
    module = MODELS[request.param]
    apply = jax.jit(module.apply, static_argnames=('cache_length', 'output'))
    return request.param, module, random_params(module), apply


def test_positions_count_the_tokens():
    np.testing.assert_array_equal(decoder.positions_of(jnp.asarray(MASK)), POSITIONS)
    np.testing.assert_array_equal(decoder.positions_of(jnp.asarray(MASK[:3] == 1)), POSITIONS[:3])


def test_logits_do_not_see_later_tokens(model):
    _, module, params, _ = model
    # Of the logits at 3, the gradient by the input embeddings (through a perturbation of each token's row).
    def score(noise):
        table = params['embed'].at[:7].add(noise)
        out = module.apply({'params': params | {'embed': table, 'lm_head': params.get('lm_head', {})}},
                           jnp.arange(7)[None], output='hidden')
        return (out[0, 3] ** 2).sum()

    moved = np.abs(jax.jit(jax.grad(score))(jnp.zeros((7, 16)))).sum(1)
    assert (moved[:4] > 1e-4).all() and (moved[4:] == 0).all()


def test_padded_rows_equal_unpadded_ones(model):
    _, _, params, apply = model
    full = apply({'params': params}, TOKENS)
    padded = np.zeros((4, 10), np.int64)
    mask = np.zeros((4, 10), bool)
    for row, start in enumerate((0, 0, 3, 2)):
        padded[row, start:start + 7], mask[row, start:start + 7] = TOKENS[row % 2], True
    got = apply({'params': params}, padded, mask=mask)
    for row, start in enumerate((0, 0, 3, 2)):
        np.testing.assert_allclose(got[row, start:start + 7], full[row % 2], atol=1e-5)


def test_packed_sequences_equal_separate_ones(model):
    _, _, params, apply = model
    packed = apply({'params': params}, TOKENS.reshape(1, -1), mask=np.repeat([[1, 2]], 7, 1))
    np.testing.assert_allclose(packed.reshape(2, 7, -1), apply({'params': params}, TOKENS), atol=1e-5)


@pytest.mark.parametrize('per_row', [False, True])
def test_decoding_with_a_cache_equals_the_full_forward(model, per_row):
    _, module, params, apply = model
    mask = np.ones((2, 7), bool)
    mask[1, :2] = False  # a left-padded row
    full = apply({'params': params}, TOKENS, mask=mask)
    last = np.array([3, 3])
    logits, cache = apply({'params': params}, TOKENS[:, :4], mask=mask[:, :4], at=last, cache_length=9)
    np.testing.assert_allclose(logits, full[:, 3], atol=1e-5)
    assert cache.length == 9 and int(cache.index) == 4 and np.array_equal(cache.mask.sum(1), [4, 2])
    if per_row:
        cache = cache.replace(index=jnp.full(2, cache.index))
    split, split_params = decoder.split_blocks(module, params)
    step = jax.jit(split.apply)
    for t in range(4, 7):
        logits, cache = step({'params': split_params}, TOKENS[:, t:t + 1], cache=cache)
        np.testing.assert_allclose(logits[:, 0], full[:, t], atol=1e-5)


def test_several_tokens_at_once_equal_one_by_one(model):
    _, module, params, apply = model
    full = apply({'params': params}, TOKENS)
    _, cache = apply({'params': params}, TOKENS[:, :3], cache_length=7)
    split, split_params = decoder.split_blocks(module, params)
    logits, cache = jax.jit(split.apply)({'params': split_params}, TOKENS[:, 3:], cache=cache)
    np.testing.assert_allclose(logits, full[:, 3:], atol=1e-5)
    assert int(cache.index) == 7 and bool(cache.mask.all())


def test_rows_of_a_cache_at_their_own_places(model):
    """Rows of different lengths, each written where it ends, as in a batch that is refilled."""
    _, module, params, apply = model
    full = apply({'params': params}, TOKENS)
    mask = np.arange(5) < np.array([[5], [2]])
    _, cache = apply({'params': params}, TOKENS[:, :5], mask=mask, cache_length=9)
    cache = cache.replace(index=jnp.array([5, 2]))
    split, split_params = decoder.split_blocks(module, params)
    following = np.array([[TOKENS[0, 5]], [TOKENS[1, 2]]])
    logits, cache = jax.jit(split.apply)({'params': split_params}, following, cache=cache)
    np.testing.assert_allclose(logits[:, 0], np.stack([full[0, 5], full[1, 2]]), atol=1e-5)
    np.testing.assert_array_equal(cache.index, [6, 3])


def test_layouts_of_the_blocks(model):
    name, module, params, apply = model
    split, split_params = decoder.split_blocks(module, params)
    assert set(split_params) == (set(params) - {'blocks'}) | {'block_0', 'block_1'}
    got = jax.jit(split.apply)({'params': split_params}, TOKENS)
    np.testing.assert_allclose(got, apply({'params': params}, TOKENS), atol=1e-5)
    again, again_params = decoder.split_blocks(split, split_params, dtype=jnp.bfloat16)
    assert again == split
    for path, x in flatten(again_params).items():
        assert x.dtype == (jnp.float32 if 'norm' in path or x.ndim == 1 else jnp.bfloat16), path


def test_every_parameter_has_a_partition_rule(model):
    name, module, params, _ = model
    rules = FILES[name].PARTITION_RULES
    mesh = mesh_lib.make_mesh({'fsdp': 4, 'tensor': 2})
    wide = module.clone(vocab_size=24, width=32, num_heads=4, tied=False, **({'attention_bias': True, 'mlp_bias': True}
                                                                            if name == 'llama' else {}))
    shapes = param_shapes(wide, np.zeros((1, 1), np.int32))
    stacked = partition.flatten(partition.param_shardings(shapes, rules, mesh))
    held = partition.bytes_per_device(shapes, partition.param_shardings(shapes, rules, mesh))
    assert held < 0.3 * sum(4 * x.size for x in jax.tree.leaves(shapes))
    split_shapes = jax.eval_shape(lambda p: decoder.split_blocks(wide, p)[1], shapes)
    split = partition.flatten(partition.param_shardings(split_shapes, decoder.split_rules(rules), mesh))
    for path, sharding in split.items():
        if path.startswith('block_1/'):
            assert tuple(sharding.spec) == tuple(stacked[path.replace('block_1', 'blocks')].spec)[1:], path


def test_outputs(model):
    _, _, params, apply = model
    hidden = apply({'params': params}, TOKENS, output='hidden')
    assert hidden.shape == (2, 7, 16)
    logits, same = apply({'params': params}, TOKENS, output='both', at=np.array([2, 5]))
    np.testing.assert_allclose(same, np.asarray(hidden)[[0, 1], [2, 5]], atol=1e-6)
    np.testing.assert_allclose(logits, np.asarray(apply({'params': params}, TOKENS))[[0, 1], [2, 5]], atol=1e-5)
    with pytest.raises(ValueError, match="output='logit'"):
        apply({'params': params}, TOKENS, output='logit')


def test_bfloat16_logits_are_summed_in_float32(model):
    _, module, params, apply = model
    got = jax.jit(module.clone(dtype=jnp.bfloat16).apply)({'params': params}, TOKENS)
    want = apply({'params': params}, TOKENS)
    assert got.dtype == jnp.float32
    assert not np.array_equal(got, got.astype(jnp.bfloat16))  # they were not rounded on the way
    np.testing.assert_allclose(got, want, atol=0.05 * float(np.abs(want).max()))


def test_remat_and_unroll_change_nothing():
    module = MODELS['llama']
    params = random_params(module)
    loss = lambda m: jax.jit(jax.grad(lambda p: jax.nn.logsumexp(m.apply({'params': p}, TOKENS)).sum()))(params)
    want = loss(module)
    for got in (loss(module.clone(remat='full')), loss(module.clone(unroll=True))):
        chex.assert_trees_all_close(got, want, atol=1e-5)


def test_bad_calls_are_named(model):
    name, module, params, apply = model
    _, cache = apply({'params': params}, TOKENS, cache_length=8)
    with pytest.raises(ValueError, match='split_blocks'):
        module.apply({'params': params}, TOKENS[:, :1], cache=cache)
    with pytest.raises(ValueError, match='longer than the cache of 3'):
        module.apply({'params': params}, TOKENS, cache_length=3)
    with pytest.raises(ValueError, match=r'mask has shape \(2, 3\)'):
        module.apply({'params': params}, TOKENS, mask=TOKENS[:, :3])
    with pytest.raises(ValueError, match='max_length is 5'):
        module.clone(max_length=5).apply({'params': params}, TOKENS)
    with pytest.raises(ValueError, match="remat='half'"):
        module.clone(remat='half').apply({'params': params}, TOKENS)
    assert np.isnan(apply({'params': params}, np.full((1, 2), 19))).all()  # a token of a larger vocabulary


def test_llama_without_the_causal_mask():
    module = MODELS['llama'].clone(causal=False)
    params = random_params(module)
    apply = jax.jit(module.apply)
    changed = TOKENS.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 19
    moved = np.abs(apply({'params': params}, TOKENS) - apply({'params': params}, changed)).max((0, 2))
    assert (moved > 1e-3).all()
    mask = np.ones_like(TOKENS, bool)
    mask[:, -1] = False
    np.testing.assert_allclose(apply({'params': params}, TOKENS, mask=mask)[:, :-1],
                               apply({'params': params}, TOKENS[:, :-1]), atol=1e-5)


def test_partial_rotation_leaves_the_rest():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 6)), jnp.float32)
    cos_sin = layers.rotary(jnp.arange(3)[None], layers.rope_frequencies(4, 100.0))
    y = layers.rope(x, cos_sin)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    # Planes (0, 2) and (1, 3) turn by the position, and by a tenth of it.
    for plane, angle in (((0, 2), 2.0), ((1, 3), 0.2)):
        a, b = (x[0, 2, 0, i] for i in plane)
        np.testing.assert_allclose(y[0, 2, 0, plane[0]], a * np.cos(angle) - b * np.sin(angle), rtol=1e-5)
        np.testing.assert_allclose(y[0, 2, 0, plane[1]], b * np.cos(angle) + a * np.sin(angle), rtol=1e-5)


def test_scaled_frequencies():
    plain = layers.rope_frequencies(64, 500000.0)
    scaled = layers.rope_frequencies(64, 500000.0, layers.RopeScaling('llama3', 8.0))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()
    np.testing.assert_allclose(layers.rope_frequencies(8, 10.0, layers.RopeScaling('linear', 2.0)),
                               layers.rope_frequencies(8, 10.0) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="kind='yarn'"):
        layers.RopeScaling('yarn', 2.0)

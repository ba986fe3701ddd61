"""Adapters as leaves of the parameter tree."""
import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import gpt2, gpt_neox, heads, layers, llama, lora
from rlhf_jax.models.decoder import split_blocks
from rlhf_jax.weights.rules import flatten
from tiny_models import MODELS, random_params

FILES = {'gpt2': gpt2, 'gpt_neox': gpt_neox, 'llama': llama}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 5))
EVERYWHERE = (r'.*/attn/(q|k|v|qkv|o)', r'.*/mlp/.*')


def adapted(name, targets, seed=1):
    """Parameters with an adapter whose B is random."""
    params = random_params(MODELS[name])
    with_lora = lora.init(jax.random.key(0), MODELS[name], params, rank=3, alpha=6.0, targets=targets)
    rng = np.random.default_rng(seed)
    randomised = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype) if path[-1].key == 'lora_b' else x, with_lora)
    return params, with_lora, randomised


@pytest.mark.parametrize('name', MODELS)
def test_the_model_with_an_adapter_is_the_merged_one(name):
    module = MODELS[name]
    params, fresh, params_lora = adapted(name, EVERYWHERE)
    apply = jax.jit(module.apply)
    base = apply({'params': params}, TOKENS)
    np.testing.assert_array_equal(apply({'params': fresh}, TOKENS), base)  # B is zero
    got = apply({'params': params_lora}, TOKENS)
    assert np.abs(got - base).max() > 0.1
    merged = lora.merge(params_lora)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    np.testing.assert_allclose(apply({'params': merged}, TOKENS), got, atol=1e-4)
    np.testing.assert_array_equal(apply({'params': lora.without(params_lora)}, TOKENS), base)
    split, split_params = split_blocks(module, params_lora)
    np.testing.assert_allclose(jax.jit(split.apply)({'params': split_params}, TOKENS), got, atol=1e-5)
    chex.assert_trees_all_close(lora.merge(split_params), split_blocks(module, merged)[1], atol=1e-6)


def test_update_by_hand():
    layer = {'kernel': jnp.ones((2, 2, 3)), 'lora_a': jnp.array([[[1.0], [2.0]], [[0.0], [1.0]]]),
             'lora_b': jnp.array([[[1.0, 0.0, 1.0]], [[2.0, 2.0, 0.0]]]), 'lora_scale': jnp.array([10.0, 1.0])}
    want = np.array([[[10, 0, 10], [20, 0, 20]], [[0, 0, 0], [2, 2, 0]]])
    np.testing.assert_array_equal(lora.delta('blocks/attn/q', layer), want)
    merged = lora.merge({'blocks': {'attn': {'q': layer}}})
    np.testing.assert_array_equal(merged['blocks']['attn']['q']['kernel'], 1 + want)


@pytest.mark.parametrize('name', MODELS)
def test_every_layer_draws_its_own_a_within_one_over_the_root_of_all_its_inputs(name):
    _, fresh, _ = adapted(name, EVERYWHERE)
    drawn = {path: np.asarray(x) for path, x in flatten(fresh).items() if path.endswith('lora_a')}
    assert 'blocks/attn/o/lora_a' in drawn
    for path, a in drawn.items():
        fan_in = np.prod(a.shape[1:-1])  # without blocks and rank
        assert .8 < np.abs(a).max() * fan_in ** .5 <= 1 + 1e-6, path
    assert len({a.tobytes() for a in drawn.values()}) == len(drawn)


@pytest.mark.parametrize('name', MODELS)
def test_default_targets(name):
    _, params, _ = adapted(name, FILES[name].LORA_TARGETS)
    layers = {path.rpartition('/')[0] for path in flatten(params) if path.endswith('lora_a')}
    assert layers == {'gpt2': {'blocks/attn/qkv'}, 'gpt_neox': {'blocks/attn/qkv'},
                      'llama': {'blocks/attn/q', 'blocks/attn/v'}}[name]


def test_only_the_adapter_trains():
    module = MODELS['llama']
    _, _, params = adapted('llama', llama.LORA_TARGETS)
    frozen, adapter = lora.split(params)
    assert {path.rpartition('/')[2] for path in flatten(adapter)} == {'lora_a', 'lora_b'}
    chex.assert_trees_all_equal(lora.join(frozen, adapter), params)
    loss = lambda adapter: module.apply({'params': lora.join(frozen, adapter)}, TOKENS).var()
    grads = jax.jit(jax.grad(loss))(adapter)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_dropout_is_of_the_adapters_inputs_alone():
    """Each draw differs, their mean is the model without dropout up to what is not linear in it, and at a rate of 0
    nothing is dropped."""
    module = MODELS['llama']
    params, fresh, params_lora = adapted('llama', (r'.*/mlp/down',))
    tokens = np.tile(TOKENS[:1, :1], (64, 3))
    run = jax.jit(lambda key, params, rate: module.apply({'params': lora.with_dropout(key, params, rate)}, tokens),
                  static_argnums=2)
    plain = jax.jit(module.apply)({'params': params_lora}, tokens)
    np.testing.assert_allclose(run(jax.random.key(0), params_lora, 0.0), plain, atol=1e-5)
    dropped = run(jax.random.key(0), params_lora, 0.5)
    assert np.abs(dropped - run(jax.random.key(1), params_lora, 0.5)).max() > 1e-2
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3  # rows of one text drop entries of their own
    np.testing.assert_allclose(run(jax.random.key(0), fresh, 0.5), run(jax.random.key(1), fresh, 0.5), atol=1e-6)
    chex.assert_trees_all_equal(lora.without(lora.with_dropout(jax.random.key(0), params_lora, 0.5)), params)
    with pytest.raises(ValueError, match=r'dropout=1.0 must be in \[0, 1\)'):
        lora.with_dropout(jax.random.key(0), params_lora, 1.0)


def test_dropout_by_hand():
    """Of ones: kept entries are 1 / keep, as many as that says, and each block has a key of its own."""
    layer = {'kernel': jnp.ones((2, 50, 3)), 'lora_a': jnp.ones((2, 50, 1)), 'lora_b': jnp.ones((2, 1, 3)),
             'lora_scale': jnp.ones(2)}
    made = lora.with_dropout(jax.random.key(3), {'blocks': {'attn': {'q': layer}}}, 0.2)['blocks']['attn']['q']
    assert made['lora_key'].shape == (2, 2) and (made['lora_key'][0] != made['lora_key'][1]).any()
    kept = np.stack([layers.dropped(jnp.ones((40, 50)), made['lora_key'][i], made['lora_keep'][i]) for i in range(2)])
    assert {*np.unique(kept).tolist()} == {0.0, 1.25} and kept.mean() == pytest.approx(1, abs=0.05)
    assert (kept[0] != kept[1]).any()
    two = lora.with_dropout(jax.random.key(3), {'blocks': {'attn': {'q': layer, 'v': layer}}}, 0.2)['blocks']['attn']
    assert len({tuple(x) for name in ('q', 'v') for x in np.asarray(two[name]['lora_key']).tolist()}) == 4


@pytest.mark.parametrize('change, message', [
    (dict(targets=(r'.*/attn/query',)), 'matches no dense layer'), (dict(rank=0), 'rank=0'),
    (dict(targets=(r'lm_head',)), r"lm_head .*would ignore its adapter; the layers of Llama .*'blocks/attn/k', "),
], ids=str)
def test_bad_calls_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), MODELS['llama'], random_params(MODELS['llama']),
                  **dict(rank=2, alpha=4.0, targets=llama.LORA_TARGETS) | change)


class Foreign(nn.Module):
    """A language model whose dense layers are flax's, which know nothing of adapters."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3)(nn.Embed(19, 4)(tokens))


class Images(nn.Module):
    @nn.compact
    def __call__(self, images, times):
        return layers.Dense(3)(images) * times


@pytest.mark.parametrize('module, inputs, message', [
    (Foreign(), (TOKENS,), r'Dense_0 .*would ignore its adapter; the layers of Foreign that read one are \[\]'),
    (Images(), (np.ones((2, 4)), 1.0), r'Images cannot be called with tokens'),
], ids=['foreign', 'images'])
def test_a_model_that_would_ignore_its_adapter_is_an_error(module, inputs, message):
    params = module.init(jax.random.key(0), *inputs)['params']
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), module, params, rank=2, alpha=4.0, targets=('Dense_0',))


def test_heads_are_not_adapted_but_the_backbone_below_them_is():
    module = heads.RewardModel(MODELS['llama'])
    names = ('attn/q', 'attn/k', 'attn/v', 'attn/o', 'mlp/gate', 'mlp/up', 'mlp/down')
    assert lora.adaptable_layers(module) == {f'backbone/blocks/{name}' for name in names}
    split = MODELS['llama'].clone(stacked=False)
    assert {'block_0/attn/q', f'block_{split.depth - 1}/mlp/down'} <= lora.adaptable_layers(split)


def test_one_adapter_at_a_time():
    _, params, _ = adapted('llama', llama.LORA_TARGETS)
    with pytest.raises(ValueError, match='blocks/attn/q has an adapter already'):
        lora.init(jax.random.key(0), MODELS['llama'], params, rank=2, alpha=4.0, targets=llama.LORA_TARGETS)
    with pytest.raises(ValueError, match='no adapter'):
        lora.split(random_params(MODELS['llama']))

"""What Mistral, Qwen2 and Qwen3 have and LLaMA has not: a window, biases of three projections, norms of heads."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from rlhf_jax.models import decoder, llama
from rlhf_jax.models.llama import Llama
from rlhf_jax.weights.rules import flatten, param_shapes
from tiny_models import random_params

WINDOW = 3
MODULE = Llama(vocab_size=19, width=16, depth=1, num_heads=4, num_kv_heads=2, head_dim=8, hidden=24, window=WINDOW,
               qkv_bias=True, qk_norm=True)
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 8))


@pytest.fixture(scope='module')
def tiny():
    return random_params(MODULE), jax.jit(MODULE.apply, static_argnames='cache_length')


def test_a_token_sees_the_window_before_it(tiny):
    params, _ = tiny

    def score(noise, at):
        embedded = params | {'embed': params['embed'].at[:8].add(noise)}
        return (MODULE.apply({'params': embedded}, jnp.arange(8)[None], output='hidden')[0, at] ** 2).sum()

    grad = jax.jit(jax.grad(score))
    for at in (1, 5, 7):
        moved = np.abs(grad(jnp.zeros((8, 16)), at)).sum(1)
        assert set(np.flatnonzero(moved > 1e-4)) == set(range(max(at - WINDOW + 1, 0), at + 1))
        assert set(np.flatnonzero(moved)) == set(np.flatnonzero(moved > 1e-4))


def test_windows_do_not_count_padding(tiny):
    params, apply = tiny
    full = apply({'params': params}, TOKENS)
    wide = MODULE.clone(window=0).apply({'params': params}, TOKENS)
    np.testing.assert_allclose(full[:, :WINDOW], wide[:, :WINDOW], atol=1e-5)
    assert np.abs(full - wide)[:, WINDOW:].max(-1).min() > 1e-3
    places = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 5, 6, 7, 8, 9, 10]])
    padded, mask = np.zeros((3, 11), np.int64), np.zeros((3, 11), bool)
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = TOKENS[0], True
    got = apply({'params': params}, padded, mask=mask)
    for row, place in enumerate(places):
        np.testing.assert_allclose(got[row, place], full[0], atol=1e-5)
    packed = apply({'params': params}, TOKENS.reshape(1, -1), mask=np.repeat([[1, 2]], 8, 1))
    np.testing.assert_allclose(packed.reshape(2, 8, -1), full, atol=1e-5)


@pytest.mark.parametrize('mask', [np.arange(4) < [[4], [2]], np.arange(4) >= [[0], [2]]], ids=['right', 'left'])
def test_decoding_within_a_window(tiny, mask):
    """Prompts of 4 and 2 tokens, then the same two tokens for each."""
    params, apply = tiny
    prompt = np.zeros((2, 4), np.int64)
    prompt[mask] = np.concatenate([TOKENS[0, :4], TOKENS[1, :2]])
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    logits, cache = apply({'params': params}, prompt, mask=mask, at=last, cache_length=7)
    module, split = decoder.split_blocks(MODULE, params)
    outs = [logits]
    for t in (4, 5):
        out, cache = module.apply({'params': split}, TOKENS[:, t:t + 1], cache=cache)
        outs.append(out[:, 0])
    rows = [np.concatenate([TOKENS[row, :length], TOKENS[row, 4:6]]) for row, length in enumerate((4, 2))]
    for row, tokens in enumerate(rows):
        want = MODULE.apply({'params': params}, tokens[None])[0, -3:]
        np.testing.assert_allclose(np.stack([out[row] for out in outs]), want, atol=1e-5)


def test_every_parameter_has_a_partition_rule():
    shapes = param_shapes(MODULE, np.zeros((1, 1), np.int32))
    assert {'blocks/attn/q_norm/scale', 'blocks/attn/k/bias'} < set(flatten(shapes))
    assert 'blocks/attn/o/bias' not in flatten(shapes)
    rules = ((r'embed|lm_head/kernel', jax.sharding.PartitionSpec()), *llama.PARTITION_RULES)  # 19 divides by nothing
    partition.param_shardings(shapes, rules, mesh_lib.make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4]))


def test_a_window_without_the_causal_mask_is_refused():
    with pytest.raises(ValueError, match='has no use for a cache or a window'):
        jax.eval_shape(MODULE.clone(causal=False).init, jax.random.key(0), TOKENS)

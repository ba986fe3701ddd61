"""Fused attention: which kernel a call gets, how it is brought into the kernel's shape, and the decode kernel."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import mesh as mesh_lib
from rlhf_jax.models import attention, decode_attention, decoder, splash_attention
from rlhf_jax.models.gpt_neox import GPTNeoX
from rlhf_jax.models.llama import Llama
from tiny_models import random_params


def qkv(length, heads=4, kv_heads=4, dim=8, dtype=jnp.float32, batch=2):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((batch, length, h, dim)), dtype) for h in (heads, kv_heads, kv_heads))


def masks(length):
    """Left- and right-padded rows, and three sequences packed in a row."""
    there = np.ones((2, length), bool)
    there[0, :2], there[1, -3:] = False, False
    number = np.sort(np.random.default_rng(1).integers(0, 4, (2, length)), 1)
    see = lambda same, key: jnp.asarray((same & key[:, None, :])[:, None])
    return {'none': None, 'padded': see(there[:, :, None] & there[:, None, :], there),
            'packed': see(number[:, :, None] == number[:, None, :], number != 0)}


@pytest.fixture
def cudnn(monkeypatch):
    """What cuDNN would be called with, computed by the plain formula; refuses what cuDNN refuses in training."""
    calls = []

    def plain(q, k, v, *, implementation, **how):
        assert implementation == 'cudnn' and q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
        calls.append(how)
        return dot_product_attention(q, k, v, **how)
    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, 'dot_product_attention', plain)
    monkeypatch.setattr(attention, 'choose', lambda impl, q: 'cudnn')
    return dot_product_attention, calls


@pytest.mark.parametrize('kind', ['none', 'padded', 'packed'])
@pytest.mark.parametrize('causal', [False, True])
def test_odd_lengths_and_masks_reach_the_kernel_as_the_same_attention(cudnn, kind, causal):
    plain, calls = cudnn
    for length in (11, 12):
        q, k, v = qkv(length, kv_heads=2)
        mask = masks(length)[kind]
        weigh = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
        weigh = weigh if mask is None else weigh * mask.any(-1)[:, 0, :, None, None]  # nothing is promised at padding

        def value_and_gradient(f):
            return jax.jit(jax.value_and_grad(lambda x: (f(*x) * weigh).sum()))((q, k, v))
        got = value_and_gradient(lambda q, k, v: attention.fused(q, k, v, mask=mask, causal=causal))
        want = value_and_gradient(lambda q, k, v: plain(q, k, v, mask=mask, is_causal=causal))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert calls and all(how['is_causal'] == causal for how in calls)


def test_the_platform_decides(monkeypatch):
    half, full = qkv(4, dtype=jnp.bfloat16)[0], qkv(4)[0]
    choices = lambda: [attention.choose('auto', x) for x in (half, full, half[..., :4])]
    assert attention.target()[0] == 'cpu' and choices() == ['xla'] * 3
    monkeypatch.setattr(attention, 'target', lambda: ('gpu', 'NVIDIA H100 80GB HBM3'))
    assert choices() == ['cudnn', 'xla', 'xla'] and attention.choose('xla', half) == 'xla'
    monkeypatch.setattr(attention, 'target', lambda: ('tpu', 'TPU v5e'))
    assert choices() == ['xla'] * 3  # too short
    long = qkv(splash_attention.LEAST, dtype=jnp.bfloat16)[0]
    assert attention.choose('auto', long) == 'splash' and attention.choose('auto', long.astype(jnp.float32)) == 'xla'


def test_what_cannot_be_is_an_error_that_names_the_field():
    with pytest.raises(ValueError, match="attention_impl='flash' is not one of"):
        attention.fused(*qkv(4), impl='flash')
    with pytest.raises(ValueError, match="attention_impl='cudnn' wants bfloat16"):
        attention.fused(*qkv(4), impl='cudnn')
    with pytest.raises(ValueError, match="attention_impl='splash' is a kernel for TPUs, .* platform 'cpu'"):
        attention.fused(*qkv(4), impl='splash')


# ---- Splash attention ------------------------------------------------------------------------------------------------

@pytest.fixture
def tpu(monkeypatch):
    """Calls are made as for a TPU, with the kernel interpreted; in blocks of 128, so that there are several."""
    monkeypatch.setattr(attention, 'target', lambda: ('tpu', 'TPU v5e'))
    monkeypatch.setattr(splash_attention, 'BLOCK', 128)
    monkeypatch.setattr(splash_attention, 'LEAST', 128)
    kernel, calls = splash_attention.splash_attention, []

    def interpreted(*args, **how):
        calls.append(how)
        return kernel(*args, interpret=True, **how)
    monkeypatch.setattr(splash_attention, 'splash_attention', interpreted)
    return calls


def test_blocks_are_few_and_short():
    assert [splash_attention.block_length(n) for n in (1, 128, 261, 565, 640, 641, 1024, 2048)] == [
        128, 128, 384, 640, 640, 384, 512, 512]


@pytest.mark.parametrize('kind, causal, length', [('none', False, 11), ('none', True, 140), ('padded', True, 140),
                                                  ('packed', False, 140), ('packed', True, 128)])
def test_splash_attention_is_the_plain_one(tpu, kind, causal, length):
    q, k, v = qkv(length, heads=2, kv_heads=1)
    mask = masks(length)[kind]
    segments = None if kind == 'none' else jnp.asarray({
        'padded': np.array([np.arange(length) >= 2, np.arange(length) < length - 3]),
        'packed': np.sort(np.random.default_rng(1).integers(0, 4, (2, length)), 1)}[kind], jnp.int32)
    weigh = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    weigh = weigh if mask is None else weigh * mask.any(-1)[:, 0, :, None, None]

    def value_and_gradient(f):
        return jax.jit(jax.value_and_grad(lambda x: (f(*x) * weigh).sum()))((q, k, v))
    got = value_and_gradient(functools.partial(attention.fused, mask=mask, segments=segments, causal=causal,
                                               impl='splash'))
    want = value_and_gradient(functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=causal))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(tpu) == 1


def test_a_decoder_with_splash_attention_on_a_mesh_is_the_plain_one(tpu):
    """Rows over two devices, heads over two; where a window or an unknown layout forbids it, the plain path."""
    module = GPTNeoX(vocab_size=31, width=32, depth=2, num_heads=2, max_length=200, attention_impl='splash')
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 31, (2, 130)))
    mask = jnp.ones((2, 130), bool).at[0, :9].set(False)
    params = random_params(module)
    plain = module.clone(attention_impl='xla')

    def run(module):
        """Sums over the tokens that are there, and their gradient: rows of all devices add up in it."""
        def loss(params, mask):
            logits = module.apply({'params': params}, tokens, mask=mask)
            return (jnp.sin(logits) * mask[..., None]).sum()
        return jax.jit(jax.value_and_grad(loss))(params, mask)
    want, calls = run(plain), len(tpu)
    mesh = mesh_lib.make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        mask = jax.device_put(mask, jax.NamedSharding(mesh, jax.P('fsdp')))
        got = run(module)
        assert len(tpu) > calls
        q, k, v = qkv(140, dtype=jnp.bfloat16)
        see = jnp.tril(jnp.ones((140, 140), bool))[None, None]
        assert attention.fused(q, k, v, mask=see) is None and attention.fused(q[:1], k[:1], v[:1]) is None
        with pytest.raises(ValueError, match="attention_impl='splash' has no window"):
            attention.fused(q, k, v, mask=see, impl='splash')
        with pytest.raises(ValueError, match="attention_impl='splash' of 1 rows: the mesh in context cannot divide"):
            attention.fused(q[:1], k[:1], v[:1], impl='splash')
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert attention.fused(q, k, v) is None  # eight devices and no mesh
    with jax.set_mesh(mesh):  # no rules: how a batch lies is not known
        assert attention.fused(q, k, v) is None


# ---- Decoding --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('heads, kv_heads, slots, dim', [(4, 4, 70, 16), (4, 2, 130, 24)])
def test_decode_kernel(heads, kv_heads, slots, dim):
    """Keys past a row's end are poison: they must not be read into the result."""
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.standard_normal((2, 1, heads, dim)), jnp.float32)
    keys, values = (rng.standard_normal((2, kv_heads, slots, dim)).astype(np.float32) for _ in range(2))
    ends = np.array([slots - 5, 9], np.int32)
    slot = np.arange(slots)
    visible = (slot < ends[:, None]) & (slot >= np.array([[3], [0]]))
    for row, end in enumerate(ends):
        keys[row, :, end:], values[row, :, end:] = 1e6, 1e6
    got = decode_attention.decode_attention(q, keys, values, jnp.asarray(visible), jnp.asarray(ends), interpret=True)
    want = jax.nn.dot_product_attention(q, keys.swapaxes(1, 2), values.swapaxes(1, 2),
                                        mask=jnp.asarray(visible)[:, None, None])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_decode_step_through_the_kernel_is_the_plain_one(monkeypatch):
    module = GPTNeoX(vocab_size=31, width=32, depth=2, num_heads=2, stacked=False)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 31, (2, 6)))
    mask = jnp.ones((2, 6), bool).at[0, :2].set(False)
    params = module.init(jax.random.key(0), tokens)['params']

    def steps():
        _, cache = module.apply({'params': params}, tokens, mask=mask, cache_length=9)
        out = []
        for t in range(2):
            logits, cache = module.apply({'params': params}, tokens[:, t:t + 1], cache=cache)
            out.append(logits)
        return jnp.concatenate(out)
    want, kernel, calls = steps(), decode_attention.decode_attention, []

    def interpreted(*args):
        calls.append(args)
        return kernel(*args, interpret=True)
    monkeypatch.setattr(decode_attention, 'takes', lambda q, keys: q.shape[1] == 1)
    monkeypatch.setattr(decode_attention, 'decode_attention', interpreted)
    np.testing.assert_allclose(steps(), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize('kind', ['gpt_neox', 'llama'])
def test_heads_that_lie_side_by_side_in_the_cache_are_read_apart(kind, monkeypatch):
    """A prompt, then two tokens at once, then one; of LLaMA two queries read each of the two heads."""
    module = {'gpt_neox': GPTNeoX(vocab_size=31, width=32, depth=1, num_heads=4, stacked=False),
              'llama': Llama(vocab_size=31, width=32, depth=1, num_heads=4, num_kv_heads=2, hidden=48,
                             stacked=False)}[kind]
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 31, (2, 9)))
    mask = jnp.ones((2, 6), bool).at[0, :2].set(False)
    params = random_params(module)

    def run(params):
        _, cache = module.apply({'params': params}, tokens[:, :6], mask=mask, cache_length=9)
        first, cache = module.apply({'params': params}, tokens[:, 6:8], cache=cache)
        last, cache = module.apply({'params': params}, tokens[:, 8:], cache=cache)
        return jnp.concatenate([first, last], 1), cache
    want, plain = jax.jit(lambda p: run(p))(params)
    monkeypatch.setattr(decoder, 'heads_beside', lambda kv_heads, dim: 2)
    got, cache = jax.jit(lambda p: run(p))(params)
    heads = plain.keys[0].shape[1]
    assert plain.keys[0].shape == (2, heads, 9, 8) and cache.values[0].shape == (2, heads // 2, 9, 16)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_heads_fill_the_lanes_of_a_tpu(monkeypatch):
    beside = lambda: [decoder.heads_beside(*shape) for shape in ((16, 64), (12, 32), (3, 64), (32, 80), (8, 128),
                                                                 (8, 256))]
    assert beside() == [1] * 6
    monkeypatch.setattr(attention, 'target', lambda: ('tpu', 'TPU v5e'))
    assert beside() == [2, 4, 1, 1, 1, 1]
    with (jax.set_mesh(mesh_lib.make_mesh({'tensor': 8})), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES)):
        assert beside()[:2] == [2, 1]  # pairs stay on a device

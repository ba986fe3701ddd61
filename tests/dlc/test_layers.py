"""Activations, softmax, norms and attention equal the plain formulas in value and derivatives, however transformed."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compiled import optimized
from dlc_jax.models import layers
from rlhf_jax.models import functions

X = 3 * jax.random.normal(jax.random.key(0), (2, 3, 8)) + 1
SCALE, BIAS = jnp.linspace(0.5, 2, 8), jnp.linspace(-1, 1, 8)
QKV = jax.random.normal(jax.random.key(1), (3, 2, 5, 2, 4))
TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def plain_layer_norm(x, scale=None, bias=None):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def plain_rms_norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def scaled(f):
    """`f` of one array, a row of which is its scale, so that this gets a gradient too."""
    return lambda x: f(x[0], scale=x[1, 0] + SCALE, eps=1e-6)


def affine(f):
    """`f` of one array, a row of which is its scale and another its bias, so that these get gradients too."""
    return lambda x: f(x[0], scale=x[1, 0] + SCALE, bias=x[1, 1] + BIAS)


norm = functools.partial(functions.layer_norm, eps=1e-6)
PAIRS = {  # ours, the plain formula, an input
    'gelu_tanh': (functions.gelu, functools.partial(nn.gelu, approximate=True), X),
    'gelu_exact': (lambda x: functions.gelu(x, False), functools.partial(nn.gelu, approximate=False), X),
    'silu': (functions.silu, nn.silu, X),
    'softmax': (functions.softmax, nn.softmax, X),
    'layer_norm': (norm, plain_layer_norm, X),
    'layer_norm_affine': (affine(norm), affine(plain_layer_norm), X),
    'rms_norm': (scaled(functions.rms_norm), scaled(plain_rms_norm), X),
    'attention': (lambda x: layers.attention(*x), lambda x: jax.nn.dot_product_attention(*x), QKV),
}


def mixed(f):
    """A scalar whose gradient weighs every output differently."""
    def scalar(x):
        y = f(x)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))
    return scalar


@pytest.mark.parametrize('name', PAIRS)
def test_value_and_derivatives_are_those_of_the_plain_formula(name):
    ours, plain, x = PAIRS[name]
    direction = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def everything(f):
        loss = mixed(f)
        return {
            'value': f(x), 'gradient': jax.grad(loss)(x), 'remat': jax.grad(jax.checkpoint(loss))(x),
            'forward mode': jax.jvp(f, (x,), (direction,))[1],
            'batched': jax.vmap(jax.grad(loss))(jnp.stack([x, x + direction])),
            'second derivative': jax.jvp(jax.grad(loss), (x,), (direction,))[1]}

    got, want = optimized(lambda: everything(ours))(), optimized(lambda: everything(plain))()
    for kind in want:
        scale = 10 if kind == 'second derivative' else 1
        np.testing.assert_allclose(got[kind], want[kind], rtol=scale * 1e-5, atol=scale * 1e-6, err_msg=kind)


def test_gradient_under_scan_and_without_jit():
    def loss(x, f):
        return jax.lax.scan(lambda h, w: (f(h * w), None), x, jnp.linspace(0.5, 1, 3))[0].sum()
    ours = lambda h: functions.gelu(norm(h))
    plain = lambda h: nn.gelu(plain_layer_norm(h))
    want = optimized(jax.grad(loss), static_argnums=1)(X, plain)
    np.testing.assert_allclose(optimized(jax.grad(loss), static_argnums=1)(X, ours), want, rtol=1e-4, atol=1e-5)
    eager = jax.grad(lambda x: functions.gelu(x).sum())(X)
    np.testing.assert_allclose(eager, jax.grad(lambda x: nn.gelu(x).sum())(X), **TOLERANCE)


def test_bfloat16_in_and_out():
    x = X.astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.float32
    assert jax.grad(lambda x: norm(x)[..., 0].sum())(x).dtype == jnp.bfloat16
    for approximate in (False, True):  # rounded once, not after every operation
        exact = nn.gelu(x.astype(jnp.float32), approximate=approximate)
        np.testing.assert_allclose(functions.gelu(x, approximate).astype(jnp.float32), exact, rtol=2 ** -8, atol=1e-6)
    slope = jax.grad(lambda x: functions.gelu(x).sum().astype(jnp.float32))(x)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(slope.astype(jnp.float32), jax.grad(lambda x: nn.gelu(x).sum())(X), atol=0.05)
    q, k, v = QKV.astype(jnp.bfloat16)
    out = layers.attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), jax.nn.dot_product_attention(*QKV), atol=0.05)


def test_backward_pass_keeps_one_array_each():
    kept = lambda f: sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(f, x)[1], X)))
    assert kept(functions.gelu) == X.size
    assert kept(functions.softmax) == X.size
    assert kept(functions.silu) == X.size
    scale = 2 * SCALE.size  # itself and its tangent
    assert kept(lambda x: functions.rms_norm(x, SCALE, eps=1e-6)) == X.size + X.size // 8 + scale
    assert kept(norm) == X.size + 2 * X.size // 8  # and the mean and 1 / standard deviation of each row


def test_barrier_is_for_the_cpu_alone_whatever_machine_compiles():
    step = jax.jit(jax.grad(lambda x: functions.softmax(x)[..., 0].sum()))
    assert 'optimization_barrier' in step.lower(X).as_text()
    for platform in ('tpu', 'cuda'):
        assert 'optimization_barrier' not in jax.export.export(step, platforms=[platform])(X).mlir_module()


def test_gelu_keeps_its_slope_on_a_cpu_and_its_input_elsewhere():
    """A forward pass that only prepares the backward one computes a slope on a CPU, and nothing elsewhere."""
    prepare = jax.jit(lambda x: jax.tree.leaves(jax.vjp(functions.gelu, x)[1]))
    slopes = lambda platform: jax.export.export(prepare, platforms=[platform])(X).mlir_module().count('stablehlo.tanh')
    assert [slopes(platform) for platform in ('cpu', 'cuda', 'tpu')] == [1, 0, 0]

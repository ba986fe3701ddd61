import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.ssl import dino, ibot, koleo
from random_params import random_params
from rlhf_jax.weights.rules import flatten, param_shapes

# Under jit, as they are used; it also compiles one program rather than one an operation.
koleo_loss = jax.jit(koleo.koleo_loss, static_argnames='groups')
koleo_grad = jax.jit(jax.value_and_grad(koleo.koleo_loss))
sinkhorn_knopp = jax.jit(dino.sinkhorn_knopp, static_argnames='num_iterations')
cross_entropy = jax.jit(dino.cross_entropy)


def draw(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive_cross_entropy(logits, targets, temperature=0.1):
    return -(targets * np.log(softmax(np.float64(logits) / temperature))).sum(-1)


# Head

def test_head_has_the_published_number_of_parameters_and_rules_for_all():
    shapes = flatten(param_shapes(dino.DINOHead(), jnp.zeros((1, 1024))))
    assert sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) == 23_662_848
    for name, leaf in shapes.items():
        spec = next(spec for pattern, spec in dino.PARTITION_RULES if re.fullmatch(pattern, name))
        assert len(spec) <= leaf.ndim


def test_head_starts_at_the_scale_it_is_given():
    head = dino.DINOHead(hidden=128, bottleneck=64, prototypes=8, init_std=0.1)
    params = head.init(jax.random.key(0), jnp.zeros((1, 96)))['params']
    for name in ('fc1', 'fc2', 'fc3'):
        assert params[name]['kernel'].std() == pytest.approx(0.1, rel=0.05)


def test_head_outputs_are_gains_times_cosines():
    head = dino.DINOHead(hidden=12, bottleneck=8, prototypes=10)
    x = draw(5, 6)
    params = random_params(head, x)
    apply = jax.jit(lambda p: head.apply({'params': p}, x))
    out = apply(params)
    last = params['last_layer']
    assert out.shape == (5, 10) and (np.abs(out) <= np.abs(last['gain']) + 1e-5).all()
    longer = params | {'last_layer': {'kernel': 3 * last['kernel'], 'gain': last['gain']}}
    np.testing.assert_allclose(apply(longer), out, atol=1e-6)
    louder = params | {'last_layer': {'kernel': last['kernel'], 'gain': 2 * last['gain']}}
    np.testing.assert_allclose(apply(louder), 2 * out, atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: apply(p)[:, 0].sum()))(params)
    assert np.abs(grads['last_layer']['gain'][0]) > 1e-3  # the gain is trained
    half = jax.eval_shape(lambda: head.clone(dtype=jnp.bfloat16).apply({'params': params}, x))
    assert half.dtype == jnp.float32


def test_head_of_a_zero_input_has_finite_gradients():
    head = dino.DINOHead(hidden=4, bottleneck=3, prototypes=5)
    params = jax.tree.map(jnp.zeros_like, random_params(head, jnp.zeros((2, 4))))
    params['last_layer'] = {'kernel': jnp.ones((3, 5)), 'gain': jnp.ones(5)}
    grads = jax.jit(jax.grad(lambda p: head.apply({'params': p}, jnp.zeros((2, 4))).sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# Cross entropy

def test_cross_entropy_and_its_gradient_match_the_plain_formula():
    logits, targets = draw(4, 3, 7), np.abs(draw(4, 1, 7, seed=1))  # targets broadcast, and do not sum to one
    np.testing.assert_allclose(cross_entropy(logits, targets), naive_cross_entropy(logits, targets), rtol=1e-5)
    plain = lambda x: -(targets * jax.nn.log_softmax(x / 0.1)).sum()
    ours = lambda x: dino.cross_entropy(x, targets).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(logits), jax.jit(jax.grad(plain))(logits), rtol=1e-4, atol=1e-4)


def test_cross_entropy_survives_large_and_half_precision_logits():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert np.isfinite(cross_entropy(logits, jnp.ones((1, 3)) / 3)).all()
    half = jnp.asarray(draw(2, 50), jnp.bfloat16)
    out = cross_entropy(half, jnp.full((2, 50), 0.02, jnp.bfloat16))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, naive_cross_entropy(np.float64(half), np.float64(jnp.bfloat16(0.02))), rtol=1e-3)


def test_dino_loss_sums_over_all_pairs_of_views():
    student, teacher = draw(3, 5, 6), softmax(draw(2, 5, 6, seed=1))
    want = sum(naive_cross_entropy(s, t).mean() for s in student for t in teacher)
    np.testing.assert_allclose(jax.jit(dino.dino_loss)(student, teacher), want, rtol=1e-5)


# Targets

def test_centering_removes_what_all_rows_share():
    logits, shift = draw(6, 8), draw(1, 8, seed=1)
    np.testing.assert_allclose(dino.softmax_center(logits + shift, shift, 0.07), softmax(logits / 0.07), atol=1e-5)
    center = dino.update_center(jnp.ones((1, 8)), dino.batch_center(logits), 0.9)
    np.testing.assert_allclose(center, 0.9 + 0.1 * logits.mean(0, keepdims=True), atol=1e-6)
    weights = jnp.array([0.5, 0.0, 0.25, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(dino.batch_center(logits, weights), logits[[0, 2, 4]].mean(0, keepdims=True), atol=1e-6)
    assert not np.asarray(dino.batch_center(logits, jnp.zeros(6))).any()


def naive_sinkhorn(logits, temperature, iterations=3):
    q = np.exp(np.float64(logits) / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn_knopp_matches_the_plain_iteration_and_balances():
    logits = draw(12, 5, scale=0.1) + np.array([0.3, 0, 0, 0, 0], np.float32)
    np.testing.assert_allclose(sinkhorn_knopp(logits, 0.07), naive_sinkhorn(logits, 0.07), rtol=1e-4)
    balanced = np.asarray(sinkhorn_knopp(logits, 0.07, num_iterations=30))
    np.testing.assert_allclose(balanced.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(balanced.sum(0), 12 / 5, atol=1e-3)
    assert softmax(logits / 0.07).sum(0)[0] > 6  # what balancing undid


def test_sinkhorn_knopp_ignores_padding():
    real, noise = draw(6, 5, scale=0.1), draw(3, 5, seed=1, scale=50.0)
    weights = jnp.array([1, 0, 0.5, 0.25, 0, 1, 1, 0, 1])
    logits = np.zeros((9, 5), np.float32)
    logits[np.asarray(weights) > 0], logits[np.asarray(weights) == 0] = real, noise
    for mask in (weights, weights > 0):
        out = np.asarray(sinkhorn_knopp(logits, 0.07, weights=mask))
        np.testing.assert_allclose(out[np.asarray(weights) > 0], sinkhorn_knopp(real, 0.07), rtol=1e-4)
        assert not out[np.asarray(weights) == 0].any()
    assert not np.asarray(sinkhorn_knopp(logits, 0.07, weights=jnp.zeros(9))).any()  # no mask in the whole batch


def test_sinkhorn_knopp_does_not_overflow():
    out = np.asarray(sinkhorn_knopp(draw(8, 6, scale=30.0), 0.04))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out.sum(1), 1, atol=1e-4)


def test_targets_of_a_sharded_batch_are_those_of_the_whole():
    mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    logits, weights = draw(16, 6, scale=0.1), np.arange(16) % 3 > 0
    run = jax.jit(lambda x, w: (dino.sinkhorn_knopp(x, 0.07, weights=w), dino.batch_center(x, w)))
    placed = jax.device_put(logits, NamedSharding(mesh, P('data', 'tensor')))
    for a, b in zip(run(placed, jax.device_put(weights, NamedSharding(mesh, P('data')))), run(logits, weights)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# iBOT

def test_ibot_is_the_mean_over_crops_of_the_mean_over_their_masked_patches():
    masks = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    student, teacher = draw(4, 4, 6), softmax(draw(4, 4, 6, seed=1))
    each = naive_cross_entropy(student, teacher)
    want = sum(each[i][masks[i]].mean() for i in (0, 2)) / 4
    weights = np.array([1 / 3, 1 / 3, 1 / 3, 1, 0, 0])
    padded = lambda x: np.concatenate([x[masks], draw(2, 6, seed=2, scale=9)])
    loss = lambda s: ibot.ibot_loss(s, padded(teacher), weights, num_crops=4)
    value, grad = jax.jit(jax.value_and_grad(loss))(padded(student))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.abs(grad[:4]).max() > 0 and not np.asarray(grad[4:]).any()


# KoLeo

def naive_koleo(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    distances = np.linalg.norm(x[:, None] - x[None] + 1e-8, axis=-1) + 10 * np.eye(len(x))
    return -np.log(distances.min(1) + 1e-8).mean()


def test_koleo_looks_for_neighbours_within_groups():
    x = draw(8, 5)
    np.testing.assert_allclose(koleo_loss(x), naive_koleo(x), rtol=1e-5)
    np.testing.assert_allclose(koleo_loss(3 * x), naive_koleo(x), rtol=1e-5)  # lengths do not matter
    grouped = np.mean([naive_koleo(x[i:i + 4]) for i in (0, 4)])
    np.testing.assert_allclose(koleo_loss(x, groups=2), grouped, rtol=1e-5)
    assert abs(grouped - naive_koleo(x)) > 1e-3


def test_koleo_pushes_apart_and_stays_finite_on_collapse():
    x = draw(6, 5)
    value, grad = koleo_grad(x)
    assert koleo_grad(x - 0.01 * grad)[0] < value
    for collapsed in (np.ones_like(x), np.zeros_like(x)):
        value, grad = koleo_grad(collapsed)
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_koleo_moves_a_row_and_its_neighbour():
    """Its gradient is that of finite differences, for which neighbours are not fixed."""
    x = draw(6, 5)
    step = 1e-5 * np.eye(x.size).reshape(-1, *x.shape)
    want = [(naive_koleo(x + s) - naive_koleo(x - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(np.ravel(koleo_grad(x)[1]), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('groups', [3, 8])
def test_koleo_refuses_groups_without_neighbours(groups):
    with pytest.raises(ValueError, match=f'8 rows in {groups} groups'):
        koleo.koleo_loss(draw(8, 5), groups=groups)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.runtime import optim


def config(**fields):
    base = dict(learning_rate=dict(peak=1e-2), weight_decay=dict(peak=0.1), b1=0.9, b2=0.999, eps=1e-8, clip_norm=0.0,
                clip_per_module=False, groups=())
    return base | fields


def test_schedule_by_hand():
    cosine = optim.schedule(dict(peak=1.0, final=0.0, warmup_steps=10, decay='cosine'), 110)
    assert [float(cosine(s)) for s in (0, 5, 10, 60, 110, 500)] == pytest.approx([0, 5 / 9, 1, 0.5, 0, 0], abs=1e-6)
    linear = optim.schedule(dict(peak=1.0, final=0.2, warmup_steps=10, decay='linear'), 110)
    assert [float(linear(s)) for s in (10, 60, 110, 500)] == pytest.approx([1, 0.6, 0.2, 0.2])
    short = optim.schedule(dict(peak=1.0, decay='cosine', decay_steps=50), 100)  # ends before the run does
    assert [float(short(s)) for s in (25, 50, 99)] == pytest.approx([0.5, 0, 0], abs=1e-6)
    sedd = optim.schedule(dict(peak=3e-4, warmup_steps=2500, first_step=1), 10_000)
    assert float(sedd(0)) == pytest.approx(3e-4 / 2500) and float(sedd(9999)) == pytest.approx(3e-4)
    assert float(sedd(2498)) == pytest.approx(3e-4 * 2499 / 2500) and float(sedd(2499)) == pytest.approx(3e-4)
    with pytest.raises(ValueError, match='decay='):
        optim.schedule(dict(peak=1.0, decay='exp'), 10)


def test_schedule_is_dinov2s():
    """Its `CosineScheduler`: a warm-up that includes both its ends, then a cosine that starts at the peak again."""
    warmup, total, init, peak, final = 12, 40, 0.1, 1.0, 0.25
    cosine = final + 0.5 * (peak - final) * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup)))
    want = np.concatenate([np.linspace(init, peak, warmup), cosine])
    ours = optim.schedule(dict(peak=peak, init=init, final=final, warmup_steps=warmup, decay='cosine'), total)
    np.testing.assert_allclose(ours(np.arange(total)), want, rtol=1e-5)


def test_plain_adamw_equals_optax():
    params = {'w': jnp.linspace(-1, 1, 12).reshape(3, 4)}
    ours = optim.adamw(config(), params, 100)
    reference = optax.adamw(1e-2, weight_decay=0.1)
    a, b, sa, sb = params, params, ours.init(params), reference.init(params)
    for i in range(5):
        grads = jax.tree.map(lambda x: jnp.sin(x * (i + 1)), params)
        ua, sa = ours.update(grads, sa, a)
        ub, sb = reference.update(grads, sb, b)
        a, b = optax.apply_updates(a, ua), optax.apply_updates(b, ub)
    np.testing.assert_allclose(a['w'], b['w'], rtol=1e-6)


def test_groups_scale_freeze_and_layer_decay():
    params = {'blocks': {'w': jnp.ones((3, 2))}, 'head': {'last': jnp.ones(2)}, 'norm': jnp.ones(2)}
    tx = optim.adamw(config(groups=(
        (r'blocks/.*', dict(layer_decay=0.5)),
        (r'head/last', dict(frozen_steps=2)),
        (r'norm', dict(weight_decay=0.0, learning_rate=0.1)),
    )), params, 10)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    moved = []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        moved.append(updates)
    # Adam of a constant gradient is 1; decay adds 0.1 x parameter (1).
    np.testing.assert_allclose(moved[0]['blocks']['w'][:, 0], -1e-2 * 1.1 * np.array([0.125, 0.25, 0.5]), rtol=1e-5)
    np.testing.assert_allclose(moved[0]['norm'], -1e-3, rtol=1e-5)
    assert [float(m['head']['last'][0]) for m in moved] == pytest.approx([0, 0, -1.1e-2], rel=1e-5)


def test_uncovered_parameter_and_unknown_setting_are_named():
    params = {'a': jnp.ones(1), 'b': jnp.ones(1)}
    with pytest.raises(ValueError, match='no group covers parameter b'):
        optim.assign_groups(params, ((r'a', {}),))
    with pytest.raises(ValueError, match="unknown setting 'lr'"):
        optim.assign_groups(params, ((r'.*', dict(lr=1)),))


def test_clip_per_module():
    grads = {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([0.3, 0.4])}
    tx = optim.clip_by_norm(1.0, per_module=True)
    out, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(out['a'], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(out['b'], [0.3, 0.4], rtol=1e-6)  # by itself it is short enough


def test_accumulated_gradient_is_the_mean_over_the_whole_batch():
    batch = {'x': jax.random.normal(jax.random.key(0), (8, 3)), 'y': jnp.arange(8.0)}

    def loss(w, b, rng):
        error = b['x'] @ w - b['y']
        return jnp.mean(error ** 2), {'first_row': b['y'][0]}

    w = jnp.ones(3)
    (l1, _), g1 = optim.value_and_grad(loss, w, batch, jax.random.key(1))
    (l2, _), g2 = optim.value_and_grad(loss, w, batch, jax.random.key(1), accumulate=2, shards=2)
    np.testing.assert_allclose(l1, l2, rtol=1e-6)
    np.testing.assert_allclose(g1, g2, rtol=1e-5)


def test_microbatches_draw_by_themselves():
    loss = lambda w, b, rng: (w * b['x'].mean(), {'u': jax.random.uniform(rng)})
    key, batch = jax.random.key(1), {'x': jnp.ones(4)}
    (_, metrics), _ = optim.value_and_grad(loss, jnp.float32(1), batch, key, accumulate=2)
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, index))) for index in (0, 1)]
    assert drawn[0] != drawn[1] and float(metrics['u']) == pytest.approx(np.mean(drawn))


def test_microbatches_keep_each_devices_rows():
    split = optim.split_microbatches({'x': jnp.arange(8)}, parts=2, shards=2)['x']
    np.testing.assert_array_equal(split, [[0, 1, 4, 5], [2, 3, 6, 7]])  # shard 0 holds rows 0-3, shard 1 rows 4-7
    with pytest.raises(ValueError, match=r"batch\['x'\], 8"):
        optim.split_microbatches({'x': jnp.arange(8)}, parts=3, shards=2)


def test_ema_stays_float32_and_schedules():
    ema = optim.ema_update({'w': jnp.ones(2)}, {'w': jnp.zeros(2, jnp.bfloat16)}, 0.9)
    assert ema['w'].dtype == jnp.float32
    np.testing.assert_allclose(ema['w'], 0.9)
    ramp = optim.ema_decay(dict(decay=0.9999, ramp=True), 100)
    assert float(ramp(1)) == pytest.approx(2 / 11)
    assert float(ramp(10 ** 6)) == pytest.approx(0.9999, abs=1e-6)  # where the ramp is 0.999991
    teacher = optim.ema_decay(dict(decay=0.992, final=1.0), 100)
    assert float(teacher(1)) == pytest.approx(0.992) and float(teacher(101)) == pytest.approx(1.0)
    assert float(teacher(26)) == pytest.approx(1 - 0.008 * 0.5 * (1 + np.cos(np.pi / 4)), abs=1e-6)

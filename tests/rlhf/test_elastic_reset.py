"""Elastic Reset: traces, schedules, what a reset touches and what it does not, baselines."""
import dataclasses

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlhf_jax import elastic_reset as er

GOLDEN_STEPS = (4, 5, 6, 9, 10, 12)
GOLDEN = {  # x, ema after everything in the step (1-based)
    'elastic_reset': ([.3990864683, .1311424456, .2305676290, .5282625364, .1841780120, .3819829968],
                      [.0903559903, 0, .0230567629, .1350042134, 0, .0636710865]),
    'with_optimizer': ([.3990864683, .1311424456, .2311424452, .5301788447, .1848301236, .3847195289], None),
    'reset_to_ema': ([.3990864683, .1311424456, .2305676290, .5282625364, .2616163147, .4589856660],
                     [.0903559903, .1311424456, .1410849639, .2210467720, .2616163147, .2902362036]),
    'reset_to_init': ([.3990864683, 0, .0996143308, .3986733620, 0, .1994531492], None),
}


@pytest.mark.parametrize('arm', GOLDEN)
def test_golden_trace(arm):
    name = 'elastic_reset' if arm == 'with_optimizer' else arm
    config = er.method(name, 5, decay=.9, reset_optimizer=arm == 'with_optimizer')
    with jax.enable_x64(True):
        tx = optax.adam(.1)
        params = {'x': jnp.zeros((), jnp.float64)}
        elastic, opt_state = er.init(config, params), tx.init(params)

        @jax.jit
        def step(elastic, params, opt_state, k):
            updates, opt_state = tx.update({'x': params['x'] - 3}, opt_state)
            return er.apply(config, elastic, optax.apply_updates(params, updates), opt_state, config.due('step', k))

        trace = []
        for k in range(12):
            elastic, params, opt_state = step(elastic, params, opt_state, k)
            trace.append((float(params['x']), float(elastic.ema['x'])))
    at = np.array(trace)[np.array(GOLDEN_STEPS) - 1]
    np.testing.assert_allclose(at[:, 0], GOLDEN[arm][0], atol=1e-9)
    if GOLDEN[arm][1] is not None:
        np.testing.assert_allclose(at[:, 1], GOLDEN[arm][1], atol=1e-9)


# Schedules

def test_published_reset_steps():
    assert er.released('imdb').resets(50) == [0, 17, 34]
    assert er.released('stackllama').resets(600) == [260, 520]
    assert er.released('lewis').resets(8000) == [1999, 3999, 5999, 7999]


def test_published_ticks():
    ticks = lambda task, event, n: [k for k in range(n) if er.released(task).due(event, k).tick]
    assert ticks('imdb', 'iteration', 4) == [0, 1, 2, 3] and ticks('imdb', 'step', 4) == []
    assert ticks('stackllama', 'epoch', 3) == [0, 1, 2] and ticks('stackllama', 'iteration', 3) == []
    assert ticks('lewis', 'step', 301) == [0, 100, 200, 300]


def test_the_average_may_have_its_own_period():
    config = er.ElasticReset(period=2, ema_period=3)
    due = [config.due('step', k) for k in range(6)]
    assert [d.reset for d in due] == [False, True] * 3
    assert [d.reset_ema for d in due] == [False, False, True] * 2


def test_traced_and_python_schedules_agree():
    for config in (er.released('imdb'), er.released('stackllama'), er.released('lewis')):
        config = dataclasses.replace(config, period=3, tick_every=2)
        for event in er.EVENTS:
            traced = jax.jit(lambda k: config.due(event, k))
            for k in range(7):
                assert tuple(map(bool, traced(k))) == tuple(map(bool, config.due(event, k))), (event, k)


# What a reset touches

def trained(config, dtype=jnp.float32):
    """A policy with a critic, five Adam steps and ticks after its start: `(elastic, params, opt_state, start)`."""
    params = {'trunk': {'w': jnp.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3), 'b': jnp.ones(3, dtype)},
              'value_head': {'w': jnp.full(3, .5, dtype)}}
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda n: -.01 * (n + 1)))
    elastic, opt_state, start = er.init(config, params), tx.init(params), params
    for _ in range(5):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        elastic = er.tick(elastic, params, config.decay)
    return elastic, params, opt_state, start


NOW = er.Due(False, True, True)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_reset_is_bitwise_and_leaves_optimizer_and_critic():
    config = er.ElasticReset(period=5, decay=.8, policy='.*', critic='value_head/.*')
    elastic, params, opt_state, start = trained(config)
    after, new, new_opt = er.apply(config, elastic, params, opt_state, NOW)
    assert set(elastic.ema) == {'trunk'}
    same(new['trunk'], elastic.ema['trunk'])
    same(after.ema['trunk'], start['trunk'])
    same(after.init['trunk'], start['trunk'])
    same(new['value_head'], params['value_head'])
    same(new_opt, opt_state)
    assert np.abs(new['trunk']['w'] - params['trunk']['w']).max() > 1e-3


def test_the_average_is_read_before_it_is_reset_and_after_its_tick():
    config = er.ElasticReset(period=1, decay=.5)
    params = {'x': jnp.zeros(1)}
    elastic = er.init(config, params)
    elastic, params, _ = er.apply(config, elastic, {'x': jnp.ones(1)}, (), er.Due(True, True, True))
    assert params['x'] == .5 and elastic.ema['x'] == 0


def test_switches():
    config = er.ElasticReset(period=5, decay=.8, critic='value_head/.*', reset_critic=True, reset_optimizer=True)
    elastic, params, opt_state, start = trained(config)
    _, new, new_opt = er.apply(config, elastic, params, opt_state, NOW)
    same(new['value_head'], start['value_head'])
    assert new_opt[0].count == 0 and new_opt[1].count == 5  # moments are forgotten, the schedule goes on
    same(new_opt[0].mu, jax.tree.map(jnp.zeros_like, params))
    same(new_opt[0].nu, jax.tree.map(jnp.zeros_like, params))
    to_init = er.ElasticReset(period=5, reset_to='init', reset_ema=False)
    elastic, params, opt_state, start = trained(to_init)
    after, new, _ = er.apply(to_init, elastic, params, opt_state, to_init.due('step', 4))
    same(new, start)
    same(after.ema, er.tick(elastic, params, to_init.decay).ema)


@pytest.mark.parametrize('tx', [optax.sgd(.1, momentum=.9), optax.rmsprop(.1), optax.rmsprop(.1, momentum=.9),
                                optax.rmsprop(.1, centered=True), optax.adam(.1)])
def test_moments_of_any_optimizer_are_forgotten(tx):
    params = {'x': jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params)
    assert all(np.all(x != 0) for x in jax.tree.leaves(state))
    same(er.forget_moments(state), jax.tree.map(jnp.zeros_like, state))


def test_decay_zero_keeps_the_policy_and_decay_one_returns_to_the_start():
    for decay, expected in ((0.0, 1), (1.0, 3)):
        config = er.ElasticReset(period=5, decay=decay)
        state = trained(config)
        _, new, _ = er.apply(config, *state[:3], NOW)
        same(new, state[expected])


def test_nothing_aliases_so_buffers_may_be_donated():
    config = er.ElasticReset(period=5, decay=0.0)  # where the average is the policy
    _, params, opt_state, _ = trained(config)
    elastic = er.init(config, params)
    now = er.Due(True, True, True)
    donating = jax.jit(lambda e, p: er.apply(config, e, p, opt_state, now)[:2], donate_argnums=(0, 1))
    eager = er.apply(config, elastic, params, opt_state, now)[:2]
    pointers = lambda tree: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    assert len(set(pointers(eager))) == len(pointers(eager))
    compiled = donating(elastic, params)
    assert len(set(pointers(compiled))) == len(pointers(compiled))


def test_lora_factors_are_averaged_by_themselves():
    config = er.ElasticReset(period=1, decay=.5, policy=r'.*/lora_[ab]')
    params = {'layer': {'kernel': jnp.ones((2, 2)), 'lora_a': jnp.ones((2, 1)), 'lora_b': jnp.zeros((1, 2))}}
    elastic = er.init(config, params)
    moved = {'layer': {'kernel': jnp.full((2, 2), 7.0), 'lora_a': jnp.full((2, 1), 3.0), 'lora_b': jnp.ones((1, 2))}}
    _, new, _ = er.apply(config, elastic, moved, (), er.Due(True, True, True))
    assert set(elastic.ema['layer']) == {'lora_a', 'lora_b'}
    same(new['layer'], {'kernel': moved['layer']['kernel'], 'lora_a': jnp.full((2, 1), 2.0),
                        'lora_b': jnp.full((1, 2), .5)})
    # EMA(B) EMA(A), which is not the average of the products.
    assert (new['layer']['lora_a'] @ new['layer']['lora_b'])[0, 0] == 1.0 != 1.5


def test_the_average_moves_in_float32_where_it_would_freeze_in_bfloat16():
    """Masters in float32, a step of 1e-6 on weights near 1, decay 0.995."""
    master = {'x': jnp.linspace(.9, 1.1, 64)}
    moved = {'x': master['x'] + 1e-6}
    config = er.ElasticReset(period=10)
    elastic = er.tick(er.init(config, master), {'x': moved['x'] + 1e-5}, config.decay)
    assert (elastic.ema['x'] != master['x']).any()
    low = {'x': master['x'].astype(jnp.bfloat16)}
    assert er.init(config, low).ema['x'].dtype == jnp.float32
    frozen = low['x'] - jnp.bfloat16(.005) * (low['x'] - moved['x'].astype(jnp.bfloat16))
    np.testing.assert_array_equal(frozen, low['x'])
    # One bfloat16 ulp of displacement: the float32 average follows by its 0.005, which bfloat16 would round away.
    ulp = {'x': low['x'] + jnp.bfloat16(2 ** -7)}
    followed = er.tick(er.init(config, low), ulp, config.decay).ema['x'] - low['x'].astype(jnp.float32)
    displaced = ulp['x'].astype(jnp.float32) - low['x'].astype(jnp.float32)
    np.testing.assert_allclose(followed, .005 * displaced, rtol=1e-2)
    _, new, _ = er.apply(config, er.init(config, low), ulp, (), NOW)
    assert new['x'].dtype == jnp.bfloat16
    same(new, low)


# Parameters of any type

def layers(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return [{'kernel': draw(2, 3), 'bias': draw(3)}, {'kernel': draw(3, 1), 'bias': draw(1)}]


class Pair(nnx.Module):
    """Two layers in a list, and state that is no parameter: a counter and a PRNG key."""

    def __init__(self, values):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))])
        for layer, value in zip(self.layers, values):
            layer.kernel.value, layer.bias.value = value['kernel'], value['bias']
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(1))


TREES = {
    'nested dict': (lambda x: {'layers': {str(i): layer for i, layer in enumerate(x)}},
                    lambda tree: [tree['layers']['0'], tree['layers']['1']]),
    'list': (lambda x: {'layers': list(x)}, lambda tree: tree['layers']),
    'tuple': (lambda x: tuple(x), lambda tree: list(tree)),
    'FrozenDict': (lambda x: flax.core.freeze({'layers': tuple(x)}), lambda tree: [
        flax.core.unfreeze(layer) for layer in tree['layers']]),
    'nnx.State': (lambda x: nnx.state(Pair(x)), lambda tree: [
        {name: tree['layers'][i][name][...] for name in ('kernel', 'bias')} for i in (0, 1)]),
}


def trained_on(kind, config, tx, steps=6):
    """The layers after a loop of one's own, one jitted step at a time, and the tree that held them."""
    wrap, unwrap = TREES[kind]
    params = wrap(layers())
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    tx = optax.masked(tx, jax.tree.map(is_float, params))
    elastic, opt_state = er.init(config, params), tx.init(params)

    @jax.jit
    def step(elastic, params, opt_state, k):
        grads = jax.tree.map(lambda x: x - 3 if is_float(x) else x, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p + u if is_float(p) else p, params, updates)
        return er.apply(config, elastic, params, opt_state, config.due('step', k))
    for k in range(steps):
        elastic, params, opt_state = step(elastic, params, opt_state, k)
    return unwrap(params), params, elastic


@pytest.mark.parametrize('kind', [kind for kind in TREES if kind != 'nested dict'])
def test_parameters_of_any_type_are_averaged_and_reset(kind):
    """As the same numbers in nested dicts are; what is no floating parameter is left alone, and the type stays."""
    config, tx = er.ElasticReset(period=3, decay=.8), optax.adam(.1)
    want, _, _ = trained_on('nested dict', config, tx)
    got, tree, elastic = trained_on(kind, config, tx)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    start = TREES[kind][0](layers())
    assert jax.tree.structure(tree) == jax.tree.structure(start)
    assert er.kept(elastic, tree) == 0  # the average has just been reset
    same(TREES[kind][1](er.reference(config, elastic, tree)), layers())
    if kind == 'nnx.State':
        assert tree['dropout']['rngs']['count'][...] == start['dropout']['rngs']['count'][...]
        assert set(elastic.ema) == {'layers'}


def test_paths_name_positions_too():
    config = er.ElasticReset(period=1, policy='layers/1/.*', critic='layers/0/bias', reset_critic=True)
    elastic = er.init(config, {'layers': layers()})
    assert elastic.ema.keys() == {'layers'} and elastic.ema['layers'].keys() == {'1'}
    moved = {'layers': jax.tree.map(lambda x: x + 1, layers())}
    _, new, _ = er.apply(config, elastic, moved, (), NOW)
    same(new['layers'][1], layers()[1])
    same(new['layers'][0], {'kernel': moved['layers'][0]['kernel'], 'bias': layers()[0]['bias']})


# KL reference

def test_kl_reference():
    for name, moves in (('init', False), ('ema', True)):
        config = er.ElasticReset(period=5, decay=.8, kl_reference=name)
        params = {'logits': jnp.zeros(4)}
        elastic = er.init(config, params)
        logp = lambda e: jax.nn.log_softmax(er.reference(config, e, params)['logits'])
        before = logp(elastic)
        after = logp(er.tick(elastic, {'logits': jnp.arange(4.0)}, config.decay))
        assert (np.abs(after - before).max() > 1e-2) == moves


def test_compared_methods_differ_where_they_should():
    period = 4
    reset_at = {name: er.method(name, period).resets(9) for name in er.METHODS}
    assert [reset_at[n] for n in ('fixed_reference', 'ema_anchor', 'reference_reset')] == [[]] * 3
    assert [reset_at[n] for n in ('reset_to_init', 'reset_to_ema', 'elastic_reset')] == [[3, 7]] * 3
    assert er.method('reset_to_init', period).reset_to == 'init'
    assert not er.method('reset_to_ema', period).reset_ema and er.method('elastic_reset', period).reset_ema
    assert er.method('ema_anchor', period, decay=.7).kl_reference == 'ema'
    config = er.method('reference_reset', period, decay=.7)
    elastic, params = er.init(config, {'x': jnp.zeros(1)}), {'x': jnp.ones(1)}
    for k in range(8):
        params = {'x': jnp.full(1, float(k + 1))}
        elastic, params, _ = er.apply(config, elastic, params, (), config.due('step', k))
        assert er.reference(config, elastic, params)['x'] == (k + 1) // period * period
    # In a run whose resets are of iterations, its renewals are; whatever the average of the others ticks at.
    settings = dict(tick_on='step', tick_every=3, tick_offset=2, reset_on='iteration', reset_offset=0,
                    reset_skip_first=True)
    renewing, resetting = (er.method(name, period, **settings) for name in ('reference_reset', 'reset_to_init'))
    assert [k for k in range(13) if renewing.due('iteration', k).tick] == resetting.resets(13) == [4, 8, 12]
    assert not any(renewing.due(event, k).tick for event in ('step', 'epoch') for k in range(13))
    config = er.method('reference_reset', period, tick_offset=0)  # the Lewis game's, which says nothing of resets
    assert [k for k in range(9) if config.due('step', k).tick] == [3, 7]
    with pytest.raises(ValueError, match="method='warp'"):
        er.method('warp', period)


def test_what_is_kept_is_measured_between_tick_and_reset():
    config = er.ElasticReset(period=2, decay=.8)
    elastic, params, opt_state, start = trained(config)
    for due in (er.Due(True, False, False), er.Due(True, True, True)):
        want = er.kept(er.tick(elastic, params, config.decay), params)
        *got, kept = er.apply_measured(config, elastic, params, opt_state, due)
        same(tuple(got), er.apply(config, elastic, params, opt_state, due))
        assert 0 < kept == want < 1


# Measures

@pytest.mark.parametrize('decay, ticks, expected', [
    (.995, 1, .005), (.995, 17, .044), (.99, 17, .085), (.95, 17, .350), (.999, 17, .009), (.995, 1700, .883),
    (.995, 50, .118), (.995, 20, .051), (.9995, 20, .005), (.995, 260, .443), (.995, 520, .646), (.995, 1040, .810)])
def test_published_kept_fractions(decay, ticks, expected):
    assert abs(er.kept_fraction(decay, ticks) - expected) < 5.01e-4  # the table's three digits


@pytest.mark.parametrize('decay, ticks', [(.995, 17), (.995, 260), (.95, 17)])
def test_kept_measures_the_fraction_of_a_constant_drift(decay, ticks):
    config = er.ElasticReset(period=ticks, decay=decay)
    start = {'a': jnp.linspace(-1, 1, 5), 'b': {'c': jnp.ones((2, 2))}}
    velocity = {'a': jnp.array([1., -2, 0, 3, .5]), 'b': {'c': jnp.array([[0., 1], [2, -1]])}}
    at = lambda k: jax.tree.map(lambda x, v: x + .1 * k * v, start, velocity)
    elastic = jax.jit(lambda e: jax.lax.fori_loop(1, ticks + 1, lambda k, e: er.tick(e, at(k), decay), e))(
        er.init(config, start))
    np.testing.assert_allclose(er.kept(elastic, at(ticks)), er.kept_fraction(decay, ticks), atol=1e-4)
    assert er.kept(er.init(config, start), start) == 0


def test_kept_fraction_limits():
    assert er.kept_fraction(0.0, 7) == 1 and er.kept_fraction(1.0, 7) == 0
    with pytest.raises(ValueError, match='ticks=0'):
        er.kept_fraction(.9, 0)


def test_interpolation_goes_from_the_start_to_the_end():
    a, b = {'x': jnp.array([1., 2])}, {'x': jnp.array([3., -2])}
    same(er.interpolate(a, b, 0.0), a)
    same(er.interpolate(a, b, 1.0), b)
    np.testing.assert_allclose(er.interpolate(a, b, .25)['x'], [1.5, 1])
    low = er.interpolate(a, jax.tree.map(lambda x: x.astype(jnp.bfloat16), b), .5)
    assert low['x'].dtype == jnp.bfloat16


# Accumulated gradients, and settings that cannot work

def test_boundary_of_accumulated_gradients():
    params = {'x': jnp.ones(1)}
    assert er.at_boundary(optax.adam(.1).init(params)) is True
    tx = optax.MultiSteps(optax.adam(.1), 2)
    state = tx.init(params)
    assert er.at_boundary(state)
    _, state = tx.update(params, state, params)
    assert not er.at_boundary(state)
    assert not er.at_boundary((tx.init(params), state)) and not er.at_boundary((state, tx.init(params)))
    _, state = tx.update(params, state, params)
    assert er.at_boundary((state, optax.EmptyState()))


@pytest.mark.parametrize('settings, message', [
    ({'decay': 1.5}, 'elastic.decay=1.5'), ({'period': 0}, 'elastic.period=0'), ({'period': 2.5}, 'elastic.period=2.5'),
    ({'ema_period': 5, 'reset_ema': False}, 'elastic.ema_period=5'), ({'tick_every': 0}, 'elastic.tick_every=0'),
    ({'tick_on': 'batch'}, "elastic.tick_on='batch'"), ({'reset_on': 'x'}, "elastic.reset_on='x'"),
    ({'reset_to': 'sft'}, "elastic.reset_to='sft'"), ({'kl_reference': 'sft'}, "elastic.kl_reference='sft'"),
    ({'period': 3, 'reset_critic': True}, 'elastic.critic is empty'),
    ({'reset_optimizer': True}, 'elastic.period is not set')])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        er.ElasticReset(**settings)


def test_a_run_that_would_never_reset_is_refused():
    with pytest.raises(ValueError, match='elastic.period=20 is longer than the run of 10 steps'):
        er.ElasticReset(period=20).resets(10)
    with pytest.raises(ValueError, match="elastic.policy='lora' matches no parameter"):
        er.init(er.ElasticReset(period=1, policy='lora'), {'x': jnp.ones(1)})
    with pytest.raises(ValueError, match="event='batch'"):
        er.ElasticReset().due('batch', 0)

"""Rollout streams: order, staleness, threads against serial, errors, shutdown, checkpoints with batches in flight."""
import json
import threading
import time

import numpy as np
import pytest

from rlhf_jax.rollout import batch as batch_lib
from rlhf_jax.rollout.publish import InProcess
from rlhf_jax.rollout.stream import RolloutStream

WAIT = 20.0  # seconds after which a test that hangs fails instead


class Held:
    """The least there is to `Weights`: a dict."""

    def __init__(self):
        self.versions, self.fetched = {}, []

    def publish(self, version, params):
        self.versions[version] = {name: x.copy() for name, x in params.items()}

    def fetch(self, version):
        self.fetched.append(version)
        return self.versions[version]

    def release(self, before):
        self.versions = {v: p for v, p in self.versions.items() if v >= before}


def generate(params, *, index, version):
    """A batch that depends on every bit of the weights and on the index."""
    rng = np.random.default_rng(index)
    x = np.tanh(rng.normal(size=(2, 2, 3)).astype(np.float32) * params['w'])
    return {'tokens': rng.integers(0, 9, (2, 2, 5)), 'mask': np.ones((2, 2, 3), bool), 'logprobs': -np.abs(x),
            'rewards': x.sum(-1), 'index': np.full((2, 2), index)}


def learn(w, batch):
    return (w * np.float32(.9) + batch['rewards'].mean() * np.float32(.1) + batch['logprobs'].sum()).astype(np.float32)


def train(stream, num, *, w=None, start=0, log=None):
    """`num` steps of the loop; returns the weights and each batch's digest."""
    w = np.linspace(-1, 1, 3, dtype=np.float32) if w is None else w
    stream.publish(start, {'w': w})
    seen = []
    for n in range(start, start + num):
        batch = next(stream)
        seen.append({'batch': {k: v.tobytes() for k, v in batch.items()}, 'version': batch['policy_version'].copy(),
                     'staleness': stream.metrics['staleness'], 'index': int(batch['index'][0, 0])})
        w = learn(w, batch)
        stream.publish(n + 1, {'w': w})
    return w, seen


def run(num=8, **settings):
    with RolloutStream(generate, Held(), timeout=WAIT, **settings) as stream:
        return train(stream, num)


# Order and staleness

def test_no_staleness_is_the_synchronous_loop_bit_for_bit():
    w, expected = np.linspace(-1, 1, 3, dtype=np.float32), []
    for index in range(8):
        batch = generate({'w': w}, index=index, version=index)
        expected.append({k: v.tobytes() for k, v in batch.items()})
        w = learn(w, batch)
    for threaded in (False, True):
        ours, seen = run(max_staleness=0, threaded=threaded)
        np.testing.assert_array_equal(ours, w)
        assert [{k: s['batch'][k] for k in expected[0]} for s in seen] == expected
        assert [s['staleness'] for s in seen] == [0] * 8


@pytest.mark.parametrize('bound', [0, 1, 2, 4])
def test_threads_and_their_serial_emulation_give_the_same_sequence(bound):
    serial, in_order = run(max_staleness=bound, threaded=False)
    for _ in range(3):
        threaded, seen = run(max_staleness=bound, threaded=True)
        np.testing.assert_array_equal(threaded, serial)
        assert [s['batch'] for s in seen] == [s['batch'] for s in in_order]
    assert [s['index'] for s in in_order] == list(range(8))  # none is discarded or repeated
    late, seen = run(max_staleness=bound, threaded=False, late=True)
    np.testing.assert_array_equal(late, serial)
    assert [s['batch'] for s in seen] == [s['batch'] for s in in_order]
    if bound:
        assert not np.array_equal(serial, run(max_staleness=0, threaded=False)[0])


@pytest.mark.parametrize('bound', [0, 1, 2])
def test_late_asks_for_a_batch_once_its_version_is_not_the_newest(bound):
    asked, newest = [], -1
    stream = RolloutStream(lambda params, *, index, version: asked.append((index, newest)) or generate(
        params, index=index, version=version), Held(), max_staleness=bound, threaded=False, late=True, num_batches=6)
    w = np.linspace(-1, 1, 3, dtype=np.float32)
    for newest in range(6):
        stream.publish(newest, {'w': w})
        w = learn(w, next(stream))
    assert asked == [(i, min(i, max(0, i - bound) + 1)) for i in range(6)]  # or once it is due


def test_published_version_table():
    """The asynchronous mode: lag 0 for the first batch, 1 from then on. Bound S: min(i, S)."""
    for bound in (1, 3):
        _, seen = run(max_staleness=bound)
        assert [s['staleness'] for s in seen] == [min(i, bound) for i in range(8)]
        assert [int(s['version'][0, 0, 0]) for s in seen] == [max(0, i - bound) for i in range(8)]
        assert all((s['version'] == s['version'][0, 0, 0]).all() and s['version'].shape == (2, 2, 3) for s in seen)


def test_staleness_is_that_of_counted_tokens():
    versions = np.array([[[4, -1]]])
    assert batch_lib.staleness({'mask': np.array([[[1, 0]]]), 'policy_version': versions}, 5) == 1
    assert batch_lib.staleness({'mask': np.zeros((1, 1, 2)), 'policy_version': versions + 1}, 5) == 5  # none counts


def test_staleness_in_optimizer_steps():
    steps = lambda lag, n, t: [batch_lib.optimizer_steps_behind(lag, n, t, m, e) for e in range(t) for m in range(n)]
    assert steps(0, 4, 1) == [0, 1, 2, 3]
    assert steps(1, 4, 2) == list(range(8, 16))  # N T ... 2 N T - 1


@pytest.mark.parametrize('threaded', [False, True])
def test_generation_never_runs_further_ahead_than_admitted(threaded):
    ahead, lock = [], threading.Lock()
    stream = None

    def spy(params, *, index, version):
        with lock:
            ahead.append((index, stream._published))
        return generate(params, index=index, version=version)

    stream = RolloutStream(spy, Held(), max_staleness=2, threaded=threaded, timeout=WAIT)
    with stream:
        train(stream, 6)
        stream.get_state()
    assert all(index - published <= 2 for index, published in ahead)
    assert max(index for index, _ in ahead) >= 7  # but it does run ahead


def test_newest_weights_keep_the_bound():
    with RolloutStream(generate, Held(), max_staleness=3, newest=True, timeout=WAIT) as stream:
        _, seen = train(stream, 10)
    assert all(0 <= s['staleness'] <= 3 for s in seen)
    serial = RolloutStream(generate, Held(), max_staleness=1, newest=True, threaded=False)
    assert [s['staleness'] for s in train(serial, 4)[1]] == [0, 1, 1, 1]


def test_weights_that_change_on_the_way_are_versioned_token_by_token():
    def interrupted(params, *, index, version):
        batch = generate(params, index=index, version=version)
        versions = np.full((2, 2, 3), version, np.int32)
        versions[..., 2] += index > 2  # the last token is one version fresher
        return batch | {'policy_version': versions}

    with RolloutStream(interrupted, Held(), max_staleness=2, timeout=WAIT) as stream:
        _, seen = train(stream, 5)
    assert seen[4]['version'].tolist() == [[[2, 2, 3]] * 2] * 2
    assert seen[4]['staleness'] == 2  # of the oldest token


def test_versions_are_released_once_no_batch_can_need_them():
    weights = Held()
    with RolloutStream(generate, weights, max_staleness=1, threaded=False) as stream:
        train(stream, 5)
    assert sorted(weights.versions) == [5]  # batch 5, of version 4, is made already
    assert weights.fetched == [0, 0, 1, 2, 3, 4]


def test_a_snapshot_is_what_is_generated_from():
    """Weights that the learner overwrites in place after publishing do not reach the generator."""
    stream = RolloutStream(generate, InProcess(), max_staleness=0, threaded=True, timeout=WAIT)
    w = np.ones(3, np.float32)
    with stream:
        stream.publish(0, {'w': w})
        w[:] = 99
        np.testing.assert_array_equal(next(stream)['rewards'], generate({'w': np.ones(3, np.float32)}, index=0,
                                                                        version=0)['rewards'])


# What is refused

def test_version_zero_comes_before_the_first_rollout():
    for threaded in (False, True):
        with RolloutStream(generate, Held(), threaded=threaded) as stream:
            with pytest.raises(RuntimeError, match='version 0 must be published before batch 0 .* newest is none'):
                next(stream)


def test_a_forgotten_publish_is_an_error_and_not_a_deadlock():
    with RolloutStream(generate, Held(), timeout=WAIT) as stream:
        stream.publish(0, {'w': np.ones(3, np.float32)})
        next(stream)
        with pytest.raises(RuntimeError, match='version 1 must be published before batch 1'):
            next(stream)
        for wrong in (0, 2):
            with pytest.raises(ValueError, match=f'version={wrong} cannot be published'):
                stream.publish(wrong, {})
        stream.publish(1, {'w': np.ones(3, np.float32)})
        with pytest.raises(ValueError, match='version=1 cannot be published'):
            stream.publish(1, {})


@pytest.mark.parametrize('settings, message', [
    ({'max_staleness': -1}, 'max_staleness=-1'), ({'max_staleness': .5}, 'max_staleness=0.5'),
    ({'num_batches': -2}, 'num_batches=-2'), ({'timeout': 0}, 'timeout=0')])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutStream(generate, Held(), **settings)


# Errors, time-outs, the end

@pytest.mark.parametrize('threaded', [False, True])
def test_errors_of_the_worker_reach_the_learner_where_the_batch_is_missed(threaded):
    def failing(params, *, index, version):
        if index == 3:
            raise ZeroDivisionError('reward of prompt 17')
        return generate(params, index=index, version=version)

    with RolloutStream(failing, Held(), max_staleness=int(threaded), threaded=threaded, timeout=WAIT) as stream:
        w = np.ones(3, np.float32)
        for n in range(3):
            stream.publish(n, {'w': w})
            next(stream)
        stream.publish(3, {'w': w})
        with pytest.raises(ZeroDivisionError, match='reward of prompt 17') as caught:
            next(stream)
        assert caught.value.__notes__ == [f'while generating batch 3 with version {2 if threaded else 3}']
    assert not any(t.name == 'rollout' for t in threading.enumerate())


def test_malformed_batches_are_named():
    bad = lambda params, *, index, version: generate(params, index=index, version=version) | {'rewards': np.ones(3)}
    with RolloutStream(bad, Held(), threaded=False) as stream:
        stream.publish(0, {'w': np.ones(3, np.float32)})
        with pytest.raises(ValueError, match=r'batch 0: rewards have shape \(3,\), expected \(2, 2\), one a comp'):
            next(stream)


def test_a_generator_that_hangs_times_out():
    release = threading.Event()
    def hanging(params, *, index, version):
        release.wait(WAIT)
        return generate(params, index=index, version=version)
    stream = RolloutStream(hanging, Held(), timeout=.05)
    stream.publish(0, {'w': np.ones(3, np.float32)})
    with pytest.raises(TimeoutError, match='batch 0 was not generated within timeout=0.05 s'):
        next(stream)
    release.set()
    stream.close()


class Asked(Exception):
    pass


@pytest.mark.parametrize('threaded', [True, False])
@pytest.mark.parametrize('bound', [0, 1])
def test_a_wait_that_is_given_up_can_be_saved_if_that_is_exact(threaded, bound):
    """A reward hangs and somebody asks the process to stop: without staleness nothing is in flight and the state is
    whole; a batch in flight from weights that will be gone is waited for, and not for ever."""
    hangs, release = threading.Event(), threading.Event()

    def sometimes(params, *, index, version):
        if index == 2 + bound:
            hangs.set()
            if not threaded:
                raise Asked  # as a reward that looks at signals does in the main thread
            release.wait(WAIT)
        return generate(params, index=index, version=version)

    def check():
        if hangs.is_set() and stream._next == 2 + bound:
            raise Asked
    stream = RolloutStream(sometimes, Held(), max_staleness=bound, threaded=threaded, check=check)
    try:
        with pytest.raises(Asked):
            train(stream, 5)
        began = time.perf_counter()
        if bound and threaded:
            with pytest.raises(TimeoutError):
                stream.get_state(patience=.1)
        else:  # in one thread the batch that is drawn next was made before the one that hangs
            saved = stream.get_state(patience=.1)
            assert (saved['next'], len(saved['batches'])) == (2, bound)
        stream.close(patience=.1)
        assert time.perf_counter() - began < WAIT / 2
    finally:
        release.set()


def test_a_run_of_known_length_wastes_no_generation():
    made = []
    def counting(params, *, index, version):
        made.append(index)
        return generate(params, index=index, version=version)
    for threaded in (False, True):
        made.clear()
        with RolloutStream(counting, Held(), max_staleness=3, threaded=threaded, num_batches=5, timeout=WAIT) as stream:
            train(stream, 5)
            with pytest.raises(StopIteration):
                next(stream)
            assert stream.get_state() == {'next': 5, 'batches': []}
        assert made == list(range(5))


def test_closing_drains():
    entered, release, finished = threading.Event(), threading.Event(), []
    def slow(params, *, index, version):
        if index == 1:
            entered.set()
            release.wait(WAIT)
        finished.append(index)
        return generate(params, index=index, version=version)
    stream = RolloutStream(slow, Held(), max_staleness=2, timeout=WAIT)
    stream.publish(0, {'w': np.ones(3, np.float32)})
    next(stream)
    entered.wait(WAIT)
    closing = threading.Thread(target=stream.close)
    closing.start()
    release.set()
    closing.join(WAIT)
    assert not closing.is_alive() and finished == [0, 1]  # the one begun is finished, none is begun after
    with pytest.raises(RuntimeError, match='closed'):
        next(stream)
    stream.close()  # once more is no error


# Checkpoints

SERIAL, THREADED, LATE = dict(threaded=False), dict(threaded=True), dict(threaded=False, late=True)


@pytest.mark.parametrize('first, second', [(SERIAL, THREADED), (THREADED, SERIAL), (LATE, LATE)])
@pytest.mark.parametrize('bound', [0, 1, 3])
@pytest.mark.parametrize('at', [0, 1, 2, 5])
def test_a_resumed_run_continues_bit_for_bit(bound, first, second, at):
    whole, seen = run(max_staleness=bound, threaded=False, num=9)
    with RolloutStream(generate, Held(), max_staleness=bound, **first, timeout=WAIT) as stream:
        w, _ = train(stream, at)
        saved = json.loads(json.dumps(stream.get_state()))  # as a checkpoint holds it
    assert saved['next'] == at and len(saved['batches']) == (bound if at else 0)
    with RolloutStream(generate, Held(), max_staleness=bound, **second, timeout=WAIT) as stream:
        stream.set_state(saved)
        resumed, rest = train(stream, 9 - at, w=w, start=at)
        again = stream.get_state()
    np.testing.assert_array_equal(resumed, whole)
    assert [s['batch'] for s in rest] == [s['batch'] for s in seen[at:]]
    assert [s['staleness'] for s in rest] == [s['staleness'] for s in seen[at:]]
    assert len(again['batches']) == bound


def test_a_checkpoint_right_after_resuming_holds_the_same():
    with RolloutStream(generate, Held(), max_staleness=2, timeout=WAIT) as stream:
        w, _ = train(stream, 4)
        saved = stream.get_state()
    stream = RolloutStream(generate, Held(), max_staleness=2, timeout=WAIT)
    stream.set_state(saved)
    assert stream.get_state() == saved
    stream.publish(4, {'w': w})
    assert stream.get_state() == saved
    with pytest.raises(RuntimeError, match='set_state must come before'):
        stream.set_state(saved)


def test_saving_waits_for_batches_whose_weights_will_be_gone():
    entered, release = threading.Event(), threading.Event()
    def slow(params, *, index, version):
        if index == 1:
            entered.set()
            release.wait(WAIT)
        return generate(params, index=index, version=version)
    with RolloutStream(slow, Held(), max_staleness=1, timeout=WAIT) as stream:
        stream.publish(0, {'w': np.ones(3, np.float32)})
        next(stream)
        stream.publish(1, {'w': np.ones(3, np.float32) / 2})
        entered.wait(WAIT)
        threading.Timer(.05, release.set).start()
        saved = stream.get_state()
    assert len(saved['batches']) == 1 and batch_lib.from_json(saved['batches'][0])['policy_version'].max() == 0


def test_the_bound_may_grow_but_not_shrink_below_what_is_in_flight():
    with RolloutStream(generate, Held(), max_staleness=2, timeout=WAIT) as stream:
        w, _ = train(stream, 4)
        saved = stream.get_state()
    smaller = RolloutStream(generate, Held(), max_staleness=1)
    with pytest.raises(ValueError, match='max_staleness=1, but batch 4 .* 2 versions old'):
        smaller.set_state(saved)
    with RolloutStream(generate, Held(), max_staleness=4, timeout=WAIT) as stream:
        stream.set_state(saved)
        _, seen = train(stream, 6, w=w, start=4)
    assert [s['staleness'] for s in seen] == [2, 2, 2, 3, 4, 4]


# What is measured

def test_idle_times_of_both_sides():
    """On a clock that only generation moves, in the serial stream, where all of it can be counted."""
    now = [0.0]
    def timed(params, *, index, version):
        now[0] += 5
        return generate(params, index=index, version=version)
    stream = RolloutStream(timed, Held(), max_staleness=1, threaded=False, clock=lambda: now[0])
    stream.publish(0, {'w': np.ones(3, np.float32)})
    next(stream)
    assert stream.metrics['generate'] == 5 and stream.metrics['learner_wait'] == 10 and stream.metrics['in_flight'] == 1
    assert stream.metrics['generator_wait'] == stream.metrics['load'] == stream.metrics['publish'] == 0


def test_the_generator_waits_for_admission():
    now, idle = [0.0], threading.Event()
    class Watched(threading.Condition):
        def wait_for(self, predicate, timeout=None):
            if threading.current_thread().name == 'rollout' and not predicate():
                idle.set()
            return super().wait_for(predicate, timeout)
    stream = RolloutStream(generate, Held(), max_staleness=0, timeout=WAIT, clock=lambda: now[0])
    stream._changed = Watched()
    with stream:
        stream.publish(0, {'w': np.ones(3, np.float32)})
        next(stream)
        idle.wait(WAIT)  # it has nothing admitted now, while the learner works for 3 s
        now[0] += 3
        stream.publish(1, {'w': np.ones(3, np.float32)})
        next(stream)
        assert stream.metrics['generator_wait'] == 3


# Batches

def full(**changes):
    return generate({'w': np.ones(3, np.float32)}, index=0, version=0) | {
        'policy_version': np.zeros((2, 2, 3), np.int32)} | changes


@pytest.mark.parametrize('changes, message', [
    ({'mask': np.ones((2, 2, 2))}, r'mask has shape \(2, 2, 2\)'),
    ({'policy_version': np.zeros((2, 2))}, 'policy_version has shape'),
    ({'tokens': np.zeros((2, 2, 2))}, r'tokens have shape \(2, 2, 2\), expected \[2, 2, at least 3\]'),
    ({'rewards': np.zeros(4)}, r'rewards have shape \(4,\), expected \(2, 2\), one a completion'),
    ({'rewards': np.array([[1, np.nan], [np.inf, 2]])}, '1 of 4 rewards are not finite'),
    ({'rewards': np.full((2, 2), np.nan)}, r'all rewards are missing \(NaN\)'),
    ({'logprobs': np.full((2, 2, 3), -np.inf)}, '12 of 12 logprobs are not finite'),
    ({'logprobs': np.zeros((4, 3))}, r'logprobs have shape \(4, 3\), expected \[prompts, completions, response tokens'),
    ({'prompt_id': np.zeros(2)}, r'prompt_id has shape \(2,\), expected \[2, 2, ...\]'),
    ({'tokens': np.full((2, 2, 5), -1)}, r'tokens lie in -1..-1, outside the ids of the model'),
    ({'logprobs': np.zeros((2, 0, 3))}, 'at least one completion')])
def test_a_bad_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        batch_lib.check(full(**changes))
    for name in batch_lib.FIELDS:
        with pytest.raises(ValueError, match=f'field {name} is missing'):
            batch_lib.check({k: v for k, v in full().items() if k != name})


def test_tokens_that_the_model_does_not_have_are_named():
    tokens = np.zeros((2, 2, 5), np.int32)
    tokens[1, 0, 4] = 100
    batch_lib.check(full(tokens=tokens), vocab_size=101)
    with pytest.raises(ValueError, match='batch 7: tokens lie in 0..100, outside the ids of the model, 0..99'):
        batch_lib.check(full(tokens=tokens), 'batch 7', vocab_size=100)


@pytest.mark.parametrize('damage', [
    {'tokens': {}}, {'tokens': 3}, [], {'tokens': {'dtype': 'int32', 'shape': [2], 'data': '!'}},
    {'tokens': {'dtype': 'no', 'shape': [], 'data': ''}}])
def test_a_damaged_batch_file_is_one_line(damage):
    with pytest.raises(ValueError, match='a rollout batch is damaged') as error:
        batch_lib.from_json(damage)
    assert '\n' not in str(error.value)


def test_hidden_logprobs_may_be_anything():
    mask = np.ones((2, 2, 3), bool)
    mask[..., 2] = False
    batch_lib.check(full(mask=mask, logprobs=np.where(mask, -1.0, -np.inf)))


def test_a_completion_may_have_no_reward():
    batch_lib.check(full(rewards=np.array([[1, np.nan], [np.nan, 2]])))


def test_batches_survive_json_bit_for_bit():
    import jax.numpy as jnp
    batch = full(odd=np.array([np.nan, -0.0, np.inf, 1e-40], np.float32), half=np.ones((4, 2), jnp.bfloat16) / 3)
    back = batch_lib.from_json(json.loads(json.dumps(batch_lib.to_json(batch))))
    assert set(back) == set(batch)
    for name, x in batch.items():
        assert back[name].dtype == x.dtype and back[name].shape == x.shape and back[name].tobytes() == x.tobytes()
    back['rewards'][0] = 0  # and may be written to


def test_minibatches_keep_groups_whole():
    prompts, samples = 6, 3
    batch = {'rewards': np.arange(18, dtype=np.float32).reshape(prompts, samples),
             'prompt': np.repeat(np.arange(prompts)[:, None], samples, 1)}
    for rng in (None, np.random.default_rng(0)):
        parts = list(batch_lib.minibatches(batch, 2, rng=rng))
        assert [p['prompt'].shape for p in parts] == [(3, samples)] * 2
        assert sorted(np.concatenate([p['prompt'][:, 0] for p in parts])) == list(range(prompts))
        for p in parts:
            np.testing.assert_array_equal(p['rewards'], batch['rewards'][p['prompt'][:, 0]])
    assert next(batch_lib.minibatches(batch, 2))['prompt'][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match='num_minibatches=4 does not divide the 6 prompts'):
        next(batch_lib.minibatches(batch, 4))

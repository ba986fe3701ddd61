"""Learner and generators apart: the same sequence as in one process, whoever is killed."""
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rlhf_jax.rollout.processes import Remote, serve
from rlhf_jax.rollout.publish import Files
from rlhf_jax.rollout.stream import RolloutStream
from test_stream import WAIT, generate, learn, run, train

ROOT = pathlib.Path(__file__).resolve().parents[2]


def as_numpy(params, *, index, version):
    return generate({'w': np.asarray(params['w'])}, index=index, version=version)


def weights(path, bound):
    return Files(path / 'weights', keep=bound + 1, timeout=WAIT, poll=.002)


class Generators:
    """`serve` in threads: what a process does, without its start-up."""

    def __init__(self, path, bound, num=1, generate=as_numpy, **settings):
        self.made, self.errors = [], []
        def work(g):
            try:
                made = serve(generate, weights(path, bound), path / 'batches', generator=g, num_generators=num,
                             poll=.002, idle_timeout=WAIT, **settings)
                self.made.append(made)
            except BaseException as error:
                self.errors.append(error)
        self.threads = [threading.Thread(target=work, args=(g,), daemon=True) for g in range(num)]
        for t in self.threads:
            t.start()

    def join(self):
        for t in self.threads:
            t.join(WAIT)
        assert not any(t.is_alive() for t in self.threads)
        return self


def learner(path, bound, **settings):
    remote = Remote(path / 'batches', weights(path, bound), max_staleness=bound, poll=.002)
    return RolloutStream(remote, remote, max_staleness=bound, timeout=WAIT, **settings)


@pytest.mark.parametrize('bound, num', [(0, 1), (2, 1), (3, 2)])
def test_the_sequence_is_that_of_one_process(tmp_path, bound, num):
    expected, in_order = run(max_staleness=bound, threaded=False)
    generators = Generators(tmp_path, bound, num)
    with learner(tmp_path, bound) as stream:
        w, seen = train(stream, 8)
        assert set(stream.metrics) == {'staleness', 'in_flight', 'learner_wait', 'generator_wait', 'load', 'generate',
                                       'publish'}
    made = sum(generators.join().made)
    np.testing.assert_array_equal(w, expected)
    assert [s['batch'] for s in seen] == [s['batch'] for s in in_order]
    assert 8 <= made <= 8 + bound + 1 and not generators.errors


def test_a_resumed_learner_opens_a_new_attempt(tmp_path):
    """It dies two steps after its checkpoint, while the generator works on; the generator serves its successor."""
    expected, in_order = run(num=9, max_staleness=2, threaded=False)
    generators = Generators(tmp_path, 2)
    dead = learner(tmp_path, 2)
    w, seen = train(dead, 4)
    saved = json.loads(json.dumps(dead.get_state()))
    lost = w
    for n in (4, 5):
        next(dead)
        dead.publish(n + 1, {'w': lost + 1})  # went another way than the run that is resumed will
    # No close: it was killed.
    with learner(tmp_path, 2) as stream:
        stream.set_state(saved)
        resumed, rest = train(stream, 5, w=w, start=4)
    dead.close()
    generators.join()
    np.testing.assert_array_equal(resumed, expected)
    assert [s['batch'] for s in seen + rest] == [s['batch'] for s in in_order]


def test_a_generator_started_anew_goes_on_where_the_last_one_stopped(tmp_path):
    expected, _ = run(max_staleness=1, threaded=False)

    class Killed(BaseException):
        pass

    def dies(params, *, index, version):
        if index == 3:
            raise Killed  # like SIGKILL it leaves no word to the learner
        return as_numpy(params, index=index, version=version)

    first, second = Generators(tmp_path, 1, generate=dies), []
    with learner(tmp_path, 1) as stream:
        stream_train = threading.Thread(target=lambda: second.append(train(stream, 8)), daemon=True)
        stream_train.start()
        first.join()
        assert isinstance(first.errors[0], Killed)
        again = Generators(tmp_path, 1)
        stream_train.join(WAIT)
    assert 5 <= sum(again.join().made) <= 7
    np.testing.assert_array_equal(second[0][0], expected)


def test_errors_of_a_generator_reach_the_learner(tmp_path):
    def failing(params, *, index, version):
        if index == 2:
            raise ZeroDivisionError('reward of prompt 17')
        return as_numpy(params, index=index, version=version)
    generators = Generators(tmp_path, 1, generate=failing)
    with learner(tmp_path, 1) as stream, pytest.raises(RuntimeError) as caught:
        train(stream, 5)
    text = str(caught.value)
    assert 'reward of prompt 17' in text and 'while generating batch 2 with version 1' in text
    assert isinstance(generators.join().errors[0], ZeroDivisionError)


def test_a_generator_that_lost_one_of_its_processes_is_awaited(tmp_path):
    """Its error would not come again: it is started anew, and the learner never hears of it."""
    def failing(params, *, index, version):
        if index == 2:
            raise ConnectionResetError('closed by peer')
        return as_numpy(params, index=index, version=version)
    is_own_fault = lambda error: not isinstance(error, ConnectionResetError)
    second = []

    def start_anew(first=Generators(tmp_path, 1, generate=failing, is_own_fault=is_own_fault)):
        assert isinstance(first.join().errors[0], ConnectionResetError)
        second.append(Generators(tmp_path, 1))
    thread = threading.Thread(target=start_anew)
    thread.start()
    with learner(tmp_path, 1) as stream:
        _, seen = train(stream, 5)
    thread.join(WAIT)
    assert [batch['index'] for batch in seen] == [0, 1, 2, 3, 4]
    assert second[0].join().made[0] >= 3


def test_the_folder_does_not_grow(tmp_path):
    generators = Generators(tmp_path, 1)
    with learner(tmp_path, 1) as stream:
        train(stream, 12)
        assert len(list((tmp_path / 'batches').glob('batch-*'))) <= 4
        assert len(list((tmp_path / 'weights').iterdir())) <= 3
    generators.join()


@pytest.mark.parametrize('first', ['generator', 'learner'])
def test_both_started_again_find_each_other(tmp_path, first):
    """Both are stopped, which closes the learner's request; whichever comes back first waits for the other."""
    expected, _ = run(max_staleness=1, threaded=False)
    generators = Generators(tmp_path, 1)
    with learner(tmp_path, 1) as stream:
        w, _ = train(stream, 3)
        saved = stream.get_state()
    generators.join()
    if first == 'generator':
        again = Generators(tmp_path, 1)
        time.sleep(.1)
        assert again.threads[0].is_alive()
    with learner(tmp_path, 1) as stream:
        stream.set_state(saved)
        if first == 'learner':
            stream.publish(3, {'w': w})
            again = Generators(tmp_path, 1)
            batch = next(stream)
            w = learn(w, batch)
            w, _ = train(stream, 4, w=w, start=4)
        else:
            w, _ = train(stream, 5, w=w, start=3)
    again.join()
    np.testing.assert_array_equal(w, expected)


def test_a_generator_that_comes_when_the_run_is_over_leaves(tmp_path):
    generators = Generators(tmp_path, 0)
    with learner(tmp_path, 0) as stream:
        train(stream, 2)
    stream.finish()
    generators.join()
    began = time.monotonic()
    assert Generators(tmp_path, 0).join().made == [0]
    assert time.monotonic() - began < WAIT / 2


def test_a_generator_without_a_learner_leaves(tmp_path):
    assert serve(as_numpy, weights(tmp_path, 0), tmp_path / 'batches', poll=.002, idle_timeout=.02) == 0
    with pytest.raises(ValueError, match='generator=2 must be in 0..1'):
        serve(as_numpy, weights(tmp_path, 0), tmp_path, generator=2, num_generators=2)


def test_generators_wait_for_a_learner_that_lost_a_process(tmp_path):
    expected, _ = run(max_staleness=1, threaded=False)
    generators = Generators(tmp_path, 1)
    with learner(tmp_path, 1) as stream:
        train(stream, 3)
        stream.leave_open()
    time.sleep(0.1)
    assert generators.threads[0].is_alive()
    with learner(tmp_path, 1) as stream:  # started anew, from the beginning
        w, _ = train(stream, 8)
    assert not generators.join().errors
    np.testing.assert_array_equal(w, expected)


GENERATOR = '''
import pathlib, sys
sys.path.insert(0, 'tests/rlhf')
from test_processes import as_numpy, serve, weights
folder = pathlib.Path(sys.argv[1])
print('ready', flush=True)
serve(as_numpy, weights(folder, 1), folder / 'batches', idle_timeout=60)
'''


def test_a_generator_process_that_is_killed(tmp_path):
    expected, in_order = run(max_staleness=1, threaded=False)
    start = lambda: subprocess.Popen([sys.executable, '-c', GENERATOR, str(tmp_path)], cwd=ROOT)
    remote = Remote(tmp_path / 'batches', weights(tmp_path, 1), max_staleness=1)
    generator = start()
    try:
        with RolloutStream(remote, remote, max_staleness=1, timeout=120) as stream:
            w, seen = train(stream, 3)
            generator.send_signal(signal.SIGKILL)
            generator.wait()
            generator = start()
            for n in range(3, 8):  # the same stream goes on
                batch = next(stream)
                seen.append({'batch': {k: v.tobytes() for k, v in batch.items()}})
                w = learn(w, batch)
                stream.publish(n + 1, {'w': w})
        assert generator.wait(60) == 0  # closing sends it home
    finally:
        generator.kill()
    np.testing.assert_array_equal(w, expected)
    assert [s['batch'] for s in seen] == [s['batch'] for s in in_order]

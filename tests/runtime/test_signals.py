"""Signals inside one process; tests/runtime/test_kills_and_signals.py has those of whole runs."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.runtime.signals import Interrupted, Stopped, signals

ROOT = pathlib.Path(__file__).resolve().parents[2]


def send():
    os.kill(os.getpid(), signal.SIGTERM)


def swallow_everything():
    """As libraries do: a bare `except` around a callback."""
    try:
        send()
        time.sleep(5)
    except:  # noqa: E722
        pass


def test_a_stop_that_somebody_swallows_is_raised_again():
    went_on = []
    with pytest.raises(Stopped) as stopped:
        with signals.raising('go on', 0):
            swallow_everything()
            went_on.append(1)
            time.sleep(5)
            went_on.append(2)
    assert went_on == [1] and stopped.value.message == 'stopped by signal; go on' and stopped.value.code == 0
    time.sleep(0.2)  # and not once more


def test_a_stop_that_becomes_another_error_is_a_stop():
    with pytest.raises(Stopped) as stopped:
        with signals.raising('go on', None):
            try:
                send()
                time.sleep(5)
            except BaseException as error:
                raise RuntimeError('tracing failed') from error
    assert stopped.value.code == 128 + signal.SIGTERM


def test_an_error_that_has_nothing_to_do_with_it_stays():
    with pytest.raises(KeyError):
        with signals.raising('go on', 0):
            raise KeyError


def test_remembered_inside_and_answered_outside():
    seen = []
    with pytest.raises(Stopped):
        with signals.raising('go on', 0):
            with signals.remembering():
                send()
                seen.append(signals.received)
                with pytest.raises(Interrupted):
                    signals.check()
                signals.check_late()  # not yet
                seen.append('whole')
            seen.append('never')
    assert seen == [signal.SIGTERM, 'whole']
    with signals.remembering():
        assert signals.received is None  # a new run begins with none
        signals.check()


def test_handlers_are_what_they_were():
    handlers = lambda: [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    before = handlers()
    with pytest.raises(Stopped):
        with signals.watched(), signals.raising('', 0):
            send()
            time.sleep(5)
    assert handlers() == before


LEAVES = """
import multiprocessing, os, signal, time
from experiments.runtime.signals import signals
if __name__ == '__main__':
    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, flush=True)
    with signals.watched(), signals.raising('unwound', 0), signals.leaving('left at once'):
        with signals.before_leaving(lambda: print('lease released', flush=True)):
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                time.sleep(600)
            except:  # what unwinds here may crash, or hang as this does
                time.sleep(600)
"""


def test_leaving_takes_its_processes_along():
    left = subprocess.run([sys.executable, '-c', LEAVES], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert left.returncode == 0 and 'left at once' in left.stderr
    child, released = left.stdout.splitlines()
    assert released == 'lease released'
    for _ in range(50):
        try:
            state = pathlib.Path(f'/proc/{child}/stat').read_text().rsplit(')', 1)[1].split()[0]
        except OSError:
            return
        if state == 'Z':
            return
        time.sleep(0.1)
    os.kill(int(child), signal.SIGKILL)
    pytest.fail('the process that it had started is still there')

"""One trainer a work directory; a dead owner loses it, a live one keeps it, on this machine and seen from another."""
import dataclasses
import json
import subprocess
import sys
import threading
import time

import pytest

from experiments.runtime import lease as lease_lib
from experiments.runtime import leftovers, storage
from experiments.runtime.lease import Lease, Taken
from test_storage import bucket  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease_lib, 'BEAT_SECONDS', 0.05)
    monkeypatch.setattr(lease_lib, 'LEASE_SECONDS', 0.4)
    monkeypatch.setattr(lease_lib, 'SETTLE_SECONDS', 0.05)
    monkeypatch.setattr(lease_lib, 'SETTLE_REMOTE_SECONDS', 0.05)


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
    return tmp_path if request.param == 'disk' else request.getfixturevalue('bucket')


def of_another_machine(monkeypatch):
    """From here on, as a process on a machine that cannot see this one's."""
    monkeypatch.setattr(lease_lib, '_machine', lambda: 'another boot')


def test_the_second_trainer_is_told_who_owns_the_directory(place):
    first = Lease(place)
    first.take()
    with pytest.raises(Taken, match=r'another trainer uses it, process \d+ on .* \(since .*\); stop that one or') as e:
        Lease(place).take()
    assert '\n' not in str(e.value)
    first.check()
    first.release()
    assert not (storage.resolve(place) / lease_lib.NAME).exists()
    second = Lease(place)
    second.take()
    second.release()


def test_an_owner_that_beats_keeps_the_lease_seen_from_another_machine(place, monkeypatch):
    first = Lease(place)
    first.take()
    of_another_machine(monkeypatch)
    with pytest.raises(Taken):
        Lease(place).take()
    first.release()


def test_an_owner_that_stands_still_loses_it_and_finds_out(place, monkeypatch):
    first = Lease(place)
    first.take()
    first._done.set()  # its machine is suspended, or gone
    first._thread.join()
    of_another_machine(monkeypatch)
    second = Lease(place)
    began = time.monotonic()
    second.take()
    assert time.monotonic() - began >= lease_lib.LEASE_SECONDS
    with pytest.raises(Taken, match='another trainer uses it'):
        first.check()
    first.release()  # which leaves the other's alone
    second.check()
    second.release()


@pytest.mark.skipif(not lease_lib._machine(), reason='no /proc to see processes in')
def test_a_killed_owner_on_this_machine_loses_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_lib, 'LEASE_SECONDS', 60.0)
    code = ('import sys, os; from experiments.runtime.lease import Lease; Lease(sys.argv[1]).take(); '
            'os.kill(os.getpid(), 9)')
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path)]).returncode == -9
    assert (tmp_path / lease_lib.NAME).exists()
    began = time.monotonic()
    second = Lease(tmp_path)
    second.take()
    second.release()
    assert time.monotonic() - began < 10


def test_a_process_of_the_same_number_is_not_the_owner(tmp_path):
    """Process ids come again; when a process began tells them apart."""
    first = Lease(tmp_path)
    first._owner = dataclasses.replace(first._owner, born='1')
    first.take()
    first._done.set()
    first._thread.join()
    second = Lease(tmp_path)
    second.take()
    second.release()


def test_of_many_at_once_one_gets_it(tmp_path):
    """They find the lease of an owner that is dead."""
    (tmp_path / lease_lib.NAME).write_text(json.dumps(dict(token='x', host='h', pid=1, machine=lease_lib._machine(),
                                                           born='1', since='then', beat='0')))
    leases, outcomes, start = [Lease(tmp_path) for _ in range(8)], [], threading.Barrier(8)

    def take(lease):
        start.wait()
        try:
            lease.take()
            outcomes.append(True)
        except Taken:
            outcomes.append(False)
    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(outcomes) == [False] * 7 + [True]
    for lease in leases:
        lease.release()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"token": 1}', '\x00' * 40])
def test_a_lease_that_cannot_be_read_is_waited_for(tmp_path, text):
    (tmp_path / lease_lib.NAME).write_text(text)
    lease = Lease(tmp_path)
    lease.take()
    lease.release()


def test_a_directory_that_is_deleted_under_its_owner_is_put_back(tmp_path, caplog):
    restored = []
    lease = Lease(tmp_path / 'run', restore=lambda: restored.append(1))
    lease.take()
    storage.epath.Path(tmp_path / 'run').rmtree()
    lease.check()
    assert restored == [1] and (tmp_path / 'run' / lease_lib.NAME).exists()
    assert 'deleted while a run was using it' in caplog.text
    lease.release()


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path, caplog):
    keep = ['config.json', 'codes.partial/codes.npy', 'notes.partial', 'rollouts/weights/weights-000000003.safetensors',
            'rollouts/batches/batch-000000-000000001.json', 'rollouts/batches/.batch-000000-000000002.json.4711']
    old = 'rollouts/batches/.batch-000000-000000001.json.4711'
    go = ['config.json.12-140.partial', 'metrics.jsonl.7-9.partial', old,
          'rollouts/weights/.weights-000000004.safetensors.99']
    for name in keep + go:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('x')
    import os
    os.utime(tmp_path / old, (0, 0))
    leftovers.remove(storage.resolve(tmp_path))
    assert [name for name in keep + go if (tmp_path / name).exists()] == keep

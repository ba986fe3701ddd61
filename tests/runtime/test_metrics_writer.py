"""Metrics cost a run at most points of a curve."""
import errno
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import types

import pytest

from experiments.runtime import metrics
from experiments.runtime.metrics import MetricsWriter, read_metrics

VALUES = {f'metric_{i}': float(i) for i in range(25)}


def steps(path):
    return [row['step'] for row in read_metrics(path / 'metrics.jsonl')]


def events(path):
    """Steps of the scalars that TensorBoard shows of all event files, up to where each file is cut."""
    import struct

    from tensorboardX.proto.event_pb2 import Event, SessionLog
    found = []
    for file in sorted((path / 'tensorboard').iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data = file.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + (size := struct.unpack('<Q', data[:8])[0]):
            event = Event.FromString(data[12:12 + size])
            if event.session_log.status == SessionLog.START:
                found = [step for step in found if step < event.step]
            found += [event.step for value in event.summary.value]
            data = data[16 + size:]
    return found


def test_rows_and_events(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {'loss': 1.0 / step})
    writer.close()
    assert steps(tmp_path) == events(tmp_path) == [1, 2, 3]
    writer = MetricsWriter(tmp_path, from_step=2)
    writer.write(3, {'loss': 0.5})
    writer.close()
    assert [row['loss'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [1.0, 0.5, 0.5]


def test_events_of_a_run_that_was_killed(tmp_path):
    """What was written before a checkpoint is in the file then; of the checkpoint's step a resumed run shows once what
    had been measured of it and once what it reports anew."""
    first = MetricsWriter(tmp_path)
    for step in range(1, 5):
        first.write(step, {'loss': 1.0 / step})
    first.write(4, {'eval': 0.5, 'other': float('nan')})
    first.write(5, {'loss': 0.2})
    first.flush()
    assert events(tmp_path) == [1, 2, 3, 4, 4, 4, 5]  # though it is not closed
    second = MetricsWriter(tmp_path, from_step=4, pending={'loss'})
    second.write(4, {'loss': 0.25})
    second.write(5, {'loss': 0.2})
    second.close()
    assert events(tmp_path) == [1, 2, 3, 4, 4, 4, 5]
    first.close()
    third = MetricsWriter(tmp_path)  # had been killed before its first checkpoint
    third.write(1, {'loss': 1.0})
    third.close()
    assert events(tmp_path) == [1]


def test_weights_and_biases_get_the_same_numbers(tmp_path, monkeypatch):
    """One run for a work directory, steps as a metric of its own, nothing lost where the service fails."""
    calls, runs = [], []

    class Run:
        def __init__(self, **settings):
            runs.append(settings)

        def define_metric(self, *args, **kwargs):
            calls.append((args, kwargs))

        def log(self, row):
            if row['step'] == 2:
                raise ConnectionError('offline')
            calls.append(row)

        def finish(self):
            calls.append('finish')
    wandb = types.ModuleType('wandb')
    wandb.init, wandb.__spec__ = Run, importlib.machinery.ModuleSpec('wandb', None)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    for start in (0, 1):
        writer = MetricsWriter(tmp_path / 'a' / 'b', from_step=start, tensorboard=False, wandb='p', config={'seed': 3})
        for step in range(start + 1, 4):
            writer.write(step, {'loss': 1 / step})
        writer.close()
    assert runs[0] == runs[1] and len(runs[0].pop('id')) == 16
    assert runs[0] == dict(project='p', resume='allow', name='a/b', config={'seed': 3})
    begin, end = [(('step',), {}), (('*',), {'step_metric': 'step'})], [{'step': 3, 'loss': 1 / 3}, 'finish']
    assert calls == [*begin, {'step': 1, 'loss': 1.0}, *end, *begin, *end]
    assert steps(tmp_path / 'a' / 'b') == [1, 2, 3]


def test_weights_and_biases_is_asked_for_before_anything_else(tmp_path):
    with pytest.raises(ValueError, match='--wandb=p: Weights & Biases is not installed; pip install wandb'):
        MetricsWriter(tmp_path / 'run', wandb='p')
    assert not (tmp_path / 'run').exists()


def test_a_cut_line_costs_itself_alone(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n[]\n{"step": 4}\n{"ste')
    assert steps(tmp_path) == [1, 4]


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, caplog):
    """Rows wait and are written when there is room; nothing blocks, and one warning is enough."""
    full = [False]

    def opened(path, mode='r', *args, **kwargs):
        if full[0] and 'r' not in mode:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return open(path, mode, *args, **kwargs)
    monkeypatch.setattr(metrics, 'open', opened, raising=False)
    from tensorboardX import record_writer
    monkeypatch.setattr(record_writer, 'open', opened, raising=False)
    writer = MetricsWriter(tmp_path)
    for step in range(1, 200):
        full[0] = 50 <= step < 150
        if step == 50:
            writer._board._file._writer.close()  # as a write to the full disk would leave it
        writer.write(step, VALUES)
    writer.close()
    assert steps(tmp_path) == list(range(1, 200))
    assert sorted(set(events(tmp_path))) == [*range(1, 50), *range(150, 200)]
    assert len([r for r in caplog.records if 'could not write' in r.message]) == 1


def test_a_disk_that_stays_full(tmp_path, monkeypatch, caplog):
    def opened(path, mode='r', *args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(metrics, 'MAX_WAITING', 4096)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, 'open', opened, raising=False)
        for step in range(1, 500):
            writer.write(step, VALUES)
        writer.close()
        assert len(writer._waiting) < 3 * 4096
    assert len(caplog.records) == 1
    writer.write(500, VALUES)  # the newest are kept, whole
    assert steps(tmp_path)[-3:] == [498, 499, 500]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB, for those who may mount one."""
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', tmp_path], capture_output=True).returncode:
        pytest.skip('needs the right to mount a file system')
    yield tmp_path
    subprocess.run(['umount', tmp_path], check=True)


def test_a_real_full_disk(tiny_disk, caplog):
    writer = MetricsWriter(tiny_disk / 'run')
    for step in range(1, 400):
        writer.write(step, VALUES)
        if step == 300:
            assert 'could not write' in caplog.text
            for file in (tiny_disk / 'run' / 'tensorboard').iterdir():
                file.unlink()
    writer.close()
    found = steps(tiny_disk / 'run')
    assert found == sorted(set(found)) and len(found) > 50
    assert all(set(VALUES) < set(json.loads(line))
               for line in (tiny_disk / 'run' / 'metrics.jsonl').read_text().splitlines()[:50])

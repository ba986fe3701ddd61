"""The loop and its checkpoints, on a linear model: resume, fallback, NaN, signals, full disk."""
import functools
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.runtime import checkpoint, loop, partition, prefetch, processes
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.hooks import PENDING, Log, Metrics, Save
from experiments.runtime.metrics import MetricsWriter, read_metrics
from experiments.runtime.prefetch import Prefetch
from experiments.runtime.signals import Stopped
from experiments.runtime.state import TrainState

TX = optax.adam(1e-2)
ROOT = pathlib.Path(__file__).resolve().parents[2]
WIDTH = 2048  # 32 KiB of weights: more than the file-size limit of the full-disk test


@pytest.fixture(autouse=True, params=['synchronous', 'asynchronous'])
def saving(request, monkeypatch):
    """Accelerators save beside the steps that follow; every test of saving and stopping runs that way as well."""
    monkeypatch.setenv(checkpoint.ASYNCHRONOUS, '1' if request.param == 'asynchronous' else '0')
    return request.param


class Stream:
    """Batches that are a function of their position."""

    def __init__(self, poison=None):
        self.position, self.poison = 0, poison

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng(self.position)
        self.position += 1
        x = rng.normal(size=(8, 4)).astype(np.float32)
        if self.position == self.poison:
            x[:] = np.nan
        return {'x': x}

    def get_state(self):
        return {'position': self.position}

    def set_state(self, state):
        self.position = state['position']


def init(key):
    params = {'w': jax.random.normal(key, (4, WIDTH))}
    return TrainState(jnp.int32(0), params, TX.init(params), params, jax.random.key(7))


@jax.jit
def step(state, batch):
    noise = jax.random.normal(jax.random.fold_in(state.rng, state.step), (8, WIDTH))
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((batch['x'] @ p['w'] - noise) ** 2))(state.params)
    updates, opt_state = TX.update(grads, state.opt_state)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                         opt_state=opt_state), {'loss': loss}


def start(directory, *, stream=None, every=4, hooks=(), num_steps=10, log_every=3):
    """One call of a training command: restore or initialise, then run."""
    checkpointer = Checkpointer(directory / 'checkpoints', keep=3)
    restored = checkpointer.restore(jax.eval_shape(init, jax.random.key(0)))
    batches = Prefetch(stream or Stream(), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    first, state, metrics = 0, init(jax.random.key(0)), Metrics()
    if restored:
        first, state, position = restored
        metrics = Metrics(position.pop(PENDING))
        checkpointer.delete_after(first)
        batches.set_state(position)
    writer = MetricsWriter(directory, from_step=first, pending=metrics.names, tensorboard=False)
    try:
        return first, loop.run(state, step, batches, hooks, num_steps, save=Save(checkpointer, batches, every),
                               log_hook=Log(writer, log_every), metrics=metrics)
    finally:
        checkpointer.close()
        writer.close()


def assert_same(a, b):
    key_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for name, leaf in partition.flatten(a).items():
        np.testing.assert_array_equal(key_data(leaf), key_data(partition.flatten(b)[name]), err_msg=name)


def losses(directory):
    return [(row['step'], row['loss']) for row in read_metrics(directory / 'metrics.jsonl')]


class Kill(Exception):
    pass


def kill_at(n):
    def hook(step, state, metrics):
        if step == n:
            raise Kill
    return hook


@pytest.mark.parametrize('killed_at, log_every', [(1, 3), (5, 3), (9, 3), (6, 5), (7, 1)])
def test_killed_run_continues_bit_for_bit(tmp_path, killed_at, log_every):
    """Also where a report that covers the step of the checkpoint was written after it."""
    _, whole = start(tmp_path / 'whole', log_every=log_every)
    with pytest.raises(Kill):
        start(tmp_path / 'cut', hooks=[kill_at(killed_at)], log_every=log_every)
    first, resumed = start(tmp_path / 'cut', log_every=log_every)
    assert first == (killed_at - 1) // 4 * 4
    assert_same(whole, resumed)
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
    assert [step for step, _ in losses(tmp_path / 'whole')] == {
        1: [*range(1, 9), 10], 3: [2, 5, 8, 10], 5: [4, 10]}[log_every]


def test_sigterm_saves_and_leaves(tmp_path):
    _, whole = start(tmp_path / 'whole')
    send = lambda step, state, metrics: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None
    with pytest.raises(Stopped) as stopped:
        start(tmp_path / 'cut', hooks=[send])
    assert stopped.value.code == 0 and 'step 6 of 10' in stopped.value.message
    first, resumed = start(tmp_path / 'cut')
    assert first == 6
    assert_same(whole, resumed)
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')


@pytest.mark.parametrize('at', [4, 8])
def test_a_step_that_was_just_saved_is_not_saved_again(tmp_path, at):
    """The hook saves step 4 and the signal asks for it once more; the run ends on step 8, which the hook would save."""
    send = lambda step, state, metrics: os.kill(os.getpid(), signal.SIGTERM) if step == at else None
    if at == 4:
        with pytest.raises(Stopped, match='0'):
            start(tmp_path, hooks=[send], num_steps=8)
    else:
        start(tmp_path, num_steps=8)
    assert Checkpointer(tmp_path / 'checkpoints').steps()[-1] == at


def test_what_is_saved_is_not_what_the_next_step_makes_of_it(tmp_path, saving):
    """On the CPU the next step is given the very buffers that an asynchronous save would still read from."""
    checkpointer = Checkpointer(tmp_path)
    donating = jax.jit(lambda state: state.replace(params={'w': state.params['w'] * 0 - 1}), donate_argnums=0)
    state = init(jax.random.key(0))
    before = np.array(state.params['w'])
    state = state.replace(ema=None)
    checkpointer.save(1, state)
    jax.block_until_ready(donating(state))
    checkpointer.wait()
    like = jax.eval_shape(init, jax.random.key(0)).replace(ema=None)
    np.testing.assert_array_equal(checkpointer.restore(like)[1].params['w'], before)
    checkpointer.close()


def test_a_signal_while_a_batch_is_awaited_saves_and_leaves(tmp_path):
    class Hanging(Stream):
        def __next__(self):
            if self.position == 6:
                time.sleep(1)  # the loop catches up with the thread
                os.kill(os.getpid(), signal.SIGTERM)
                release.wait(60)
            return super().__next__()
    release = threading.Event()
    _, whole = start(tmp_path / 'whole')
    began = time.monotonic()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(prefetch, 'CLOSE_SECONDS', 0.2)
    try:
        with pytest.raises(Stopped) as stopped:
            start(tmp_path / 'cut', stream=Hanging())
    finally:
        monkey.undo()
        release.set()
    assert 'step 6 of 10, state saved' in stopped.value.message and time.monotonic() - began < 30
    first, resumed = start(tmp_path / 'cut')
    assert first == 6
    assert_same(whole, resumed)
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match='loss is nan at step 7'):
        start(tmp_path, stream=Stream(poison=7))
    step_on_disk, state, _ = Checkpointer(tmp_path / 'checkpoints').restore(jax.eval_shape(init, jax.random.key(0)))
    assert step_on_disk == 4 and np.isfinite(state.params['w']).all()


def test_nan_at_a_checkpoint_step_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match='step 8'):
        start(tmp_path, stream=Stream(poison=8))
    assert Checkpointer(tmp_path / 'checkpoints').steps() == [4]


def test_truncated_newest_checkpoint_falls_back_and_says_so(tmp_path, caplog):
    _, whole = start(tmp_path / 'whole')
    with pytest.raises(Kill):
        start(tmp_path / 'cut', hooks=[kill_at(9)])
    for path in (tmp_path / 'cut' / 'checkpoints' / '8' / 'state').rglob('*'):
        if path.is_file() and path.stat().st_size > 64:
            os.truncate(path, path.stat().st_size // 2)
    first, resumed = start(tmp_path / 'cut')
    assert first == 4
    assert 'unreadable checkpoint 8' in caplog.text and 'continuing from 4' in caplog.text
    assert_same(whole, resumed)


def test_checkpoint_of_another_shape_is_named(tmp_path):
    start(tmp_path)
    other = jax.eval_shape(init, jax.random.key(0))
    other = other.replace(params={'w': jax.ShapeDtypeStruct((4, 9), jnp.float32)})
    with pytest.raises(ValueError, match=r'params/w is float32\(4, 2048\) in the checkpoint but float32\(4, 9\)'):
        Checkpointer(tmp_path / 'checkpoints').restore(other)


def test_restores_onto_another_mesh(tmp_path):
    from jax.sharding import PartitionSpec as P
    _, whole = start(tmp_path)
    mesh = mesh_lib.make_mesh({'fsdp': 4, 'tensor': 2})
    like = jax.eval_shape(init, jax.random.key(0))
    shardings = partition.state_shardings(like, ((r'w', P('fsdp', 'tensor')),), mesh)
    _, state, _ = Checkpointer(tmp_path / 'checkpoints').restore(like, shardings)
    assert state.params['w'].sharding.spec == P('fsdp', 'tensor')
    assert_same(whole, state)


# One failed write ends Orbax's event loop; TensorStore's other writes then report to a loop that is closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_full_disk_loses_nothing(tmp_path, caplog, monkeypatch):
    """A file-size limit stands in for a full disk: saves fail in between, training goes on, the end is an error."""
    # The limit holds for every file, also the one that pytest captures the progress bar in.
    monkeypatch.setattr(loop, 'tqdm', functools.partial(loop.tqdm, file=io.StringIO()))
    _, whole = start(tmp_path / 'whole')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_from_5(step, state, metrics):
        if step == 5:
            while not (tmp_path / 'cut' / 'checkpoints' / '4').is_dir():  # an asynchronous save takes its time
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))

    try:
        with pytest.raises(OSError, match='could not write checkpoint 10 .* checkpoint 4 is intact'):
            start(tmp_path / 'cut', hooks=[full_from_5])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'training goes on' in caplog.text
    first, resumed = start(tmp_path / 'cut')
    assert first == 4
    assert_same(whole, resumed)


def test_a_failing_stream_raises_in_the_loop(tmp_path):
    class Broken(Stream):
        def __next__(self):
            if self.position == 3:
                raise OSError('shard 3 is gone')
            return super().__next__()
    with pytest.raises(OSError, match='shard 3 is gone'):
        start(tmp_path, stream=Broken())
    assert Checkpointer(tmp_path / 'checkpoints').steps() == [3]  # what was computed is kept


@pytest.mark.parametrize('lost', [True, False])
def test_whoever_makes_batches_elsewhere_waits_where_a_process_was_lost(lost, monkeypatch):
    class Broken(Stream):
        calls = []

        def __next__(self):
            raise OSError('closed by peer')

        def leave_open(self):
            self.calls.append('leave open')

        def close(self):
            self.calls.append('close')
    monkeypatch.setattr(processes, 'is_loss', lambda error: lost and isinstance(error, OSError))
    batches = Broken()
    with pytest.raises(OSError, match='closed by peer'):
        loop.run(init(jax.random.key(0)), step, batches, (), 10)
    assert batches.calls == ['leave open'] * lost + ['close']


def test_a_stream_that_failed_while_its_queue_was_full_is_closed(tmp_path):
    class Broken(Stream):
        def __next__(self):
            if self.position == 3:
                failed.set()
                raise OSError('shard 3 is gone')
            return super().__next__()
    failed = threading.Event()
    batches = Prefetch(Broken(), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    next(batches)
    assert failed.wait(30)
    time.sleep(0.3)  # the thread has two batches in the queue and wants to put its error
    closing = threading.Thread(target=batches.close, daemon=True)
    closing.start()
    closing.join(prefetch.CLOSE_SECONDS / 2)
    assert not closing.is_alive()


@pytest.mark.parametrize('where', ['stream', 'hook'])
def test_code_that_exits_does_not_pass_for_a_finished_run(tmp_path, where):
    class Exits(Stream):
        def __next__(self):
            if where == 'stream' and self.position == 6:
                sys.exit(0)
            return super().__next__()

    def hook(n, state, metrics):
        if where == 'hook' and n == 6:
            sys.exit(0)
    with pytest.raises(RuntimeError, match='asked to exit'):
        start(tmp_path, stream=Exits(), hooks=[hook])
    assert Checkpointer(tmp_path / 'checkpoints').steps()[-1] == (6 if where == 'stream' else 4)


def test_a_hook_may_replace_the_state(tmp_path):
    reset = lambda step, state, metrics: state.replace(params={'w': jnp.zeros((4, WIDTH))}) if step == 10 else None
    _, state = start(tmp_path, hooks=[reset])
    assert not state.params['w'].any()


def test_metrics_file_survives_a_cut_line(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(json.dumps({'step': 1, 'loss': 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{'step': 1, 'loss': 2.0}]
    writer = MetricsWriter(tmp_path, from_step=1)
    writer.write(2, {'loss': float('nan')})
    writer.close()
    assert read_metrics(path) == [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': None}]
    assert any((tmp_path / 'tensorboard').iterdir())


# ---- Bit rot ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def two_checkpoints(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp('rot')
    start(directory, num_steps=8)
    return directory


def checkpoint_of(directory):
    """What every way of reading makes of it: (step, state, position), the parameters alone, the shapes."""
    checkpointer = Checkpointer(directory / 'checkpoints', read_only=True)
    like = jax.eval_shape(init, jax.random.key(0))
    found = checkpointer.restore(like)
    part = checkpointer.restore_part('params', like.params, jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like.params))
    shapes = checkpointer.shapes()
    checkpointer.close()
    return found, part, shapes


@pytest.mark.parametrize('name, flips', [('state', 12), ('data', 4), ('meta', 4)])
def test_flipped_bits_never_pass_for_what_was_saved(two_checkpoints, tmp_path, caplog, saving, name, flips):
    """Every way of reading gives the numbers of step 8 as they were, or those of step 4, and says so."""
    if saving == 'asynchronous':
        pytest.skip('the files are the same')
    whole = {8: checkpoint_of(two_checkpoints)}
    rng, fallbacks = np.random.default_rng(0), 0
    shutil.copytree(two_checkpoints, tmp_path / 'only4')
    shutil.rmtree(tmp_path / 'only4' / 'checkpoints' / '8')
    whole[4] = checkpoint_of(tmp_path / 'only4')
    for i in range(flips):
        copy = shutil.copytree(two_checkpoints, tmp_path / str(i))
        files = [f for f in sorted((copy / 'checkpoints' / '8' / name).rglob('*')) if f.is_file() and f.stat().st_size]
        files = [f for f in files if f.parent.name == 'd'] if name == 'state' and i % 2 else files
        file = files[rng.integers(len(files))]
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        (step, state, position), part, _ = checkpoint_of(copy)
        fallbacks += step == 4
        assert_same(state, whole[step][0][1])
        assert position == whole[step][0][2]
        assert any(np.array_equal(part['w'], whole[s][1]['w']) for s in (4, 8))
    assert fallbacks and 'unreadable checkpoint 8' in caplog.text
    assert all('\n' not in record.getMessage() for record in caplog.records)


def test_only_one_line_is_said_of_a_damaged_checkpoint(two_checkpoints, tmp_path, saving):
    """Orbax and TensorStore have hundreds of lines to say of it."""
    if saving == 'asynchronous':
        pytest.skip('the files are the same')
    copy = shutil.copytree(two_checkpoints, tmp_path / 'copy')
    manifest = copy / 'checkpoints' / '8' / 'state' / 'manifest.ocdbt'
    manifest.write_bytes(manifest.read_bytes()[:40])
    code = ('import sys; sys.path[:0] = ["tests/runtime", "."]\n'
            'import pathlib, jax, test_loop_checkpoint as t\n'
            'from experiments.runtime import launch\n'
            'launch.main(lambda: t.checkpoint_of(pathlib.Path(sys.argv[1])))')
    said = subprocess.run([sys.executable, '-c', code, str(copy)], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stderr
    lines = said.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 3 and all('unreadable checkpoint 8' in line for line in lines), said.stderr

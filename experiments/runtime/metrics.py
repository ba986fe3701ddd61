"""Scalars to `metrics.jsonl` and TensorBoard event files, neither of which needs TensorFlow, and to Weights & Biases.

Metrics cost a run at most points of a curve: what cannot be written waits in memory, within bounds, and is written when
there is room again. Everything is written by the caller's thread; no queue can fill up, and no thread can die.
"""
import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiments.runtime import storage

log = logging.getLogger(__name__)

REMOTE_SECONDS = 60.0  # object stores cannot append: there files are written anew, at most this often
FLUSH_SECONDS = 5.0    # between two times that events are forced to a disk, which a shared one takes its time for
MAX_WAITING = 2 ** 24  # bytes of lines that wait for room


class MetricsWriter:
    """Appends one JSON object a line, `{"step": n, name: value, ...}`, and mirrors it to TensorBoard.

    Args:
        directory: receives `metrics.jsonl` and `tensorboard/`.
        from_step: lines after this step are dropped first, so that a resumed run leaves one curve.
        pending: names of metrics that the resumed run has still to report for `from_step`; a line of that step with one
            of them was written after the checkpoint, and is dropped too.
        tensorboard: also write event files.
        wandb: project of Weights & Biases to report to; '': none.
        config: of the run, shown there.

    Raises:
        ValueError: as `check_wandb`.
    """

    def __init__(self, directory: str | os.PathLike, *, from_step: int = 0, pending: Collection[str] = (),
                 tensorboard: bool = True, wandb: str = '', config: Mapping[str, Any] | None = None):
        check_wandb(wandb)
        directory = storage.resolve(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / 'metrics.jsonl'
        self._waiting, self._uploaded, self._warned = bytearray(), time.monotonic(), False
        self._remote = storage.is_remote(directory)
        rows: list[dict] = []
        if self.path.exists():
            before = lambda row: row['step'] < from_step or row['step'] == from_step and not set(row) & set(pending)
            rows = [row for row in read_metrics(self.path) if before(row)]
            kept = b''.join(map(_line, rows))
            with storage.write_whole(self.path) as file:
                file.write(kept)
            self._waiting += kept if self._remote else b''
        # TensorBoard drops whole steps, so what stays of that of the checkpoint is written once more.
        again = [row for row in rows if row['step'] == from_step]
        self._board = _EventFiles(os.fspath(directory / 'tensorboard'), from_step, again) if tensorboard else None
        self._wandb = _open_wandb(os.fspath(directory), wandb, config or {}) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row; what does not fit on the disk is kept for the next time."""
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: null keeps the file readable by anything.
        self._waiting += _line({'step': step} | {k: v if math.isfinite(v) else None for k, v in values.items()})
        if not self._remote or time.monotonic() - self._uploaded > REMOTE_SECONDS:
            self._try(self._flush, f'metrics of step {step}')
        if self._board:
            self._try(lambda: self._board.write(step, values), f'TensorBoard events of step {step}')
        if self._wandb:
            self._try(lambda: self._wandb.log({'step': step} | values), f'step {step} to Weights & Biases')

    def flush(self) -> None:
        """Hands what has been written to the system, or to the object store: a process that is killed later leaves it
        in the files."""
        self._try(self._flush, 'metrics')
        if self._board:
            self._try(self._board.flush, 'TensorBoard events')

    def close(self) -> None:
        """Writes what still waits."""
        self._try(self._flush, 'the last metrics')
        if self._board:
            self._try(self._board.close, 'the last TensorBoard events')
        if self._wandb:
            self._try(self._wandb.finish, 'the last step to Weights & Biases')

    def _flush(self) -> None:
        if self._remote:
            self.path.write_text(self._waiting.decode())
            self._uploaded = time.monotonic()
            return
        try:
            # Opened each time: a work directory that was deleted, or a share that was mounted anew, is written again.
            with open(self.path, 'ab', buffering=0) as file:
                while self._waiting:
                    del self._waiting[:file.write(self._waiting)]
        except OSError:
            if len(self._waiting) > MAX_WAITING:
                del self._waiting[:self._waiting.index(b'\n', len(self._waiting) - MAX_WAITING // 2) + 1]
            raise

    def _try(self, work: Any, what: str) -> None:
        try:
            work()
        except Exception as error:  # storage libraries have their own types
            if not self._warned:
                log.warning('%s: could not write %s (%s); training goes on, and what can be is written later. This is '
                            'said once', self.path, what, error)
            self._warned = True


class _EventFiles:
    """TensorBoard event files, written by the caller. After a failure the next row begins a new file, for readers stop
    at a record that was cut short."""

    def __init__(self, directory: str, from_step: int, again: Sequence[Mapping[str, Any]] = ()):
        self._directory, self._file, self._from_step = directory, None, from_step
        self._again, self._flushed = again, 0.0

    def _open(self) -> Any:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # deferred: imports that sampling does not need
        from tensorboardX.record_writer import RecordWriter, directory_check
        directory_check(self._directory)
        name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}'
        file = RecordWriter(os.path.join(self._directory, name))
        file.write(Event(wall_time=time.time(), file_version='brain.Event:2').SerializeToString())
        # Hides what an interrupted run wrote of that step and later ones, of all steps where nothing had been saved.
        start = SessionLog(status=SessionLog.START)
        file.write(Event(step=self._from_step, wall_time=time.time(), session_log=start).SerializeToString())
        for row in self._again:
            _write_events(file, row['step'], {name: math.nan if x is None else x for name, x in row.items()
                                              if name != 'step'})
        return file

    def write(self, step: int, values: Mapping[str, float]) -> None:
        file, self._file = self._file or self._open(), None
        try:
            _write_events(file, step, values)
            seconds = REMOTE_SECONDS if storage.is_remote(self._directory) else FLUSH_SECONDS
            if time.monotonic() - self._flushed > seconds:
                file.flush()
                self._flushed = time.monotonic()
        except BaseException:
            with contextlib.suppress(Exception):
                file.close()
            raise
        self._file = file
        if step + 1 > self._from_step:  # of a file that takes this one's place
            self._from_step, self._again = step + 1, ()

    def flush(self) -> None:
        if self._file:
            self._file.flush()

    def close(self) -> None:
        file, self._file = self._file, None
        if file:
            file.close()


def _write_events(file: Any, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar
    for name, value in values.items():
        file.write(Event(step=step, wall_time=time.time(), summary=scalar(name, value)).SerializeToString())


def check_wandb(project: str) -> None:
    """Raises a ValueError where `project` is given and the package is missing."""
    if project and importlib.util.find_spec('wandb') is None:
        raise ValueError(f'--wandb={project}: Weights & Biases is not installed; pip install wandb, or leave it out')


def _open_wandb(directory: str, project: str, config: Mapping[str, Any]) -> Any:
    """A run there for the work directory, the same one each time it is resumed.

    Steps are a metric of their own: a resumed run goes once more over those after its checkpoint, which the service's
    own counter would refuse.
    """
    import wandb
    name = os.path.abspath(directory) if not storage.is_remote(directory) else directory
    run = wandb.init(project=project, id=hashlib.sha256(name.encode()).hexdigest()[:16], resume='allow',
                     name='/'.join(name.rstrip('/').split('/')[-2:]), config=dict(config))
    run.define_metric('step')
    run.define_metric('*', step_metric='step')
    return run


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b'\n'


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """All whole lines of a `metrics.jsonl`; one cut short by a kill or a full disk is left out."""
    rows = []
    for line in storage.resolve(path).read_bytes().split(b'\n'):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get('step'), int):
            rows.append(row)
    return rows


def curve(workdir: str | os.PathLike, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of the run in `workdir`."""
    rows = [row for row in read_metrics(storage.resolve(workdir) / 'metrics.jsonl') if row.get(name) is not None]
    return [row['step'] for row in rows], [row[name] for row in rows]


def hours(workdir: str | os.PathLike) -> dict[int, float]:
    """{step: hours of training until then} of the run in `workdir`, for every step up to its last report; {} where
    nothing was reported. The time between two starts of a run, and what was computed twice, are not counted."""
    path = storage.resolve(workdir) / 'metrics.jsonl'
    rows = [row for row in (read_metrics(path) if path.exists() else []) if row.get('seconds_per_step') is not None]
    out, before, spent = {}, 0, 0.0
    for row in rows:
        for step in range(before + 1, row['step'] + 1):
            spent += row['seconds_per_step'] / 3600
            out[step] = spent
        before = max(before, row['step'])
    return out

"""Scalars to `metrics.jsonl` and TensorBoard event files, neither of which needs TensorFlow."""
import json
import logging
import math
import os
import time
from collections.abc import Mapping

from experiments.runtime import storage

log = logging.getLogger(__name__)

REMOTE_SECONDS = 60.0  # object stores cannot append: there the file is written anew, at most this often


class MetricsWriter:
    """Appends one JSON object a line, `{"step": n, name: value, ...}`, and mirrors it to TensorBoard.

    Args:
        directory: receives `metrics.jsonl` and `tensorboard/`.
        from_step: lines after this step are dropped first, so that a resumed run leaves one curve.
        tensorboard: also write event files.
    """

    def __init__(self, directory: str | os.PathLike, *, from_step: int = 0, tensorboard: bool = True):
        directory = storage.resolve(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / 'metrics.jsonl'
        self._lines, self._written = [], time.monotonic()
        if self.path.exists():
            self._lines = [json.dumps(row) + '\n' for row in read_metrics(self.path) if row['step'] <= from_step]
            self.path.write_text(''.join(self._lines))
        self._file = None if storage.is_remote(directory) else self.path.open('a')
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # deferred: a second of imports that sampling does not need
            self._board = SummaryWriter(os.fspath(directory / 'tensorboard'), purge_step=from_step or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: null keeps the file readable by anything.
        line = json.dumps({'step': step} | {k: v if math.isfinite(v) else None for k, v in values.items()}) + '\n'
        try:
            if self._file:
                self._file.write(line)
                self._file.flush()
            else:
                self._lines.append(line)
                if time.monotonic() - self._written > REMOTE_SECONDS:
                    self._upload()
        except OSError as error:  # a full disk costs points of a curve, not the run
            log.warning('%s: could not write metrics of step %d: %s', self.path, step, error)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _upload(self) -> None:
        self.path.write_text(''.join(self._lines))
        self._written = time.monotonic()

    def close(self) -> None:
        if self._file:
            self._file.close()
        else:
            self._upload()
        if self._board:
            self._board.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """All whole lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    for line in storage.resolve(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def curve(workdir: str | os.PathLike, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of the run in `workdir`."""
    rows = [row for row in read_metrics(storage.resolve(workdir) / 'metrics.jsonl') if row.get(name) is not None]
    return [row['step'] for row in rows], [row[name] for row in rows]

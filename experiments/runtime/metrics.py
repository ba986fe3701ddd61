"""Scalars to `metrics.jsonl` and TensorBoard event files, neither of which needs TensorFlow."""
import json
import logging
import math
import pathlib
from collections.abc import Mapping

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON object a line, `{"step": n, name: value, ...}`, and mirrors it to TensorBoard.

    Args:
        directory: receives `metrics.jsonl` and `tensorboard/`.
        from_step: lines after this step are dropped first, so that a resumed run leaves one curve.
        tensorboard: also write event files.
    """

    def __init__(self, directory: str | pathlib.Path, *, from_step: int = 0, tensorboard: bool = True):
        self.path = pathlib.Path(directory) / 'metrics.jsonl'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row['step'] <= from_step]
            self.path.write_text(''.join(json.dumps(row) + '\n' for row in kept))
        self._file = self.path.open('a')
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # deferred: a second of imports that sampling does not need
            self._board = SummaryWriter(str(self.path.parent / 'tensorboard'), purge_step=from_step or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: null keeps the file readable by anything.
        row = {'step': step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self._file.write(json.dumps(row) + '\n')
            self._file.flush()
        except OSError as error:  # a full disk costs points of a curve, not the run
            log.warning('%s: could not write metrics of step %d: %s', self.path, step, error)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """All whole lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

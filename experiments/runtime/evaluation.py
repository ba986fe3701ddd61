"""Evaluation while training: the hook, and batches that have every row of a data set once."""
import logging
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from experiments.runtime.metrics import MetricsWriter
from experiments.runtime.state import TrainState

log = logging.getLogger(__name__)


class Evaluation:
    """A hook that measures the state every so many steps, and at the end; a subclass gives `measure`.

    It changes no state: a run ends the same with it or without.

    Args:
        every: steps between two measurements.
        last: the run's last step; None: it is measured only where its turn has come.
        writer: receives the values as a row of metrics; None: nothing is written.
    """

    def __init__(self, every: int, last: int | None, writer: MetricsWriter | None):
        self._every, self._last, self._writer = every, last, writer

    def __call__(self, step: int, state: TrainState, metrics: Any) -> None:
        if step % self._every and step != self._last:
            return
        values = self.measure(state)
        log.info('step %d: %s', step, ', '.join(f'{name} {value:.4g}' for name, value in values.items()))
        if metrics is not None:
            metrics.note(step, values)
        if self._writer:
            self._writer.write(step, values)

    def measure(self, state: TrainState) -> dict[str, float]:
        raise NotImplementedError


def check_every(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError where `config.eval_every` is negative."""
    if config.eval_every < 0:
        raise ValueError(f'eval_every={config.eval_every} must be at least 0; 0 turns it off')


def full_batches(num: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(indices int [size], how many of them count) of all `num` rows in order; the last batch is filled up with its
    last row, so that every batch has one shape."""
    for start in range(0, num, size):
        yield np.minimum(np.arange(start, start + size), num - 1), min(size, num - start)

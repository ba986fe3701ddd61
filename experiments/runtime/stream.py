"""Endless batches of rows with an exact position.

A stream is an iterator of `dict[str, np.ndarray]` holding this process's rows, with `get_state` and `set_state`. Its
only state is `position`, the number of rows that all processes together have drawn; what comes next is a function of
(seed, position), and, row for row of the global batch, not of the number of processes.
"""
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Share:
    """The parts of each global batch that one process provides.

    Attributes:
        parts: which of the `count` equal parts, ascending.
        count: parts a batch has.
    """
    parts: tuple[int, ...] = (0,)
    count: int = 1

    def rows(self, batch_size: int) -> np.ndarray:
        """Positions int64 [n] within a batch of `batch_size` rows, ascending.

        Raises:
            ValueError: the batch cannot be divided into the parts.
        """
        if batch_size < 1 or batch_size % self.count:
            raise ValueError(f'batch_size={batch_size} is not divisible into {self.count} parts (mesh data x fsdp); '
                             'use a multiple')
        size = batch_size // self.count
        return np.concatenate([part * size + np.arange(size) for part in self.parts])


WHOLE = Share()


class EpochOrder:
    """position -> index of the item there. Each epoch is a new permutation, drawn from (seed, epoch).

    Args:
        num_items: items in an epoch.
        used: how many of them an epoch uses before the next begins; the rest differ from epoch to epoch.
    """

    def __init__(self, num_items: int, seed: int, used: int | None = None):
        self._num_items, self._seed, self._used = num_items, seed, used or num_items
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self):
        return self.__dict__ | {'_epochs': {}}

    def _permutation(self, epoch: int) -> np.ndarray:
        found = self._epochs.get(epoch)
        if found is None:
            found = np.random.default_rng((self._seed, epoch)).permutation(self._num_items)
            # A batch touches two epochs at most; rebinding rather than changing the dict keeps threads safe.
            self._epochs = {k: v for k, v in self._epochs.items() if abs(k - epoch) == 1} | {epoch: found}
        return found

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Indices [n] of positions [n]."""
        epochs, offsets = np.divmod(positions, self._used)
        if epochs[0] == epochs[-1]:
            return self._permutation(int(epochs[0]))[offsets]
        return np.array([self._permutation(int(e))[o] for e, o in zip(epochs, offsets)])


class Stream:
    """An endless iterator with a position; a subclass gives `_draw`, the batch at the current position.

    Args:
        batch_size: rows over all processes.
        share: which of them this process provides.
    """

    def __init__(self, batch_size: int, share: Share = WHOLE):
        self._batch_size, self._rows, self._position = batch_size, share.rows(batch_size), 0

    def _positions(self) -> np.ndarray:
        """Positions of this process's rows."""
        return self._position + self._rows

    def _draw(self) -> Batch:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._draw()
        self._position += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        return {'position': self._position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._position = int(state['position'])


class ArrayBatches(Stream):
    """Rows of arrays in memory or memory-mapped, shuffled anew each epoch; one gather an array.

    Args:
        arrays: name -> [N, ...]; all of one length.
        batch_size: rows over all processes.
        seed: of the order.
        share: which rows of a batch this process provides.
        drop_last: end each epoch before its incomplete batch. Otherwise a batch may run into the next epoch.
        casts: name -> dtype, or function of the gathered rows.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int, share: Share = WHOLE,
                 drop_last: bool = False, casts: Mapping[str, Callable[[np.ndarray], np.ndarray] | Any] | None = None):
        super().__init__(batch_size, share)
        lengths = {name: len(array) for name, array in arrays.items()}
        count = min(lengths.values(), default=0)
        if len(set(lengths.values())) != 1 or count == 0:
            raise ValueError(f'arrays must have one length above 0, but have {lengths}')
        if drop_last and count < batch_size:
            raise ValueError(f'batch_size={batch_size} is larger than the {count} rows there are; lower it')
        self._arrays, self._casts = dict(arrays), dict(casts or {})
        self._order = EpochOrder(count, seed, count // batch_size * batch_size if drop_last else None)

    def _draw(self) -> Batch:
        rows = self._order(self._positions())
        batch = {name: np.asarray(np.take(array, rows, axis=0)) for name, array in self._arrays.items()}
        for name, cast in self._casts.items():
            if name in batch:
                as_type = isinstance(cast, (type, np.dtype, str))
                batch[name] = batch[name].astype(cast, copy=False) if as_type else cast(batch[name])
        return batch

"""A tensor on disk: where it lies, and a view of it."""
import math
import pathlib
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """Where a tensor lies on disk.

    Attributes:
        start: first byte in the file `path`.
        strides: in numbers; None: contiguous.
    """
    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None

    def read(self) -> np.ndarray:
        """A read-only view of the file; a copy in C order of what does not lie so."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        strides = self.strides or ()
        count = 1 + sum((n - 1) * s for n, s in zip(self.shape, strides)) if strides else math.prod(self.shape)
        data = np.memmap(self.path, np.uint8, 'r', self.start, (count * self.dtype.itemsize,)).view(self.dtype)
        if not strides:
            return data.reshape(self.shape)
        return np.array(np.lib.stride_tricks.as_strided(data, self.shape, [s * self.dtype.itemsize for s in strides]),
                        order='C')

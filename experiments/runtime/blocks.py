"""Arrays that take long to compute, written block by block, so that an interrupted command need not compute them again.

    FILE.partial/responses-8d1f0c2a9b3e4f56/64.npz

A folder belongs to one computation. Its name has a digest of everything that decides the arrays: blocks of other
weights, prompts or settings are never taken for its own. A block is a file, there whole or not at all, and whichever
process needs it reads it, on however many processes the command is run again. Where machines share no disk, or see
each other's files late, a block is computed again. The command removes FILE.partial when it has written FILE.
"""
import dataclasses
import hashlib
import io
import logging
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.runtime import processes, storage

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def digest_of(*values: Any) -> str:
    """16 hexadecimal digits that tell values apart: numpy arrays, and others whose `repr` says all there is to them."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            digest.update(f'{value.dtype}{value.shape}'.encode())
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        else:
            digest.update(repr(value).encode())
        digest.update(b'\0')
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one computation.

    Attributes:
        folder: where they are; '': nowhere, and each is computed whenever it is asked for.
    """
    folder: str = ''

    @classmethod
    def of(cls, place: str, what: str, *decisive: Any) -> 'Blocks':
        """Blocks in the folder `place` of a command.

        Args:
            what: begins their folder's name.
            decisive: everything that decides the arrays, as `digest_of` takes it.
        """
        return cls(f'{place}/{what}-{digest_of(*decisive)}')

    def get(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The block of that name: read where it is there, else computed and written.

        Raises:
            OSError: it cannot be written.
        """
        if not self.folder:
            return compute()
        file = storage.resolve(self.folder) / f'{name}.npz'
        arrays = _read(file)
        if arrays is None:
            _write(file, arrays := compute())
        return arrays


def remove(place: str) -> None:
    """Removes the folder `place` of a command that has written its output; '': there is none. All processes of a job
    call it together, and none begins another computation before it is gone."""
    if place and jax.process_index() == 0:
        storage.resolve(place).rmtree(missing_ok=True)
    processes.wait_for_all()


def _read(file: Any) -> Arrays | None:
    """The arrays of a block; None where there is none, or a damaged one."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        log.warning('%s: damaged (%s); computed again', file, error)
        return None


def _write(file: Any, arrays: Arrays) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with storage.write_whole(file) as out:
            np.savez(out, **arrays)
    except OSError as error:
        raise OSError(f'{file}: cannot be written ({error.strerror or error}); make room, or choose another place for '
                      'the output, and run the same command: it goes on from here') from None

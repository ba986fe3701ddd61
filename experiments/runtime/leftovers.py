"""What killed writers leave behind in a work directory, for the trainer that owns it to remove."""
import logging
import re
import time
from collections.abc import Iterator

from etils import epath

from experiments.runtime import storage

log = logging.getLogger(__name__)

GENERATOR_SECONDS = 600.0  # a generator's file that has not grown for so long has no writer any more


def remove(workdir: epath.Path) -> None:
    """Removes files that were being written when their writer died. The caller holds the work directory's lease.

    Unfinished checkpoints are the `Checkpointer`'s to remove. Weights that were being published were this trainer's
    predecessor's. Batches may be on their way from generators that are alive, so of those only old ones go.
    """
    for path in _leftovers(workdir):
        try:
            path.unlink()
            log.info('%s: removed, its writer did not finish it', path)
        except OSError as error:
            log.warning('%s: unfinished and in the way, but cannot be removed (%s)', path, error)


def _leftovers(workdir: epath.Path) -> Iterator[epath.Path]:
    for path in workdir.iterdir():
        if re.search(rf'\.[\d-]+{re.escape(storage.PARTIAL)}$', path.name) and path.is_file():
            yield path
    if storage.is_remote(workdir):  # generators work through a folder on a disk
        return
    yield from (workdir / 'rollouts' / 'weights').glob('.weights-*')
    for path in (workdir / 'rollouts' / 'batches').glob('.*-*'):
        if time.time() - path.stat().mtime > GENERATOR_SECONDS:
            yield path

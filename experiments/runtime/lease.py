"""A work directory has one trainer at a time: a lease that its owner renews and a dead owner loses.

The lease is a file, `trainer.lease`, that says who owns the directory and carries a counter that goes up every
`BEAT_SECONDS`. Locks are not relied upon, for many shared disks and all object stores lack them:

- A newcomer on the owner's machine looks whether that process is still alive, and takes over at once if not.
- Anywhere else it watches the counter, and takes over when that has stood still for `LEASE_SECONDS` of its own clock
  (clocks of two machines are never compared).
- A lease that is not there is created, exclusively where the disk can do that. Whoever takes one over writes, waits a
  moment, and reads again: of several, the one whose name is in the file owns it.
- An owner that finds another name there has lost the lease (its machine was suspended, say). It finds out at its next
  beat and before every checkpoint, and stops without writing one.
"""
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import jax

from experiments.runtime import storage
from experiments.runtime.signals import signals

log = logging.getLogger(__name__)

NAME = 'trainer.lease'
BEAT_SECONDS = 5.0
LEASE_SECONDS = 40.0
SETTLE_SECONDS = 0.2         # between taking over and looking who got it; on a local disk
SETTLE_REMOTE_SECONDS = 2.0


class Taken(OSError):
    """The work directory is another trainer's."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
        token: drawn anew for each lease.
        host: name of the machine, for people.
        pid: process id there.
        machine: one boot of one machine and one namespace of process ids; '' where that cannot be told.
        born: when the process started, in ticks since the machine's boot; tells a process from a later one of its id.
        since: date and time, for people.
    """
    token: str
    host: str
    pid: int
    machine: str
    born: str
    since: str

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host} (since {self.since})'

    def is_dead(self) -> bool | None:
        """Whether its process is gone; None where that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        return _born(self.pid) != self.born


class Lease:
    """The lease of `directory`, held once `take` has returned and until `release`.

    Args:
        directory: made if it is not there.
        restore: puts back what else must be in the directory, should somebody delete it under a run.
    """

    def __init__(self, directory: str | os.PathLike, restore: Callable[[], None] = lambda: None):
        self._directory = storage.resolve(directory)
        self._path, self._restore = self._directory / NAME, restore
        self._owner = Owner(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _machine(), _born(os.getpid()),
                            time.strftime('%Y-%m-%d %H:%M:%S'))
        self._beat = 0
        self._lock, self._done = threading.Lock(), threading.Event()
        self._lost: Owner | None = None
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Takes the lease, after waiting for one whose owner may be dead.

        Raises:
            Taken: somebody else holds it; names them.
        """
        remote = storage.is_remote(self._directory)
        if remote or not self._create():
            found = self._read()
            if found is not None:
                self._wait_for(*found)
            self._write()
            time.sleep(SETTLE_REMOTE_SECONDS if remote else SETTLE_SECONDS)
            self.check()
        self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Makes sure that the lease is still held, for whoever is about to write.

        Raises:
            Taken: somebody else has taken it over.
        """
        with self._lock:
            self._look()
        if self._lost is not None:
            raise _taken(self._directory, self._lost)

    def release(self) -> None:
        """Gives the lease up; the file goes unless it is another's by now."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            found = self._read()
            if found is not None and found[0].token == self._owner.token:
                self._path.unlink(missing_ok=True)

    # ---- The file ----------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[Owner, int] | None:
        """(owner, beat); None if there is no lease. What cannot be read belongs to nobody who could be named."""
        try:
            fields = json.loads(self._path.read_text())
            return Owner(**{f.name: fields[f.name] for f in dataclasses.fields(Owner)}), int(fields['beat'])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return Owner('', 'a machine that left no name', 0, '', '', 'unknown'), -1

    def _create(self) -> bool:
        """Whether the file was not there and is ours now: on a disk that can tell, nobody else need be waited for."""
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            with open(self._path, 'xb') as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _write(self) -> None:
        """Puts our name into the file."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with storage.write_whole(self._path) as file:
            file.write(self._text())

    def _text(self) -> bytes:
        # The counter has a fixed width: a beat overwrites in place, which needs no room on a full disk.
        return json.dumps(dataclasses.asdict(self._owner) | {'beat': f'{self._beat:012d}'}).encode()

    def _look(self) -> None:
        """Notes who has taken the lease over, and puts back a directory that was deleted under the run."""
        found = self._read()
        if found is not None and found[0].token != self._owner.token:
            self._lost = found[0]
        elif found is None and self._lost is None:
            log.warning('%s: deleted while a run was using it; its config and lease are written anew, and so will its '
                        'next checkpoint be', self._directory)
            self._write()
            self._restore()

    def _renew(self) -> None:
        while self._lost is None and not self._done.wait(BEAT_SECONDS):
            with self._lock, contextlib.suppress(OSError):  # a disk that hiccups gets several beats to recover
                self._look()
                if self._lost is None:
                    self._beat += 1
                    if storage.is_remote(self._path):
                        self._write()
                    else:
                        with open(self._path, 'r+b') as file:
                            file.write(self._text())

    def _wait_for(self, owner: Owner, beat: int) -> None:
        """Returns when `owner` has lost the lease.

        Raises:
            Taken: it has not.
        """
        dead = owner.is_dead()
        if dead is False:
            raise _taken(self._directory, owner)
        if dead:
            return
        log.info('%s: held by %s; waiting %.0f s to see whether it is still there', self._directory, owner,
                 LEASE_SECONDS)
        until = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, LEASE_SECONDS / 4))
            found = self._read()
            if found is None:
                return
            if found != (owner, beat):
                raise _taken(self._directory, found[0])


def _taken(directory: os.PathLike, owner: Owner) -> 'Taken':
    return Taken(f'--workdir={directory}: another trainer uses it, {owner}; stop that one or choose another --workdir')


@contextlib.contextmanager
def owned(directory: str | os.PathLike, restore: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
    """Holds the lease of `directory` inside the block; yields `Lease.check`. Process 0 holds it for the whole job.

    Raises:
        Taken: another trainer holds it (in every process of the job).
    """
    lease, error = Lease(directory, restore), None
    if jax.process_index() == 0:
        try:
            lease.take()
        except OSError as taken:
            error = taken
    if jax.process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils
        if multihost_utils.broadcast_one_to_all(np.asarray(error is not None)) and error is None:
            error = Taken(f'--workdir={directory}: another trainer uses it; process 0 says which')
    if error is not None:
        raise error
    try:
        with signals.before_leaving(lease.release):
            yield lease.check if jax.process_index() == 0 else lambda: None
    finally:
        if jax.process_index() == 0:
            lease.release()


# ---- Processes -------------------------------------------------------------------------------------------------------

def _machine() -> str:
    """One boot of one machine and one namespace of process ids; '' where there is no such file."""
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''


def _born(pid: int) -> str:
    """Start time of a process in ticks since the boot; '' if there is none, or it has ended."""
    try:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    except (OSError, IndexError):
        return ''
    return '' if fields[0] in 'ZX' else fields[19]

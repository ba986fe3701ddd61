"""What a compiler said of programs, kept in a folder: an equal program is compiled once, however many configurations,
commands and stops there are in between. Also the locks by which commands that run side by side share such a folder.
"""
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

# What a program's text does not say and its compilation depends on.
PACKAGES = ('jaxlib', 'libtpu', 'jax-cuda13-plugin')
VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')


def fingerprint(lowered: jax.stages.Lowered, options: Mapping[str, Any] | None, mesh: Mesh, slice_name: str) -> str:
    """32 hexadecimal digits of all that is compiled: the program's text, in which shapes, layouts over the mesh and
    donated arguments stand; the compiler's options and version; and the devices, by their kind and, where there are
    several, by their places in the slice."""
    devices = list(mesh.devices.flat)
    places = (slice_name, [device.id for device in devices]) if len(devices) > 1 else ()
    about = [devices[0].device_kind, places, sorted((options or {}).items()), jax.__version__,
             [(name, _version(name)) for name in PACKAGES], [os.environ.get(name) for name in VARIABLES]]
    return hashlib.sha256((json.dumps(about) + lowered.as_text()).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ''


class ReportCache:
    """JSON values by fingerprint, a file each.

    Args:
        folder: is made if it is missing.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value under `key`, from `make` if there is none yet. A command that asks while another one makes it waits
        for that one's."""
        with open(self._folder / f'{key}.json', 'a+') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            with contextlib.suppress(json.JSONDecodeError):  # empty, or its writer was killed
                return json.loads(file.read())
            value = make()
            file.truncate(0)
            json.dump(value, file)
            return value

    @contextlib.contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Whether `name` is this command's alone in the block; False where another one has it and `wait` is not set.
        A command that is killed lets go of what it has."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        with open(self._folder / f'{digest}.lock', 'w') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

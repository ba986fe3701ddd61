"""Where runs live: a local disk or an object store (`gs://`, `s3://`), through one kind of path.

Work directories, checkpoints and results are read and written in place. What has to be memory-mapped, or is read by a
library that knows local files only, comes through `local_copy`.
"""
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from etils import epath

log = logging.getLogger(__name__)

PARTIAL = '.partial'  # ends the name of a file that is being written
_PACKAGES = {'gs': ('gcs', "pip install -e '.[gcs]'"), 's3': ('s3', 'pip install s3fs')}  # scheme -> fsspec name, cure


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` is a URL rather than a place on a local (or mounted) disk."""
    return '://' in os.fspath(path)


def resolve(path: str | os.PathLike) -> epath.Path:
    """A path with pathlib's methods; `~` is expanded.

    Raises:
        ValueError: a scheme that cannot be read here.
    """
    if not is_remote(path):
        return epath.Path(path).expanduser()
    scheme = os.fspath(path).split('://', 1)[0]
    if scheme not in _PACKAGES:
        raise ValueError(f'{os.fspath(path)}: no storage {scheme}://; use a local path or one of '
                         f'{", ".join(f"{s}://" for s in _PACKAGES)}')
    import fsspec
    name, cure = _PACKAGES[scheme]
    try:
        fsspec.get_filesystem_class(name)
    except ImportError:
        raise ValueError(f'{os.fspath(path)}: reading and writing {scheme}:// needs a package; {cure}') from None
    return epath.Path(path)


@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Opens `path` for writing bytes; it appears, or is replaced, only when the block ends without an error.

    On a local disk the bytes are on it before the name is: after a power cut there is the old file or the new one.
    """
    path = resolve(path)
    partial = path.with_name(f'{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}')  # this writer's alone
    try:
        with partial.open('wb') as file:
            yield file
            if not is_remote(path):
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON to `path`, whole or not at all."""
    with write_whole(path) as file:
        file.write((json.dumps(value, indent=1) + '\n').encode())


def write_json_lines(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line to `path`, whole or not at all; text beyond ASCII as it is."""
    with write_whole(path) as file:
        file.write(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows).encode())


def read_json_lines(flag: str, path: str, fields: Sequence[str], written_by: str) -> list[dict[str, Any]]:
    """Objects of a file with one a line, which ends at a newline alone: texts may hold other separators.

    Args:
        flag: what named the file, for messages.
        fields: texts that every row must have.
        written_by: the command that writes such files, for messages.

    Raises:
        ValueError, OSError: nothing there, or a line that is no such row.
    """
    try:
        content = resolve(path).read_bytes()
    except OSError as error:
        raise OSError(f'{flag}={path}: cannot be read ({error.strerror or error}); write the file with '
                      f'{written_by}') from None
    rows = []
    for number, line in enumerate(io.BytesIO(content), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f'{flag}={path}: line {number} is no JSON object; write the file with {written_by}')
        missing = [field for field in fields if not isinstance(row.get(field), str)]
        if missing:
            raise ValueError(f'{flag}={path}: line {number} has no {missing[0]}; write the file with {written_by}')
        rows.append(row)
    if not rows:
        raise ValueError(f'{flag}={path}: holds no row')
    return rows


def check_writable(directory: str | os.PathLike, what: str) -> None:
    """Creates `directory` and writes to it, so that a place that cannot be written shows before any work is done.

    Raises:
        OSError: it cannot; names `what` (a flag, say) and the reason.
    """
    directory = resolve(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f'.writable-{uuid.uuid4().hex}'  # machines of a job may have equal process ids
        probe.write_text('')
        probe.unlink()
    except OSError as error:
        raise OSError(f'{what}: {directory} cannot be written ({error.strerror or error}); choose another place '
                      'or mend its permissions') from None


# ---- Copies of what is remote --------------------------------------------------------------------------------------

def cache_directory() -> pathlib.Path:
    """Where `local_copy` puts things: `$EXPERIMENTS_CACHE`, or `~/.cache/experiments`."""
    return pathlib.Path(os.environ.get('EXPERIMENTS_CACHE', '~/.cache/experiments')).expanduser()


def cached(path: str | os.PathLike) -> pathlib.Path:
    """The local place that stands for the remote `path`."""
    url = os.fspath(path).rstrip('/')
    return cache_directory() / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rsplit('/', 1)[-1]


def local_copy(path: str | os.PathLike) -> pathlib.Path:
    """`path` itself where it is local; else a copy of that file or flat folder, made again when sizes or dates change.
    Of several processes of a machine one makes it, and the others wait for it.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: no room for the copy.
    """
    source = resolve(path)
    if not is_remote(path):
        return pathlib.Path(source)
    if not source.exists():
        raise FileNotFoundError(f'{path}: nothing there')
    files = [f for f in source.iterdir() if not f.is_dir()] if source.is_dir() else [source]
    stats = {f.name: f.stat() for f in files}
    signature = {name: [stat.length, stat.mtime] for name, stat in sorted(stats.items())}
    target = cached(path)
    note = target.with_name('copied.json')
    if _is_copied(target, note, signature):
        return target
    partial = target.with_name(f'{target.name}.{os.getpid()}')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name('copied.lock'), 'wb') as lock:
            with contextlib.suppress(OSError):  # of a disk without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_copied(target, note, signature):  # by another process, while this one waited
                return target
            log.info('%s: copying %.2f GB to %s', path, sum(size for size, _ in signature.values()) / 1e9, target)
            remove(partial)  # of a process that was killed
            if source.is_dir():
                partial.mkdir()
            for file in files:
                file.copy(partial / file.name if source.is_dir() else partial, overwrite=True)
            remove(target)
            partial.replace(target)
            write_json(note, signature)
    except OSError as error:
        remove(partial)
        raise OSError(f'{path}: could not be copied to {target} ({error.strerror or error}); make room or set '
                      'EXPERIMENTS_CACHE to another disk') from None
    return target


def _is_copied(target: pathlib.Path, note: pathlib.Path, signature: Mapping[str, Any]) -> bool:
    """Whether `target` is there and `note` says that it is a copy of what has that signature."""
    try:
        return target.exists() and json.loads(note.read_text()) == signature
    except (OSError, ValueError):  # not there, or damaged
        return False


def upload(folder: pathlib.Path, path: str | os.PathLike, *, last: str) -> None:
    """Copies the files of a local folder to the remote `path`; `last` after all others, so that it vouches for them."""
    target = resolve(path)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda f: (f.name == last, f.name)):
        epath.Path(file).copy(target / file.name, overwrite=True)


@contextlib.contextmanager
def local_folder(path: str | os.PathLike, *, last: str) -> Iterator[pathlib.Path]:
    """A local folder to write files into: `path` itself, or one that is uploaded there (see `upload`) at the end."""
    if not is_remote(path):
        yield pathlib.Path(resolve(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)
        upload(pathlib.Path(folder), path, last=last)


def remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

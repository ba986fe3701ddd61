"""JSON lines that take long to make: written block by block, in parts (`runtime.shards`), and continued where a command
was interrupted.

A part grows in a file beside its place, in which lines that begin with '#' say what is made and how far it has come.
"""
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.runtime import shards, storage
from experiments.runtime.shards import Shard

Row = Mapping[str, Any]


def write(out: str, num: int, unit: int, shard: Shard | None, settings: str, make: Callable[[range], Sequence[Row]],
          progress: Callable[[int], None] | None = None) -> bool:
    """Writes the lines of items 0 .. num - 1, or this process's part of them, to `out`; returns whether it is whole.

    Args:
        unit: items that are made at once.
        shard: make this part alone; None: the whole, shared out among the processes of the job.
        settings: digest of all that decides the lines: a part of others is not continued.
        make: items -> their lines.
        progress: takes how many items of this process are done.

    Raises:
        ValueError: parts of other settings, or another number of them, were begun; the whole is there already.
    """
    if shard is not None and storage.resolve(out).exists() and shards.begun(out) is None:
        raise ValueError(f'--shard={shard.index}/{shard.count}: {out} is there already, whole; delete it to make it '
                         'anew')
    done = 0
    for part in shards.of_this_process(shard, out, num, unit):
        rows = part.rows(num, unit)
        _write_part(shards.place(out, part), rows, unit, settings, make,
                    progress and (lambda count, before=done: progress(before + count)))
        done += len(rows)
    return shards.finish(lambda: merge(out))


def merge(out: str) -> bool:
    """Makes `out` of its parts where all are there; returns whether it is there now."""
    count = shards.begun(out)
    if count is None:
        return storage.resolve(out).exists()
    parts = [shards.folder(out) / str(Shard(i, count)) for i in range(count)]
    if not all(part.exists() for part in parts):
        return False
    with storage.write_whole(out) as file:
        for part in parts:
            file.write(part.read_bytes())
    shards.folder(out).rmtree(missing_ok=True)
    return True


def describe_missing(out: str) -> str:
    """How many parts there are, and which are missing."""
    count = shards.begun(out) or 0
    missing = [f'{i}/{count}' for i in range(count) if not (shards.folder(out) / str(Shard(i, count))).exists()]
    return f'{count - len(missing)} of {count} shards; missing are {", ".join(missing[:8])}'


def _write_part(place: str, rows: range, unit: int, settings: str, make: Callable[[range], Sequence[Row]],
                progress: Callable[[int], None] | None) -> None:
    whole, growing = storage.resolve(place), shards.partial(place)
    if whole.exists() and whole.parent.name.endswith('.shards'):
        return
    growing.parent.mkdir(parents=True, exist_ok=True)
    head = f'#{settings} {rows.start} {rows.stop}\n'.encode()
    written, done = b'', 0
    if growing.exists():
        before = growing.read_bytes()
        if not before.startswith(head) and not head.startswith(before):  # a part of the head: nothing was begun
            raise ValueError(f'{growing}: was begun with other flags; delete it, or choose another place')
        written, done = _up_to_mark(before[len(head):])
    begun = head + written + (f'#{done}\n'.encode() if done else b'')
    local = not storage.is_remote(place)
    if local:  # whoever is killed finds what was there before (an object store keeps it until all is written)
        with storage.write_whole(growing) as file:
            file.write(begun)
    with open(growing, 'ab') if local else growing.open('wb') as file:
        file.write(b'' if local else begun)
        for start in range(rows.start + done, rows.stop, unit):
            items = range(start, min(start + unit, rows.stop))
            lines = b''.join(json.dumps(row, ensure_ascii=False).encode() + b'\n' for row in make(items))
            written, done = written + lines, done + len(items)
            file.write(lines + f'#{done}\n'.encode())
            file.flush()
            if progress:
                progress(done)
    with storage.write_whole(place) as file:
        file.write(written)
    growing.unlink()


def _up_to_mark(content: bytes) -> tuple[bytes, int]:
    """The lines before the last whole mark, and the number of items it gives."""
    end = content.rfind(b'\n') + 1
    lines = content[:end].split(b'\n')[:-1]
    marks = [i for i, line in enumerate(lines) if line.startswith(b'#')]
    if not marks:
        return b'', 0
    kept = [line for line in lines[:marks[-1]] if not line.startswith(b'#')]
    return b''.join(line + b'\n' for line in kept), int(lines[marks[-1]][1:])

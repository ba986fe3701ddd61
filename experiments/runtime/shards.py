"""A long computation over the rows of a set, cut into shards that know nothing of each other.

A shard is a range of whole units of rows, and what it makes lies in a folder of its own beside the output:

    OUT.shards/00002-of-00004

The processes of one job take a shard each, without a word between them until all are done; the tasks of an array job
take the one that `--shard=i/n` says. Whoever finds all shards there makes the output of them: the last task, process 0
of a job, or the command that reads it. What was begun as n shards is finished as n shards, by however many processes.
"""
import argparse
import dataclasses
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from experiments.runtime import storage
from experiments.runtime.processes import agreed, wait_for_all

VISIBLE_SECONDS = 60.0  # that a shared file system may take to show what another machine has written

LOOK_SECONDS = 0.5

T = TypeVar('T')

_NAME = re.compile(r'(\d{5})-of-(\d{5})')


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`."""
    index: int = 0
    count: int = 1

    def rows(self, num: int, unit: int) -> range:
        """Which of `num` rows: whole units of `unit` rows, but for the last of all."""
        units = -(-num // unit)
        start, stop = (i * units // self.count * unit for i in (self.index, self.index + 1))
        return range(start, min(stop, num))

    def __str__(self) -> str:
        return f'{self.index:05d}-of-{self.count:05d}'


WHOLE = Shard()


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--shard', metavar='I/N', help='only part I = 0..N-1 of N, for jobs that know nothing of each '
                        'other; what all of them made is one set. (The processes of a --distributed job share the work '
                        'without it)')


def parse(args: argparse.Namespace) -> Shard | None:
    """What `--shard` says; None without it.

    Raises:
        ValueError: another form, an index out of range, or a shard of a job that shares out the work itself.
    """
    if args.shard is None:
        return None
    match = re.fullmatch(r'(\d+)/(\d+)', args.shard)
    if not match or not int(match[1]) < int(match[2]) < 10 ** 5:
        raise ValueError(f'--shard={args.shard}: write I/N with I from 0 to N - 1, such as 0/4')
    if args.distributed:
        raise ValueError(f'--shard={args.shard}: the processes of a --distributed job share the work themselves; leave '
                         'one of the two out')
    return Shard(int(match[1]), int(match[2]))


def folder(out: str | os.PathLike) -> Any:
    """Where the shards of `out` lie."""
    path = storage.resolve(out)
    return path.with_name(f'{path.name}.shards')


def partial(out: str | os.PathLike) -> Any:
    """Where an output of one part lies until it is whole."""
    path = storage.resolve(out)
    return path.with_name(f'{path.name}{storage.PARTIAL}')


def place(out: str | os.PathLike, shard: Shard) -> str:
    """Where one shard of `out` lies: `out` itself if there is but one."""
    return os.fspath(out) if shard.count == 1 else os.fspath(folder(out) / str(shard))


def begun(out: str | os.PathLike) -> int | None:
    """Of how many shards there are some of `out`, whole or unfinished; None if there is none.

    Raises:
        ValueError: shards of different numbers.
    """
    place = folder(out)
    names = [file.name.removesuffix(storage.PARTIAL) for file in place.iterdir()] if place.is_dir() else []
    counts = {int(match[2]) for match in map(_NAME.fullmatch, names) if match}
    if len(counts) > 1:
        raise ValueError(f'{place}: shards of {" and of ".join(map(str, sorted(counts)))}; delete those that do not '
                         'belong there')
    return counts.pop() if counts else None


def of_this_process(wanted: Shard | None, out: str | os.PathLike, num: int, unit: int) -> list[Shard]:
    """The shards of `out` that this process has to make: the one `wanted`, or its share of all.

    All processes of a job must call it together.

    Args:
        num, unit: rows of the whole set, and of a unit.

    Raises:
        ValueError: shards of another number were begun, or more were asked for than there are units.
    """
    units = -(-num // unit)
    if wanted is not None:
        count = begun(out)
        if count is None and partial(out).exists():
            count = 1
        if count not in (None, wanted.count):
            what = 'the whole was' if count == 1 else f'{count} shards were'
            raise ValueError(f'--shard={wanted.index}/{wanted.count}: {what} begun at {out}; finish it as it was '
                             f'begun, or delete {partial(out) if count == 1 else folder(out)}')
        if wanted.count > units:
            raise ValueError(f'--shard={wanted.index}/{wanted.count}: {num} rows are {units} batches of {unit}; use at '
                             f'most {units} shards, or a smaller --batch_size')
        return [wanted]
    count = begun(out) or (1 if partial(out).exists() else min(jax.process_count(), units))
    count = agreed(count)
    return [Shard(i, count) for i in range(jax.process_index(), count, jax.process_count())]


def finish(make: Callable[[], bool], seen: Callable[[], bool] = lambda: True) -> bool:
    """Makes the output where all shards are there: in process 0 of a job, when all its processes are done; in any task
    of an array. Returns whether it is there, in every process.

    Args:
        make: makes the output and says so, or says that shards are missing.
        seen: whether this process sees the output, which it waits for.
    """
    wait_for_all()
    if jax.process_count() == 1:
        return make()
    made = agreed(jax.process_index() == 0 and in_time(make))
    return made and in_time(seen)


def in_time(seen: Callable[[], bool]) -> bool:
    """Whether `seen()` holds before a shared file system must have shown what another machine has written."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (there := seen()) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return there


def gathered(compute: Callable[[range], T], num: int, unit: int) -> T:
    """`compute` of rows 0 .. num - 1, a tree of arrays [n, ...], in every process; each computes a part of them.

    Args:
        unit: rows that are computed together, of which no part gets a fraction.
    """
    if jax.process_count() == 1:
        return compute(range(num))
    from jax.experimental import multihost_utils
    parts = [Shard(i, jax.process_count()).rows(num, unit) for i in range(jax.process_count())]
    mine, longest = parts[jax.process_index()], max(map(len, parts))
    rows = compute(mine or range(min(num, unit)))  # one without a part computes some for their shapes
    wait_for_all()

    def whole(x: np.ndarray) -> np.ndarray:
        padded = np.zeros((longest, *x.shape[1:]), x.dtype)
        padded[:len(mine)] = x[:len(mine)]
        everybody = multihost_utils.process_allgather(padded.view(np.uint8) if x.dtype == bool else padded)
        everybody = everybody.view(bool) if x.dtype == bool else everybody
        return np.concatenate([x_of[:len(part)] for x_of, part in zip(everybody, parts)])
    return jax.tree.map(lambda x: whole(np.asarray(x)), rows)

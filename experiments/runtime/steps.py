"""Which checkpoints of a run a command reads (`--step=N|all|last`), and where what it makes of each of them goes."""
import argparse
import os
import re
from collections.abc import Iterator, Sequence

import jax

from experiments.runtime import processes, storage
from experiments.runtime.checkpoint import Checkpointer

PLACE = '{step}'  # in an output's name: the step, so that every checkpoint has a place of its own


def add_flag(parser: argparse.ArgumentParser, run: str) -> None:
    """`--step`; `run`: the flag that names the run whose checkpoints are meant."""
    parser.add_argument('--step', metavar='N|all|last', default='last',
                        help=f'which checkpoint of {run}: the one of that step, every one that was kept, or the newest '
                             f'(default); outputs that have {PLACE} in their name get one for each')


def check(step: str, *outputs: str | None) -> None:
    """Raises a ValueError for a `--step` of another form, or one of 'all' whose outputs would replace each other.

    Args:
        outputs: places to write to, as flags name them; None where there is none.
    """
    if step not in ('all', 'last') and not (step.isascii() and step.isdigit()):
        raise ValueError(f"--step={step}: give a checkpoint's step, 'all' or 'last'")
    for output in outputs:
        if step == 'all' and output and PLACE not in output:
            raise ValueError(f'--step=all: {output} would be written once for each checkpoint; put {PLACE} into its '
                             'name')


def of_run(step: str, workdir: str | os.PathLike) -> list[int]:
    """The steps that `--step` means of the run in `workdir`, oldest first.

    Raises:
        ValueError: no checkpoint yet, or not the one that is asked for.
    """
    checkpointer = Checkpointer(storage.resolve(workdir) / 'checkpoints', read_only=True)
    try:
        kept = checkpointer.steps()
        if not kept:
            raise no_checkpoint(workdir)
        if step not in ('all', 'last'):
            checkpointer.check_kept(int(step))
    finally:
        checkpointer.close()
    return kept if step == 'all' else kept[-1:] if step == 'last' else [int(step)]


def wanted(step: str, workdir: str | os.PathLike, *outputs: str | None) -> list[int | None]:
    """As `of_run`; [None], the newest readable one, where neither `--step` nor an output asks for a step.

    The processes of a job call it together and get the steps that process 0 finds, for the run may still be training.
    """
    named = step != 'last' or any(output and PLACE in output for output in outputs)
    if processes.alone():
        return list(of_run(step, workdir)) if named else [None]
    look = lambda: of_run(step, workdir) if named else [newest(workdir)]
    return processes.agreed(look() if jax.process_index() == 0 else None)


def of_places(step: str, places: Sequence[str]) -> list[int]:
    """The steps that `--step` means of `places` to read, which have `PLACE` in their names: those that are there,
    oldest first.

    The processes of a job call it together and get the steps that process 0 finds, for more may still be written.

    Raises:
        FileNotFoundError: there is none, or not all places have that of `step`.
    """
    return processes.agreed(_of_places(step, places) if jax.process_index() == 0 else None)


def _of_places(step: str, places: Sequence[str]) -> list[int]:
    there = set.intersection(*(set(_steps_at(place)) for place in places))
    if step not in ('all', 'last'):
        there &= {int(step)}
    if not there:
        raise FileNotFoundError(f'--step={step}: no such {places[0]} there; experiments.sample and experiments.encode '
                                'write them with --step=all')
    return sorted(there) if step == 'all' else [max(there)]


def _steps_at(place: str) -> Iterator[int]:
    """Steps for which something is there, whole or in parts."""
    before, after = place.split(PLACE, 1)
    folder = storage.resolve(before[:before.rfind('/') + 1] or '.')
    name, rest = before[before.rfind('/') + 1:], after.split('/')[0]
    pattern = re.compile(rf'{re.escape(name)}(\d+){re.escape(rest)}(?:\.shards|\.partial)?')
    for file in folder.iterdir() if folder.is_dir() else ():
        match = pattern.fullmatch(file.name)
        if match:
            yield int(match[1])


def newest(path: str | os.PathLike) -> int | None:
    """The newest step of the run in `path`; None of a folder that has no checkpoints, such as released weights."""
    try:
        return of_run('last', path)[0]
    except ValueError:
        return None


def agreed_newest(path: str | os.PathLike) -> int | None:
    """The `newest` step that process 0 of a job finds, for all of its processes, which call it together: the run may
    still be training, and a shared disk may show its last step to some of them alone. None in a job of one process,
    which reads the newest that is readable."""
    if processes.alone():
        return None
    return processes.agreed(newest(path) if jax.process_index() == 0 else None)


def placed(output: str, step: int | None) -> str:
    """Where the output of a checkpoint goes."""
    return output if step is None else output.replace(PLACE, str(step))


def no_checkpoint(workdir: str | os.PathLike) -> ValueError:
    return ValueError(f'{workdir}: no checkpoint there yet; let experiments.train reach its first one')

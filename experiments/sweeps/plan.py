"""Which runs a sweep has: the product of its axes and seeds, each an ordinary command of `experiments.train`."""
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from experiments.runtime import config_files, storage

log = logging.getLogger(__name__)

RECORD = 'sweep.json'    # in a sweep's folder: every run that was ever asked for there
VARIANT = 'variant'      # the axis of what stands behind the colon of --config
MAX_RUNS = 10_000


class Axis(NamedTuple):
    """Fields of the config that move together.

    Attributes:
        fields: dotted names; `VARIANT` for the argument of the config file.
        points: values of the fields, one tuple a point of the axis, as they are written on a command line.
    """
    fields: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: its folder below the sweep's, `SETTING/seed=S`.
        setting: label of its values on the axes.
        seed: `config.seed`.
        flags: of `experiments.train`, but for `--workdir`.
        config: what they amount to.
    """
    name: str
    setting: str
    seed: int
    flags: tuple[str, ...]
    config: ml_collections.ConfigDict


def axes_of(variants: str, sweeps: Mapping[str, str], zipped: Mapping[str, str]) -> tuple[Axis, ...]:
    """The axes that flags describe.

    Args:
        variants: arguments of the config file, with commas; '': it has none of its own.
        sweeps: field -> values with commas; each field is an axis.
        zipped: the same of fields that move together.

    Raises:
        ValueError: an axis without values, a value given twice, or zipped fields of different lengths.
    """
    axes = [Axis((VARIANT,), tuple((value,) for value in split_values('--variants', variants)))] if variants else []
    for field, values in sweeps.items():
        axes.append(Axis((field,), tuple((value,) for value in split_values(f'--sweep.{field}', values))))
    if zipped:
        columns = {field: split_values(f'--zip.{field}', values, repeats=True) for field, values in zipped.items()}
        counts = {f'--zip.{field}: {len(values)}' for field, values in columns.items()}
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError(f'fields that move together need equally many values; {", ".join(sorted(counts))}')
        if set(zipped) & set(sweeps):
            raise ValueError(f'{sorted(set(zipped) & set(sweeps))[0]} is given to --sweep and to --zip; choose one')
        first = next(iter(columns))
        split_values(f'--zip.{first}', zipped[first])  # the axis goes by the name of its first field
        axes.append(Axis(tuple(columns), tuple(zip(*columns.values()))))
    return tuple(axes)


def split_values(flag: str, text: str, *, repeats: bool = False) -> tuple[str, ...]:
    """Values between the commas of `text` that are in no bracket: '1,(2,3)' -> ('1', '(2,3)').

    Raises:
        ValueError: an empty value, or (unless `repeats`) one that is given twice.
    """
    values, depth = [''], 0
    for character in text:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and depth == 0:
            values.append('')
        else:
            values[-1] += character
    if '' in values and not repeats:
        raise ValueError(f'{flag}={text}: a value is empty; write them with commas between')
    if len(set(values)) < len(values) and not repeats:
        raise ValueError(f'{flag}={text}: a value is given twice')
    return tuple(values)


def runs_of(config: str, fixed: Sequence[str], axes: Sequence[Axis], seeds: Sequence[int]) -> list[Run]:
    """Every run of the sweep: all settings with the first seed, then with the next.

    Args:
        config: file, or FILE:ARG, of `--config`.
        fixed: overrides `--config.FIELD=VALUE` that all runs have.

    Raises:
        ValueError: a field or value that the config refuses, one that is fixed and swept, or the config of another
            command than `experiments.train`.
    """
    swept = {field for axis in axes for field in axis.fields}
    for override in fixed:
        field = override.split('=', 1)[0].removeprefix('--config.')
        if field in swept or field == 'seed':
            raise ValueError(f'{override}: ' + (f'{field} is swept; drop one of the two' if field in swept else
                                                'seeds are given by --seeds and --first_seed'))
    if VARIANT in swept and ':' in config:
        raise ValueError(f'--config={config}: has an argument behind its colon, and --variants gives others')
    if 'seed' in swept:
        raise ValueError('--sweep.seed: seeds are given by --seeds and --first_seed')
    names = short_names([axis.fields[0] for axis in axes])
    count = len(seeds)
    for axis in axes:
        count *= len(axis.points)
    if count > MAX_RUNS:
        raise ValueError(f'{count} runs; a sweep has at most {MAX_RUNS}')
    settings: list[tuple[str, str, tuple[str, ...], ml_collections.ConfigDict]] = []
    for points in itertools.product(*(axis.points for axis in axes)):
        flags, file = list(fixed), config
        for axis, values in zip(axes, points):
            for field, value in zip(axis.fields, values):
                if field == VARIANT:
                    file = f'{config}:{value}'
                else:
                    flags.append(f'--config.{field}={value}')
        parts = [f'{name}={values[0]}' for name, values in zip(names, points)]
        folder = ','.join(re.sub(r'[^\w.+=-]+', '_', part) for part in parts) or 'all'
        loaded = config_files.load(file, flags)
        config_files.check_command(loaded, file, ('experiment',))
        settings.append((', '.join(parts) or 'all', folder, (f'--config={file}', *flags), loaded))
    folders = [folder for _, folder, _, _ in settings]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f'two settings would share the folder {folder}: their values differ only in characters '
                             'that a folder cannot have')
    runs = []
    for seed, (label, folder, flags, loaded) in itertools.product(seeds, settings):
        of_seed = loaded.copy_and_resolve_references()
        with of_seed.unlocked():
            of_seed.seed = seed
        runs.append(Run(f'{folder}/seed={seed}', label, seed, (*flags, f'--config.seed={seed}'), of_seed))
    return runs


def short_names(fields: Sequence[str]) -> list[str]:
    """The last part of each dotted name, where that tells them apart; else the whole."""
    last = [field.rsplit('.', 1)[-1] for field in fields]
    return [short if last.count(short) == 1 else field for short, field in zip(last, fields)]


# ---- What a sweep's folder says of itself ----------------------------------------------------------------------------

def record(runs: Sequence[Run], workdir: str | os.PathLike, evaluation: Sequence[str] = ()) -> None:
    """Adds `runs` to the record in `workdir`, so that everything that was ever tried there is reported.

    Args:
        evaluation: flags of the measurement that follows each run.

    Raises:
        ValueError: the folder is not on this machine, or a run of that name was another.
    """
    if storage.is_remote(workdir):
        raise ValueError(f'--workdir={workdir}: a sweep on this machine needs a local folder; print a script for a '
                         'cluster with --script')
    before = read_record(workdir)
    if before and before['evaluation'] != list(evaluation):
        raise ValueError(f'{workdir}: its runs were measured with {before["evaluation"]}, not {list(evaluation)}; '
                         'choose another --workdir or give the same flags')
    known = before['runs'] if before else {}
    for run in runs:
        now = {'setting': run.setting, 'seed': run.seed, 'flags': list(run.flags), 'config': plain(run.config)}
        then = known.setdefault(run.name, now)
        changed = differing_fields([then['config'], now['config']])
        if changed:
            field = changed[0]
            values = [config_files.flat_fields(part['config']).get(field) for part in (then, now)]
            raise ValueError(f'{workdir}: {run.name} was run with {field}={values[0]!r}, not {values[1]!r}; choose '
                             'another --workdir')
    storage.check_writable(workdir, '--workdir')
    storage.write_json(storage.resolve(workdir) / RECORD, {'evaluation': list(evaluation), 'runs': known})


def read_record(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What `record` wrote in `workdir`; None if nothing is there.

    Raises:
        ValueError: it is damaged.
    """
    path = storage.resolve(workdir) / RECORD
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not isinstance(content['runs'], dict):
            raise ValueError('no record of runs')
        return content
    except (ValueError, KeyError) as error:
        raise ValueError(f'{path}: damaged ({error}); delete it and run the sweep again') from None


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def differing_fields(configs: Sequence[Mapping[str, Any]], *, ignore: Sequence[str] = ()) -> list[str]:
    """Dotted names of the fields in which `configs` are not all equal, in their order, but for those in `ignore`."""
    flat = [config_files.flat_fields(config) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config)
    return [name for name in names if name not in ignore
            and any(config.get(name) != flat[0].get(name) for config in flat)]


def is_finished(workdir: pathlib.Path, num_steps: int) -> bool:
    """Whether the run in `workdir` has a checkpoint of its last step."""
    return (storage.resolve(workdir) / 'checkpoints' / str(num_steps)).is_dir()

"""What finished runs measured, read from their work directories."""
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.runtime import config_files
from experiments.runtime.metrics import read_metrics
from experiments.sweeps.here import EVALUATION, INTERPOLATION, LOG, last_error
from experiments.sweeps.plan import RECORD, differing_fields, is_finished, read_record, short_names

DEPTH = 3                # folders below a given one in which runs are looked for
PLACES = ('workdir', 'weights', 'reward.model', 'tokenizer', 'data.path')  # say where things lie, not what was tried
EVALUATED = 'evaluate.'  # begins the names of what the measurement of a run found


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        setting: label of what sets it apart from the other runs but for the seed.
        seed: `config.seed`.
        folder: its work directory.
        config: as plain dicts.
        state: 'finished', or why it is not.
        rows: of `metrics.jsonl`.
        final: the last value of each metric, without those of the clock; `evaluate.NAME` from its evaluation.
        interpolation: a row {'alpha': share of the way from start to end, metric: value} an alpha.
    """
    setting: str
    seed: int
    folder: str
    config: dict[str, Any]
    state: str
    rows: list[dict[str, Any]]
    final: dict[str, float]
    interpolation: list[dict[str, float]]

    @property
    def finished(self) -> bool:
        return self.state == 'finished'


def collect(folders: Sequence[str], at: int | None = None) -> list[Result]:
    """Every run in `folders`: of sweeps (also those that have not begun), work directories, and folders of either.

    Args:
        at: step by which a run's final values were measured; None: its last.

    Raises:
        ValueError: there is none, none was measured by `at`, runs train different things, or two have one setting and
            seed.
    """
    results: list[Result] = []
    loose: list[pathlib.Path] = []
    for given in folders:
        root = pathlib.Path(given).expanduser()
        places = find_runs(root)
        if not places:
            raise ValueError(f'{given}: no run is there; give a sweep, a work directory of experiments.train, or a '
                             'folder of them')
        for place in places:
            if (place / RECORD).exists():
                prefix = f'{root.name}: ' if len(folders) > 1 else ''
                results += [read(place / name, f'{prefix}{run["setting"]}', run['seed'], run['config'], at)
                            for name, run in read_record(place)['runs'].items()]
            else:
                loose.append(place)
    results += read_loose(loose, at)
    kinds = sorted({str(result.config.get('experiment')) for result in results})
    if len(kinds) > 1:
        raise ValueError(f'runs of different experiments are not comparable: {", ".join(kinds)}; give folders of one '
                         'kind')
    seen: dict[tuple[str, int], str] = {}
    for result in results:
        other = seen.setdefault((result.setting, result.seed), result.folder)
        if other != result.folder:
            raise ValueError(f'{other} and {result.folder} have the same setting and seed; leave one out')
    if at is not None and not any(result.final for result in results):
        raise ValueError(f'--at={at}: no run was measured by that step; give a later one, or leave it out')
    return results


def find_runs(root: pathlib.Path, depth: int = DEPTH) -> list[pathlib.Path]:
    """Sweeps and work directories at or below `root`, in the order of their names."""
    if (root / RECORD).exists() or (root / 'config.json').exists():
        return [root]
    if depth == 0 or not root.is_dir():
        return []
    return [place for child in sorted(root.iterdir()) if child.is_dir() for place in find_runs(child, depth - 1)]


def read_loose(folders: Sequence[pathlib.Path], at: int | None = None) -> list[Result]:
    """Runs that no sweep recorded, labelled by the fields in which they differ; by those of `PLACES` where no others
    tell them apart."""
    configs = [config_files.read(folder).to_dict() for folder in folders]
    fields = differing_fields(configs, ignore=('seed', *PLACES))
    fields += swept_places(configs, fields)
    labels = dict(zip(fields, short_names(fields)))
    results = []
    for folder, config in zip(folders, configs):
        flat = config_files.flat_fields(config)
        setting = ', '.join(f'{labels[field]}={flat.get(field)}' for field in fields) or 'all'
        results.append(read(folder, setting, config.get('seed', 0), config, at))
    return results


def swept_places(configs: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    """The fewest of `PLACES` that, with `fields` and the seed, tell all runs apart; all that differ where none do.

    One that is another for every seed was not tried, but goes with the seed.
    """
    flat = [config_files.flat_fields(config) for config in configs]
    values = lambda names: [tuple(str(config.get(name)) for name in names) for config in flat]
    seeds = [seed for seed, in values(['seed'])]
    swept = [field for field in differing_fields(configs, ignore=('seed', 'workdir', *fields))
             if len(set(seeds)) == 1 or len(set(zip(values([field]), seeds))) > len(set(values([field])))]
    for count in range(len(swept)):
        for some in itertools.combinations(swept, count):
            if len(set(zip(values([*fields, *some]), seeds))) == len(configs):
                return list(some)
    return swept


def read(folder: pathlib.Path, setting: str, seed: int, config: dict[str, Any], at: int | None = None) -> Result:
    """The run in `folder`, which may not have begun; `at`: step by which its final values were measured."""
    metrics = folder / 'metrics.jsonl'
    rows = read_metrics(metrics) if metrics.exists() else []
    measured = []
    for row in read_evaluation(folder / EVALUATION):
        named = {f'{EVALUATED}{name}': value for name, value in row.items()
                 if name not in ('step', 'hours') and isinstance(value, (int, float))}
        measured.append(({'step': row['step']} if 'step' in row else {}) | named)
    num_steps = config.get('num_steps', 0)
    final: dict[str, float] = {}
    for row in rows + measured:
        if at is None or row.get('step', num_steps) <= at:
            final |= {name: value for name, value in row.items() if name != 'step' and not of_the_clock(name)
                      and value is not None}
    rows += [row for row in measured if 'step' in row]
    if is_finished(folder, num_steps):
        state = 'finished'
    elif not rows:
        state = 'not begun'
    else:
        state = f'at step {rows[-1]["step"]} of {num_steps}'
    if state != 'finished':
        state += f' ({error})' if (error := last_error(folder / LOG)) else ''
    return Result(setting, seed, str(folder), config, state, rows, final, read_json(folder / INTERPOLATION, []))


def read_evaluation(path: pathlib.Path) -> list[dict[str, Any]]:
    """What the measurement of a run wrote: one row, or with `--step=all` one a checkpoint, which has its `step`.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return []
    curve = read_metrics(path)
    return curve or [read_json(path, {})]


def of_the_clock(name: str) -> bool:
    """Whether a metric is a time, which no two runs have in common."""
    return 'seconds' in name or name == 'hours'


def read_json(path: pathlib.Path, default: Any) -> Any:
    """The content of `path`; `default` if it is not there.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: damaged ({error}); delete it and run the sweep again') from None

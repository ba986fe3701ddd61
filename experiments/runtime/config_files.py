"""Config files with overrides, and the config.json of a work directory."""
import ast
import contextlib
import difflib
import importlib.util
import inspect
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.runtime import checks, storage

log = logging.getLogger(__name__)

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]  # the folder of `experiments` and `configs`
OPEN = 'options'  # name of a group whose fields another field decides (the task, of `data.options`); its reader checks


class DamagedConfig(ValueError):
    """A work directory's config.json is not what was written."""


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """`get_config()` of a Python file, `FILE` or `FILE:ARG`, with `--config.field=value` overrides.

    A relative `FILE` that is not in the current folder is looked for beside the runner, and `configs` is the runner's
    own package even where the current folder has another of that name. In a group called `options` an override may
    name a field that the file leaves out.
    """
    config = _run_config_file(path)
    parsed: list[str] = []
    for override in overrides:
        name, _, value = override.removeprefix('--config.').partition('=')
        node, parents = config, 'config'
        for part in name.split('.'):
            if not isinstance(node, ml_collections.ConfigDict):
                raise ValueError(f'{parents} is a value, not a group; it has no field {part!r}')
            if parents.endswith(f'.{OPEN}') and part not in node:
                with node.unlocked():
                    node[part] = _literal(value)
                break
            checks.fields(parents, (part,), tuple(node))
            node, parents = node[part], f'{parents}.{part}'
        else:
            if isinstance(node, ml_collections.ConfigDict):
                raise ValueError(f'{parents} is a group; set one of its fields {sorted(node)}')
            parsed.append(override)
    values, argv = flags.FlagValues(), ['command', *parsed]
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(' '.join(str(error).strip('"').split())) from error
    return values.config


def check_command(config: ml_collections.ConfigDict, path: str, fields: Sequence[str]) -> None:
    """Raises a ValueError where the config of the file `path` lacks one of the `fields` that a command reads: it is
    another command's, the first that the file's docstring names."""
    missing = [name for name in fields if name not in config]
    if not missing:
        return
    text = ast.get_docstring(ast.parse(pathlib.Path(_find_config_file(path.partition(':')[0])).read_bytes())) or ''
    named = re.search(r'python -m experiments\.\w+(?: --which=\w+)?', text)
    theirs = 'python -m experiments.train' if 'experiment' in config else named and named[0]
    raise ValueError(f'--config={path} has no field {missing[0]!r}, which this command reads' +
                     (f'; it is for {theirs}' if theirs else ''))


def _literal(text: str) -> Any:
    """The number, truth value or tuple that `text` writes, else the text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, bool | int | float | str | tuple) else text


def _run_config_file(path: str) -> ml_collections.ConfigDict:
    file, colon, argument = path.partition(':')
    file = _find_config_file(file)
    # A module of its own each time: `config_flags` would run the file inside the module of the config before.
    spec = importlib.util.spec_from_file_location('config_file', file)
    if spec is None:
        raise ValueError(f'--config: {file} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        with _first_on_path(CHECKOUT):
            spec.loader.exec_module(module)
            get_config = getattr(module, 'get_config', None)
            if get_config:
                _check_name(get_config, path)
            config = get_config and (get_config(argument) if colon else get_config())
    except ValueError:
        raise
    except Exception as error:  # whatever a user's file may raise
        raise ValueError(f'--config={path}: {type(error).__name__}: {error}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f'--config={path}: the file has no get_config() that returns a ConfigDict')
    return config


def _check_name(get_config: Callable[..., Any], path: str) -> None:
    """Raises a ValueError where FILE:NAME has a name that `get_config` does not take, or lacks one that it wants."""
    _, colon, name = path.partition(':')
    kinds = inspect.Parameter
    takes = [x for x in inspect.signature(get_config).parameters.values() if x.kind is not kinds.VAR_KEYWORD]
    if colon and not takes:
        raise ValueError(f'--config={path}: this config has no sizes to choose among; leave out :{name}')
    if not colon and any(x.default is kinds.empty and x.kind is not kinds.VAR_POSITIONAL for x in takes):
        raise ValueError(f'--config={path}: give one of its names, as in {path}:NAME; a wrong one lists them')


def _find_config_file(file: str) -> str:
    """`file` in the current folder, or else beside the runner.

    Raises:
        ValueError: it is in neither; the message names the nearest file there is.
    """
    for folder in (pathlib.Path(), CHECKOUT):
        if (folder / file).is_file():
            return str(folder / file)
    parent = pathlib.Path(file).parent
    beside = [*parent.glob('*.py'), *(CHECKOUT / parent).glob('*.py')]
    present = {str(parent / path.name) for path in beside}
    near = difflib.get_close_matches(file, sorted(present), 1)
    raise ValueError(f'--config: no file {file}' + (f'; did you mean {near[0]}?' if near else ''))


@contextlib.contextmanager
def _first_on_path(folder: pathlib.Path) -> Iterator[None]:
    """Imports inside the block look into `folder` before anywhere else."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def save(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes `workdir/config.json`, from which sampling and evaluation rebuild the model."""
    workdir = storage.resolve(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    storage.write_json(workdir / 'config.json', config.to_dict())


def read(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """The config a run was started with.

    Raises:
        ValueError: `workdir` holds no run.
    """
    path = storage.resolve(workdir) / 'config.json'
    if not path.exists():
        raise ValueError(f'{workdir}: no config.json there; give the --workdir of a training run')
    try:
        fields = json.loads(path.read_text(), object_hook=_tuples)
        if not isinstance(fields, Mapping):
            raise ValueError(f'holds a {type(fields).__name__}')
        return ml_collections.ConfigDict(fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedConfig(f'{path}: damaged ({error}); the command that the run was started with writes it '
                            'anew') from None


def check_workdir(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
    """Raises a ValueError if `workdir` holds a run of another kind; warns of fields that have changed since."""
    if not (storage.resolve(workdir) / 'config.json').exists():
        return
    try:
        before = read(workdir)
    except DamagedConfig as error:
        log.warning('%s (this command does)', error)
        return
    if before.get('experiment') != config.experiment:
        raise ValueError(f'{workdir}: holds a run of experiment={before.get("experiment")!r}, not '
                         f'{config.experiment!r}; choose another --workdir')
    changed = changes(before, config)
    if changed:
        log.warning('%s: the config has changed since this run was started: %s', workdir, ', '.join(changed.values()))


def changes(before: ml_collections.ConfigDict, now: ml_collections.ConfigDict) -> dict[str, str]:
    """{dotted name: 'NAME (OLD -> NEW)'} of the fields that differ; one that is only in one of them is None there."""
    old, new = flat_fields(before.to_dict()), flat_fields(now.to_dict())
    return {name: f'{name} ({old.get(name)!r} -> {new.get(name)!r})' for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)}


def flat_fields(fields: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{dotted name: value} of the fields in all groups of `fields`."""
    out = {}
    for name, value in fields.items():
        out |= flat_fields(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _tuples(value: Any) -> Any:
    """JSON has no tuples; configs have no lists."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value

"""Command lines: flags, one `--config` file with overrides, one-line errors, and processes."""
import argparse
import contextlib
import difflib
import importlib.util
import json
import logging
import os
import pathlib
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.runtime import processes, storage
from experiments.runtime.signals import Stopped, signals

log = logging.getLogger(__name__)

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]  # the folder of `experiments` and `configs`
NOTHING_WRITTEN = 'nothing was written; run the same command again'  # for `main`'s `stopped`
# What a user can mend; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, flags.Error)


class DamagedConfig(ValueError):
    """A work directory's config.json is not what was written."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        kind, _, rest = message.partition('unrecognized arguments: ')
        if not kind and rest.startswith('-'):
            given = rest.split()[0].split('=')[0]
            near = difflib.get_close_matches(given, self._option_string_actions, 1)
            message = f'{given} is not a flag' + (f'; did you mean {near[0]}?' if near else '')
        raise ValueError(f'{message} (--help lists the flags)')


def parser(description: str, *, config: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags every command has. `config`: help of `--config`, for commands that take one."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if config:
        p.add_argument('--config', metavar='FILE[:ARG]', help=config + '; override any field with --config.FIELD=VALUE')
    p.add_argument('--traceback', action='store_true', help='show where an error was raised')
    processes.add_flags(p)
    p.add_argument('--compilation_cache', metavar='DIR', default=os.environ.get('JAX_COMPILATION_CACHE_DIR'),
                   help='keep compiled programs here between runs; they are run as they lie there, so let nobody else '
                        'write to it')
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None, *,
          default_config: str | Callable[[argparse.Namespace], str] | None = None,
          optional: bool = False) -> tuple[argparse.Namespace, ml_collections.ConfigDict | None]:
    """Parses flags and, where the command has `--config`, loads the file and applies its overrides.

    `optional`: a command line without any config gives None.

    Raises:
        ValueError: missing file, unknown field (with the nearest name) or a value of the wrong type.
    """
    overrides, rest = [], []
    for arg in sys.argv[1:] if argv is None else argv:
        if overrides and '=' not in overrides[-1] and not arg.startswith('-'):
            overrides[-1] += f'={arg}'  # --config.field value
        else:
            (overrides if arg.startswith('--config.') else rest).append(arg)
    args = p.parse_args(rest)
    if not hasattr(args, 'config'):
        if overrides:
            p.error(f'{overrides[0]}: this command has no --config')
        return args, None
    path = args.config or (default_config(args) if callable(default_config) else default_config)
    if path is None and optional and not overrides:
        return args, None
    if path is None:
        raise ValueError('--config is missing: give a file such as configs/dlc/encoder_digits.py')
    return args, load_config(path, overrides)


def given(flag: str) -> bool:
    """Whether the command line has `flag`, with a value or without."""
    return any(arg == flag or arg.startswith(f'{flag}=') for arg in sys.argv[1:])


def load_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """`get_config()` of a Python file, `FILE` or `FILE:ARG`, with `--config.field=value` overrides.

    A relative `FILE` that is not in the current folder is looked for beside the runner, and `configs` is the runner's
    own package even where the current folder has another of that name.
    """
    config = _run_config_file(path)
    for override in overrides:
        name = override.split('=', 1)[0].removeprefix('--config.')
        node, parents = config, 'config'
        for part in name.split('.'):
            if not isinstance(node, ml_collections.ConfigDict):
                raise ValueError(f'{parents} is a value, not a group; it has no field {part!r}')
            check_fields(parents, (part,), tuple(node))
            node, parents = node[part], f'{parents}.{part}'
        if isinstance(node, ml_collections.ConfigDict):
            raise ValueError(f'{parents} is a group; set one of its fields {sorted(node)}')
    values, argv = flags.FlagValues(), ['command', *overrides]
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(' '.join(str(error).strip('"').split())) from error
    return values.config


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
            config = get_config and (get_config(argument) if colon else get_config())
    except ValueError:
        raise
    except Exception as error:  # whatever a user's file may raise
        raise ValueError(f'--config={path}: {type(error).__name__}: {error}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f'--config={path}: the file has no get_config() that returns a ConfigDict')
    return config


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


def shares(flag: str, text: str) -> tuple[float, ...]:
    """Shares between 0 and 1, with commas.

    Raises:
        ValueError: something else.
    """
    try:
        values = tuple(float(value) for value in text.split(',')) if text else ()
    except ValueError:
        raise ValueError(f'{flag}={text}: numbers with commas between, such as 0,0.5,1') from None
    if any(not 0 <= value <= 1 for value in values) or len(set(values)) < len(values):
        raise ValueError(f'{flag}={text}: shares of the way from start to end, between 0 and 1, each once')
    return values


def check_choice(name: str, given: str, choices: Iterable[str]) -> None:
    """Raises a ValueError with the nearest choice where the field `name` holds none of `choices`."""
    choices = tuple(choices)
    if given not in choices:
        near = difflib.get_close_matches(str(given), choices, 1)
        raise ValueError(f'{name}={given!r} is not one of {choices}' + (f'; did you mean {near[0]!r}?' if near else ''))


def check_fields(name: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    """Raises a ValueError with the nearest allowed name for the first key of `given` that is not allowed."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, list(allowed), 1)
            raise ValueError(f'{name}.{key} is not a field' + (f'; did you mean {name}.{near[0]}?' if near else
                                                                f'; the fields are {sorted(allowed)}'))


def save_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes `workdir/config.json`, from which sampling and evaluation rebuild the model."""
    workdir = storage.resolve(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    storage.write_json(workdir / 'config.json', config.to_dict())


def read_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
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
        before = read_config(workdir)
    except DamagedConfig as error:
        log.warning('%s (this command does)', error)
        return
    before, now = (flat_fields(c.to_dict()) for c in (before, config))
    if before.get('experiment') != now['experiment']:
        raise ValueError(f'{workdir}: holds a run of experiment={before.get("experiment")!r}, not '
                         f'{now["experiment"]!r}; choose another --workdir')
    changed = [f'{name} ({before.get(name)!r} -> {now.get(name)!r})' for name in sorted(before.keys() | now.keys())
               if before.get(name) != now.get(name)]
    if changed:
        log.warning('%s: the config has changed since this run was started: %s', workdir, ', '.join(changed))


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


def log_to_stderr() -> None:
    """Shows this project's messages from INFO on, a line each; those of other libraries from WARNING, or ERROR, on."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:  # Orbax's imports put one there, at WARNING; a test's are subclasses
            root.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(levelname).1s %(message)s'))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for project in ('__main__', 'experiments', 'dlc_jax', 'rlhf_jax'):
        logging.getLogger(project).setLevel(logging.INFO)
    logging.getLogger('jax._src').setLevel(logging.ERROR)
    for noisy in ('absl', 'orbax'):  # they log the traceback of every exception that is reported here in one line
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


def main(command: Callable[[], None], *, stopped: str = 'run the same command to continue',
         status: int | None = 0) -> None:
    """Runs a command: a user's error becomes one line and exit status 2, a signal a line too.

    Args:
        command: reads `sys.argv`.
        stopped: what to tell somebody who stopped it by a signal.
        status: exit status then. None: 128 + the signal's number, for commands that have nothing to show for it.
    """
    log_to_stderr()
    try:
        with signals.watched(), processes.watched(), signals.raising(stopped, status):
            command()
    except Stopped as stop:
        print(stop.message, file=sys.stderr)
        raise
    except USER_ERRORS as error:
        if '--traceback' in sys.argv:
            traceback.print_exc()
        line = ' '.join(str(error).split())
        print(f'error: {line}', file=sys.stderr)
        processes.fail(line, 2)
    except Exception as error:  # a defect of ours: it keeps its traceback, and the other processes end with it
        if processes.alone():
            raise
        traceback.print_exc()
        processes.fail(' '.join(f'{type(error).__name__}: {error}'.split()), 1)


def initialize(args: argparse.Namespace) -> None:
    """Joins the job's processes and sets up the compilation cache. Before anything touches a device."""
    if jax.config.jax_num_cpu_devices > 1:
        # With XLA's default of one thread a device, the devices' collectives can lock each other out (jax 0.10.2).
        os.environ.setdefault('PJRT_NPROC', str(4 * jax.config.jax_num_cpu_devices))
    processes.join(args)
    if not args.compilation_cache:
        return
    if jax.default_backend() == 'cpu' and jax.device_count() > 1:
        # Seen with jax 0.10.2: read back, a sharded program hung, its devices waiting in different collectives.
        log.warning('--compilation_cache is left off: programs for several CPU devices may hang when read back')
        jax.config.update('jax_compilation_cache_dir', None)
        return
    place = pathlib.Path(args.compilation_cache)
    if place.is_dir() and place.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning('--compilation_cache=%s: others can write there, and the programs in it are run; keep it to '
                    'yourself (chmod go-w)', place)
    jax.config.update('jax_compilation_cache_dir', args.compilation_cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def check_alone(command: str) -> None:
    """Raises a ValueError in a job of several processes, of which `command`, once joined, has no use."""
    if jax.process_count() > 1:
        raise ValueError(f'{command} runs in one process, here are {jax.process_count()}; start it once, without '
                         '--distributed')

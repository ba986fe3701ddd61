"""Command lines: flags, one `--config` file with overrides, one-line errors, and processes."""
import argparse
import difflib
import json
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.runtime.loop import Stopped

log = logging.getLogger(__name__)

# What a user can mend; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, flags.Error)


def parser(description: str, *, config: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags every command has. `config`: help of `--config`, for commands that take one."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if config:
        p.add_argument('--config', metavar='FILE[:ARG]', help=config + '; override any field with --config.FIELD=VALUE')
    p.add_argument('--traceback', action='store_true', help='show where an error was raised')
    p.add_argument('--distributed', action='store_true',
                   help='join the other processes of this job (TPU pod, SLURM, GKE or Open MPI are detected)')
    p.add_argument('--compilation_cache', metavar='DIR', default=os.environ.get('JAX_COMPILATION_CACHE_DIR'),
                   help='keep compiled programs here between runs')
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None, *,
          default_config: str | None = None) -> tuple[argparse.Namespace, ml_collections.ConfigDict | None]:
    """Parses flags and, where the command has `--config`, loads the file and applies its overrides.

    Raises:
        ValueError: missing file, unknown field (with the nearest name) or a value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides = [a for a in argv if a.startswith('--config.')]
    args = p.parse_args([a for a in argv if a not in overrides])
    if not hasattr(args, 'config'):
        if overrides:
            p.error(f'unrecognized arguments: {overrides[0]}')
        return args, None
    path = args.config or default_config
    if path is None:
        raise ValueError('--config is missing: give a file such as configs/dlc/encoder_digits.py')
    return args, load_config(path, overrides)


def load_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """`get_config()` of a Python file, `FILE` or `FILE:ARG`, with `--config.field=value` overrides."""
    file = path.split(':', 1)[0]
    if not pathlib.Path(file).is_file():
        folder = pathlib.Path(file).parent
        near = difflib.get_close_matches(file, [str(f) for f in folder.glob('*.py')] if folder.is_dir() else [], 1)
        raise ValueError(f'--config: no file {file}' + (f'; did you mean {near[0]}?' if near else ''))
    config = _parse_config([f'--config={path}'])
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
    return _parse_config([f'--config={path}', *overrides])


def _parse_config(argv: list[str]) -> ml_collections.ConfigDict:
    values = flags.FlagValues()
    argv = ['command', *argv]
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(' '.join(str(error).strip('"').split())) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f'{argv[1]}: the file has no get_config() that returns a ConfigDict')
    return config


def check_fields(name: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    """Raises a ValueError with the nearest allowed name for the first key of `given` that is not allowed."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, list(allowed), 1)
            raise ValueError(f'{name}.{key} is not a field' + (f'; did you mean {name}.{near[0]}?' if near else
                                                                f'; the fields are {sorted(allowed)}'))


def save_config(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Writes `workdir/config.json`, from which sampling and evaluation rebuild the model."""
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'config.json').write_text(json.dumps(config.to_dict(), indent=1) + '\n')


def read_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config a run was started with.

    Raises:
        ValueError: `workdir` holds no run.
    """
    path = pathlib.Path(workdir) / 'config.json'
    if not path.is_file():
        raise ValueError(f'{workdir}: no config.json there; give the --workdir of a training run')
    return ml_collections.ConfigDict(json.loads(path.read_text(), object_hook=_tuples))


def _tuples(value: Any) -> Any:
    """JSON has no tuples; configs have no lists."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def main(command: Callable[[], None]) -> None:
    """Runs a command: a user's error becomes one line and exit status 2, a signal a line and status 0."""
    logging.basicConfig(level=logging.INFO, format='%(levelname).1s %(message)s')
    for noisy in ('absl', 'orbax', 'jax._src', 'tensorboardX'):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        command()
    except Stopped as stop:
        print(stop.message, file=sys.stderr)
        raise
    except USER_ERRORS as error:
        if '--traceback' in sys.argv:
            traceback.print_exc()
        print('error: ' + ' '.join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def initialize(args: argparse.Namespace) -> None:
    """Joins the job's processes and sets up the compilation cache. Before anything touches a device."""
    if args.distributed:
        jax.distributed.initialize()
    if args.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', args.compilation_cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

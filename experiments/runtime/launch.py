"""Command lines: flags, one-line errors, and processes."""
import argparse
import contextlib
import difflib
import logging
import os
import pathlib
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
import ml_collections
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from experiments.runtime import config_files, heap, processes
from experiments.runtime.signals import Stopped, signals

log = logging.getLogger(__name__)

LEAST_SECONDS = 0.5  # programs that take less to compile are not kept

NOTHING_WRITTEN = 'nothing was written; run the same command again'  # for `main`'s `stopped`
NOT_MEASURED = 'not everything is measured; run the same command again'  # the same, of one that may go on
# What a user can mend; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, flags.Error)


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
          default_config: str | Callable[[argparse.Namespace], str] | None = None, optional: bool = False,
          fields: Sequence[str] | Callable[[argparse.Namespace], Sequence[str]] = ('experiment',)
          ) -> tuple[argparse.Namespace, ml_collections.ConfigDict | None]:
    """Parses flags and, where the command has `--config`, loads the file and applies its overrides.

    Args:
        optional: a command line without any config gives None.
        fields: of the config, by which one for this command is told from those of others.

    Raises:
        ValueError: missing file, unknown field (with the nearest name), a value of the wrong type, or the config of
            another command.
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
    config = config_files.load(path, overrides)
    config_files.check_command(config, path, fields(args) if callable(fields) else fields)
    return args, config


def given(flag: str) -> bool:
    """Whether the command line has `flag`, with a value or without."""
    return any(arg == flag or arg.startswith(f'{flag}=') for arg in sys.argv[1:])


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
    """Joins the job's processes and sets up memory on CPUs and the compilation cache. Before anything touches a
    device."""
    if jax.config.jax_num_cpu_devices > 1:
        # With XLA's default of one thread a device, the devices' collectives can lock each other out (jax 0.10.2).
        os.environ.setdefault('PJRT_NPROC', str(4 * jax.config.jax_num_cpu_devices))
    processes.join(args)
    if jax.default_backend() == 'cpu':
        heap.keep()
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
    _keep_programs(args.compilation_cache)


@contextlib.contextmanager
def equal_programs_once() -> Iterator[None]:
    """Compiles a program once, however many stages of this process build it anew: until the end they are kept in a
    temporary folder, or where --compilation_cache says."""
    several_cpus = jax.default_backend() == 'cpu' and jax.device_count() > 1  # see `initialize`
    if jax.config.jax_compilation_cache_dir or several_cpus:
        yield
        return
    with tempfile.TemporaryDirectory(prefix='programs_') as folder:
        _keep_programs(folder)
        try:
            yield
        finally:
            _keep_programs(None)


def _keep_programs(folder: str | None) -> None:
    """From here on; JAX decides at its first program whether it keeps any, unless it is reset."""
    compilation_cache.reset_cache()
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', LEAST_SECONDS)


def check_alone(command: str) -> None:
    """Raises a ValueError in a job of several processes, of which `command`, once joined, has no use."""
    if jax.process_count() > 1:
        raise ValueError(f'{command} runs in one process, here are {jax.process_count()}; start it once, without '
                         '--distributed')

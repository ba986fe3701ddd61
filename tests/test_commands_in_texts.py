"""The commands that README, docs and docstrings show can be typed: every flag, config and field in them is there."""
import importlib
import pathlib
import re
import shlex

import pytest

from experiments import sweep
from experiments.runtime import launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXTS = sorted(path for pattern in ('README.md', 'docs/*.md', 'configs/*/*.py', 'experiments/*.py')
               for path in ROOT.glob(pattern))
# Something is left to the reader.
UNFINISHED = re.compile(r'…|\.\.\.|\$[A-Z{(]|\[--|config=FILE|name=NAME|(=W|=STEPS|:[A-Z]+|FLAGS)\b')
# Without a work directory.
IN_A_SENTENCE = re.compile(r'`((?:lewis|mixture|quickstart|sweep|train(?= --config=)) --[^`]+)`')


def commands(text):
    """argv of each `python -m experiments.COMMAND` that begins a line, behind whose backslashes it goes on, and of the
    commands that sentences and tables name."""
    text = re.sub(r'\\+\n', ' ', text)
    for line in re.findall(r'^[ "]*python -m experiments\.(.+)$', text, re.MULTILINE):
        line = re.split(r' [&>] |  +\(', line)[0]
        if not UNFINISHED.search(line):
            yield shlex.split(line.replace("$'", "'"), comments=True)
    for line in IN_A_SENTENCE.findall(text):
        if not UNFINISHED.search(line):
            yield [*shlex.split(line), *(['--workdir=run'] if '--workdir' not in line else [])]


FOUND = [pytest.param(argv, id=f'{path.relative_to(ROOT)}-{number}') for path in TEXTS
         for number, argv in enumerate(commands(path.read_text()))]


def test_commands_are_found():
    text = """Type
    python -m experiments.train --config=a.py:L8 --workdir=runs/a \\\\
        --config.x='1, 2'     # a minute
python -m experiments.sweep --name=tldr --script=slurm > sweep.sbatch
python -m experiments.train --config=FILE --workdir=DIR
or `mixture --config.y=2`, `sweep --name=…` and `--z`."""
    assert list(commands(text)) == [
        ['train', '--config=a.py:L8', '--workdir=runs/a', '--config.x=1, 2'],
        ['sweep', '--name=tldr', '--script=slurm'], ['mixture', '--config.y=2', '--workdir=run']]
    assert len(FOUND) > 150


class Parsed(Exception):
    """The command line has been read."""


@pytest.mark.parametrize('argv', FOUND)
def test_command_is_understood(argv, monkeypatch, tmp_path):
    command, *flags = argv
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', [command, *flags])

    def then_stop(function):
        def stopped(*args, **kwargs):
            function(*args, **kwargs)
            raise Parsed
        return stopped
    monkeypatch.setattr(launch, 'parse', then_stop(launch.parse))
    monkeypatch.setattr(sweep.plan, 'runs_of', then_stop(sweep.plan.runs_of))
    monkeypatch.setattr(sweep, 'write_report', then_stop(lambda *args: None))
    with pytest.raises(Parsed):
        importlib.import_module(f'experiments.{command}').main()

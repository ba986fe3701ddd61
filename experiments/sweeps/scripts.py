"""A sweep as a job of a cluster: SLURM's array, or JobSets. Both are the files of `experiments/launch`, with the runs'
commands in them."""
import json
import re
import shlex
from collections.abc import Sequence

from experiments.runtime import config_files
from experiments.sweeps.plan import Run

LAUNCH = config_files.CHECKOUT / 'experiments' / 'launch'


def slurm(runs: Sequence[Run], workdir: str) -> str:
    """`slurm.sbatch` as an array with one task a run; each is requeued and continued as a run of its own."""
    head, marker, body = (LAUNCH / 'slurm.sbatch').read_text().partition('set -uo pipefail\n')
    settings = [line for line in head.splitlines() if line.startswith('#SBATCH') and '--output' not in line]
    cases = [f'  {i}) set -- {shlex.join(flags_of(run, workdir))} ;;' for i, run in enumerate(runs)]
    return '\n'.join(['#!/bin/bash', f'# A sweep of {len(runs)} runs, from the root of the checkout: sbatch THIS_FILE',
                      *settings, '#SBATCH --output=%x-%A_%a.log', f'#SBATCH --array=0-{len(runs) - 1}', '',
                      'case $SLURM_ARRAY_TASK_ID in', *cases, 'esac', '', marker + body])


def jobset(runs: Sequence[Run], workdir: str, name: str = 'sweep') -> str:
    """`gke_jobset.yaml` once a run, `NAME-0`, `NAME-1`, …: change image and slice in the output."""
    template = (LAUNCH / 'gke_jobset.yaml').read_text()
    documents = []
    for i, run in enumerate(runs):
        text = template.replace('\n  name: dlc\n', f'\n  name: {name}-{i}\n')
        flags = re.compile(r'^( *)- --config=.*\n(?: *- --[\w.]+=.*\n)*', re.MULTILINE)
        indent = flags.search(text).group(1)
        lines = ''.join(f'{indent}- {json.dumps(flag)}\n' for flag in flags_of(run, workdir))
        documents.append(flags.sub(lambda _, lines=lines: lines, text))
    return '---\n'.join(documents)


def commands(runs: Sequence[Run], workdir: str) -> str:
    """One command a line, for anything else."""
    return ''.join(f'python -m experiments.train {shlex.join(flags_of(run, workdir))}\n' for run in runs)


def flags_of(run: Run, workdir: str) -> tuple[str, ...]:
    return (*run.flags, f'--workdir={workdir.rstrip("/")}/{run.name}')


SCRIPTS = {'slurm': slurm, 'jobset': jobset, 'commands': commands}

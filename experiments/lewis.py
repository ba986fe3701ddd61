"""Elastic Reset and what it has to beat, on the Lewis game:

    python -m experiments.lewis                     # a minute on one core; runs/lewis/report.html, metrics.json

Interrupt it anywhere and run it again: it continues and ends with the same numbers.
"""
import json
import pathlib

from experiments.rlhf.lewis.comparison import compare
from experiments.rlhf.lewis.report import write_section
from experiments.rlhf.lewis.summary import TASK
from experiments.runtime import launch, report, storage


def main() -> None:
    p = launch.parser(__doc__, config='game, budget and methods (default: configs/rlhf/lewis.py)')
    p.add_argument('--workdir', default='runs/lewis')
    args, config = launch.parse(p, default_config='configs/rlhf/lewis.py', fields=('game', 'methods'))
    launch.initialize(args)
    launch.check_alone('experiments.lewis')
    comparison = compare(config, args.workdir)
    workdir = pathlib.Path(args.workdir)
    with storage.write_whole(workdir / 'metrics.json') as file:
        file.write((json.dumps(comparison.metrics, indent=1) + '\n').encode())
    page = report.Report('Elastic Reset on the Lewis game', 'Every number on this page was measured in this run.')
    write_section(page, config, comparison)
    page.save(workdir / 'report.html')
    for name, row in comparison.metrics['methods'].items():
        print(f'{name:52s} communication {row[TASK]:.3f}   language {row["held_out_language"]:.3f}   '
              f'KL {row["kl"]:6.2f}')
    print(f'report -> {workdir / "report.html"}')


if __name__ == '__main__':
    launch.main(main)

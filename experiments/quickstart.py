"""A whole method from nothing to a report, in minutes on a laptop:

    python -m experiments.quickstart                       # Discrete Latent Codes on handwritten digits
    python -m experiments.quickstart --which=rlhf          # asynchronous RLHF on arithmetic, Elastic Reset on a game

Results in report.html and metrics.json of the work directory. Interrupt it anywhere and run it again: it continues and
ends with the same numbers.
"""
import importlib
import pathlib

from experiments.runtime import launch

WHICH = {'dlc': 'runs/quickstart', 'rlhf': 'runs/quickstart_rlhf'}


def main() -> None:
    p = launch.parser(__doc__, config='sizes and budgets (default: configs/WHICH/quickstart.py)')
    p.add_argument('--which', choices=tuple(WHICH), default='dlc', help='which half (default: dlc)')
    p.add_argument('--workdir', help='default: ' + ', '.join(WHICH.values()))
    args, config = launch.parse(p, default_config=lambda args: f'configs/{args.which}/quickstart.py')
    launch.initialize(args)
    half = importlib.import_module(f'experiments.{args.which}.quickstart')
    workdir = args.workdir or WHICH[args.which]
    print(half.summary(half.quickstart(config, workdir)))
    print(f'report -> {pathlib.Path(workdir) / "report.html"}')


if __name__ == '__main__':
    launch.main(main)

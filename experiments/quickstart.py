"""A whole method from nothing to a report, in minutes on a laptop:

    python -m experiments.quickstart                       # Discrete Latent Codes on handwritten digits
    python -m experiments.quickstart --which=text          # text to image on pairs of handwritten digits
    python -m experiments.quickstart --which=rlhf          # asynchronous RLHF on arithmetic, Elastic Reset on a game

Results in report.html and metrics.json of the work directory. Interrupt it anywhere and run it again: it continues and
ends with the same numbers.
"""
import importlib
import pathlib

from experiments.runtime import launch

WHICH = {'dlc': 'dlc/quickstart', 'text': 'dlc/quickstart_text', 'rlhf': 'rlhf/quickstart'}
WORKDIRS = {'dlc': 'runs/quickstart', 'text': 'runs/quickstart_text', 'rlhf': 'runs/quickstart_rlhf'}


def main() -> None:
    p = launch.parser(__doc__, config='sizes and budgets (default: configs/dlc/quickstart.py, or that of --which)')
    p.add_argument('--which', choices=tuple(WHICH), default='dlc', help='which method (default: dlc)')
    p.add_argument('--workdir', help='default: ' + ', '.join(WORKDIRS.values()))
    args, config = launch.parse(p, default_config=lambda args: f'configs/{WHICH[args.which]}.py')
    launch.initialize(args)
    method = importlib.import_module(f'experiments.{WHICH[args.which].replace("/", ".")}')
    workdir = args.workdir or WORKDIRS[args.which]
    print(method.summary(method.quickstart(config, workdir)))
    print(f'report -> {pathlib.Path(workdir) / "report.html"}')


if __name__ == '__main__':
    launch.main(main)

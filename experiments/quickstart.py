"""A whole method from nothing to a report, in minutes on a laptop:

    python -m experiments.quickstart                       # Discrete Latent Codes on handwritten digits
    python -m experiments.quickstart --config=configs/dlc/quickstart.py:fashion_mnist \\
        --config.encoder.data.path=FILE.npz                # the same on pictures from a file; also :cifar10
    python -m experiments.quickstart --which=text          # text to image on pairs of handwritten digits
    python -m experiments.quickstart --which=align         # the same improved by a reward on the pictures
    python -m experiments.quickstart --which=rlhf          # asynchronous RLHF on arithmetic, Elastic Reset on a game

Results in report.html and metrics.json of the work directory. Interrupt it anywhere and run it again: it continues and
ends with the same numbers.
"""
import importlib
import pathlib
from typing import NamedTuple

from experiments.runtime import launch


class Quickstart(NamedTuple):
    """A module of `experiments.quickstarts`, its config below configs/, fields that no other's has, and where it works
    unless --workdir says."""
    module: str
    config: str
    fields: tuple[str, ...]
    workdir: str


WHICH = {'dlc': Quickstart('dlc', 'dlc/quickstart', ('generators',), 'runs/quickstart'),
         'text': Quickstart('text_to_image', 'dlc/quickstart_text', ('text_to_code',), 'runs/quickstart_text'),
         'align': Quickstart('align', 'dlc/quickstart_align', ('text_to_image',), 'runs/quickstart_align'),
         'rlhf': Quickstart('rlhf', 'rlhf/quickstart', ('sft', 'lewis'), 'runs/quickstart_rlhf')}


def main() -> None:
    p = launch.parser(__doc__, config='sizes and budgets (default: configs/dlc/quickstart.py, or that of --which)')
    p.add_argument('--which', choices=tuple(WHICH), default='dlc', help='which method (default: dlc)')
    p.add_argument('--workdir', help='default: ' + ', '.join(which.workdir for which in WHICH.values()))
    args, config = launch.parse(p, default_config=lambda args: f'configs/{WHICH[args.which].config}.py',
                                fields=lambda args: WHICH[args.which].fields)
    launch.initialize(args)
    launch.check_alone('experiments.quickstart')
    chosen = WHICH[args.which]
    quickstart = importlib.import_module(f'experiments.quickstarts.{chosen.module}')
    workdir = args.workdir or chosen.workdir
    with launch.equal_programs_once():
        print(quickstart.summary(quickstart.run(config, workdir)))
    print(f'report -> {pathlib.Path(workdir) / "report.html"}')


if __name__ == '__main__':
    launch.main(main)

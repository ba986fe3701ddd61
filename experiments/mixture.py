"""Diffusion on more and more modes, without a condition and on the index of the mode (arXiv 2507.12318 figure 2):

    python -m experiments.mixture                     # on a CPU; runs/mixture/report.html, metrics.json

Interrupt it anywhere and run it again: it continues and ends with the same numbers.
"""
import pathlib

import numpy as np

from experiments.dlc.mixture import CONDITIONS, Mixture, compare
from experiments.runtime import launch, report

NAMES = {'none': 'without a condition', 'index': 'on the index of the mode', 'floor': 'exact draws'}


def main() -> None:
    p = launch.parser(__doc__, config='mixtures and budget (default: configs/dlc/mixture.py)')
    p.add_argument('--workdir', default='runs/mixture')
    args, config = launch.parse(p, default_config='configs/dlc/mixture.py', fields=('modes',))
    launch.initialize(args)
    launch.check_alone('experiments.mixture')
    metrics = compare(config, args.workdir)
    page = report.Report('Diffusion on a mixture of Gaussians', 'Every number on this page was measured in this run. '
                         f'± is the standard deviation over {len(config.seeds)} seeds.')
    page.lines({NAMES[name]: ([int(modes) for modes in rows], [row['kl'] for row in rows.values()])
                for name, rows in metrics.items()}, 'KL(mixture || samples)', x='modes', y='nats', log_y=True)
    table = [{'': NAMES[name]} | {f'{modes} modes': report.with_spread(row['kl'], row['kl_std'])
                                  for modes, row in rows.items()} for name, rows in metrics.items()]
    page.table(table)
    workdir, most = pathlib.Path(args.workdir), max(config.modes)
    centers = Mixture(most, config.variance, config.spacing).centers
    for name in CONDITIONS:
        with np.load(workdir / f'{name}_{most}.npz') as found:
            points = found['samples'][0, :2000]
        page.lines({'samples': (points[:, 0], points[:, 1]), 'centres': (centers[:, 0], centers[:, 1])},
                   f'samples of {most} modes {NAMES[name]}, first seed', x='', styles={'samples': ',', 'centres': '+'})
    page.save(workdir / 'report.html')
    print(report.markdown(table))
    print(f'report -> {workdir / "report.html"}')


if __name__ == '__main__':
    launch.main(main)

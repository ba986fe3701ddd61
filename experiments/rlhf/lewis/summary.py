"""What the runs on the Lewis game are worth: means over seeds, and gains over what costs nothing but a coefficient."""
from typing import Any

import ml_collections
import numpy as np

from experiments.rlhf.lewis.runs import Run
from experiments.runtime.statistics import front_height, paired_difference, spread

SIDES = {'before': 'before_reset_', 'after': ''}  # of the reset at the end of the run -> prefix in a history
TASK = 'held_out_communication'
# What a method may be charged with -> from a history, with the prefix of its side.
DRIFTS = {'kl': lambda run, side: run[f'{side}kl'], 'language': lambda run, side: 1 - run[f'{side}held_out_language']}

History = dict[str, np.ndarray]  # metric -> [seeds, log points], as `lewis.advance` returns it


def summarize(config: ml_collections.ConfigDict, histories: dict[Run, History],
              interpolation: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything in `metrics.json`; `x` and `x_std` are mean and standard deviation over seeds.

    `methods`: at the end of each run; of resetting methods, `before` and `after` the reset there, and `lowest` and
    `highest` over the last period, the envelope of the saw-tooth. `gains`: held-out communication beyond the fronts of
    `fronts` at the same drift, paired by seed: mean, deviation, `low` and `high` ends of a bootstrap interval, and at
    how many of the seeds it is above.
    """
    algorithm = config.training.method
    methods = {'pretrained': spread(start)}
    for run, history in histories.items():
        label = run.label(algorithm)
        per_period = config.elastic.period // config.training.log_every
        for suffix, side in run.sides.items():
            prefix = SIDES[side]
            row = {name: history[prefix + name][:, -1] for name in start}
            if run.method not in ('fixed_reference', 'reference_reset', 'imitation'):
                row['kept'] = history['kept'][:, -1]
            if run.resets:
                both = np.concatenate([history[p + TASK][:, -per_period:] for p in SIDES.values()], 1)
                row |= {'lowest': both.min(1), 'highest': both.max(1)}
            methods[label + suffix] = spread(row)
    for i, alpha in enumerate(config.alphas):
        methods[f'interpolation, α {alpha:g}'] = spread({name: x[:, i] for name, x in interpolation.items()})

    gains = {}
    for drift in DRIFTS:
        lines = fronts(histories, interpolation, start, drift)
        for run, history in histories.items():
            if run.method == 'fixed_reference':
                continue
            for suffix, side in run.sides.items():
                prefix = SIDES[side]
                row = gains.setdefault(run.label(algorithm) + suffix, {})
                x, y = DRIFTS[drift](history, prefix)[:, -1], history[prefix + TASK][:, -1]
                for name, (xs, ys) in lines.items():
                    heights = np.array([front_height(xs[s], ys[s], x[s]) for s in range(len(x))])
                    gain = paired_difference(y, heights)
                    row |= {f'{name}_at_{drift}': gain.mean, f'{name}_at_{drift}_std': gain.std,
                            f'{name}_at_{drift}_low': gain.low, f'{name}_at_{drift}_high': gain.high,
                            f'{name}_at_{drift}_above': gain.above}
    return {'seeds': len(config.seeds), 'methods': methods, 'gains': gains}


def fronts(histories: dict[Run, History], interpolation: dict[str, np.ndarray], start: dict[str, np.ndarray],
           drift: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What costs nothing but a coefficient: name -> drift and task, [seeds, points] each.

    `kl_front`: the ends of the runs with each KL coefficient, in their order, then the pretrained agents;
    `interpolation`: every alpha; `early_stopping`: the pretrained agents, then every log point of the plain run.
    """
    measure = lambda arrays: (DRIFTS[drift](arrays, ''), arrays[TASK])
    first = tuple(x[:, None] for x in measure(start))
    penalised = [run for run in histories if run.method == 'fixed_reference']
    plain = next(run for run in penalised if run.plain)
    ends = {name: np.stack([histories[run][name][:, -1] for run in penalised], 1) for name in start}
    joined = lambda *parts: tuple(np.concatenate(pair, 1) for pair in zip(*parts))
    return {'kl_front': joined(measure(ends), first), 'interpolation': measure(interpolation),
            'early_stopping': joined(first, measure(histories[plain]))}

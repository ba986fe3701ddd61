"""The comparison on the Lewis game as a section of a report: the trade-off as pictures and tables, and curves."""
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from experiments.rlhf.lewis.comparison import Comparison
from experiments.rlhf.lewis.runs import ALGORITHMS, METHODS, Run
from experiments.rlhf.lewis.summary import DRIFTS, SIDES, TASK, History, fronts
from experiments.runtime import report

FRONTS = {'kl_front': 'the KL penalties', 'interpolation': 'interpolation', 'early_stopping': 'early stopping'}


def write_section(page: report.Report, config: ml_collections.ConfigDict, comparison: Comparison) -> None:
    """Adds to `page` the trade-off as pictures and tables, and curves."""
    algorithm, seeds = config.training.method, len(config.seeds)
    histories, metrics = comparison.histories, comparison.metrics
    chosen = _shown(histories)
    page.text(f'{ALGORITHMS[algorithm]}, {config.training.num_steps} steps, a reset every {config.elastic.period}; '
              f'means over {seeds} seeds, ± the standard deviation over them. Communication (the task): share of '
              'properties the listener gets right from the speaker. Language: share of symbols the speaker takes from '
              'the given language. Both of greedy agents on held-out objects unless it says otherwise. KL: of whole '
              'messages, to the pretrained speaker, in nats.')
    for drift, x_label in (('kl', 'KL to the initial policy'), ('language', '1 - language accuracy')):
        curves, styles = {}, {}
        for name, (xs, ys) in fronts(histories, comparison.interpolation, comparison.start, drift).items():
            curves[FRONTS[name]] = xs.mean(0), ys.mean(0)
            styles[FRONTS[name]] = {'kl_front': 'o--', 'interpolation': 's--', 'early_stopping': ':'}[name]
        for run in chosen:
            history, label = histories[run], run.label(algorithm)
            sides = SIDES.values() if run.resets else ('',)
            saw = lambda get: np.stack([get(prefix).mean(0) for prefix in sides], 1).ravel()
            xs, ys = saw(lambda p: DRIFTS[drift](history, p)), saw(lambda p: history[p + TASK])
            curves[label] = (xs, ys) if run.resets else (xs[-1:], ys[-1:])
            styles[label] = '-' if run.resets else '^'
        page.lines(curves, 'task against drift: fronts (dashed), whole runs of resetting methods (saw-teeth), ends of '
                   'the others', x=x_label, y='communication', styles=styles)
    page.table(_formatted(metrics['methods'], {
        TASK: 'communication', 'held_out_language': 'language', 'kl': 'KL', 'communication': 'self-play communication',
        'language': 'self-play language', 'kept': 'kept', 'lowest': 'lowest', 'highest': 'highest'}))
    page.text('At the end of the runs. Kept: how far the average followed the policy before the reset, 0 to 1. Lowest, '
              'highest: communication over the last period, both sides of its reset.')
    page.table(_formatted(metrics['gains'], {
        f'{front}_at_{drift}': f'over {name}, at its {what}' for drift, what in (('kl', 'KL'), ('language', 'language'))
        for front, name in FRONTS.items()}, seeds))
    page.text(f'Gain in communication over the front of another method at the same drift, paired by seed; in brackets, '
              f'at how many of the {seeds} seeds it is above. Without a gain over interpolation there is none. Near '
              'a KL of 0 the penalties and early stopping have only the pretrained agents to offer, whose listener has '
              'not learned from the game yet.')
    steps = np.arange(1, config.training.num_steps // config.training.log_every + 1) * config.training.log_every
    plain = next(run for run in histories if run.plain)
    for name, caption in ((TASK, 'communication'), ('held_out_language', 'language'), ('kl', 'KL')):
        curves = {}
        for run in (plain, *chosen):
            sides = SIDES.values() if run.resets else ('',)
            curves[run.label(algorithm)] = (
                np.repeat(steps, len(sides)),
                np.stack([histories[run][prefix + name].mean(0) for prefix in sides], 1).ravel())
        page.lines(curves, f'{caption}, held-out objects', y=caption)


def _shown(histories: Mapping[Run, History]) -> list[Run]:
    """The runs with a curve of their own: the last of each method but the penalties'."""
    out = []
    for method in METHODS:
        of_method = [run for run in histories if run.method == method]
        if of_method and method != 'fixed_reference':
            out.append(of_method[-1])
    return out


def _formatted(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str],
               seeds: int | None = None) -> list[dict[str, Any]]:
    """Table rows of "mean ± spread", with `seeds` also how many of them are above."""
    out = []
    for label, row in rows.items():
        line = {'': label}
        for name, heading in columns.items():
            line[heading] = report.with_spread(row[name], row[f'{name}_std']) if name in row else None
            if seeds and name in row:
                line[heading] += f' ({row[f"{name}_above"]}/{seeds})'
        out.append(line)
    return out

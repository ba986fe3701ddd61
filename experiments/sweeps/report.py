"""Runs side by side: tables with deviations, paired differences, curves with bands, and the task against the drift."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runtime import report
from experiments.runtime import statistics as stats
from experiments.runtime.statistics import Difference, front_height, paired_difference, spread
from experiments.sweeps.results import EVALUATED, Result

COUNTS = ('num_prompts', 'num_samples', 'temperature')  # of an evaluation: how it was made, not what it found
TRAINING = ('reward', 'gold', 'kl', 'loss', 'token_staleness')
# (task, drift): the first pair that all runs have is drawn.
TRADE_OFFS = ((f'{EVALUATED}gold', f'{EVALUATED}kl'), (f'{EVALUATED}reward', f'{EVALUATED}kl'),
              (f'{EVALUATED}reward_de', f'{EVALUATED}nll_en'), ('eval_gold', 'eval_kl'), ('eval_reward', 'eval_kl'),
              ('gold', 'kl'), ('reward', 'kl'))
CURVES = 8               # at most, of metrics that are not named


def summarize(results: Sequence[Result], *, baseline: str = '', metrics: Sequence[str] = (),
              trade_off: Sequence[str] = (), at: int | None = None) -> dict[str, Any]:
    """Everything in `report.json`: a function of what the runs measured, without clocks and folders.

    `settings`: mean and deviation over the seeds of finished runs. `differences`: from `baseline`, paired by seed.
    `trade_off`: task and drift, which settings no other beats, and what a setting gains at its drift over the runs of
    `baseline`, interpolated with their start, and over their checkpoints, where these were measured.

    Args:
        baseline: a setting; '': the first.
        metrics: names to report; (): see `choose_metrics`.
        trade_off: names of the task and the drift; (): the first pair of `TRADE_OFFS` that there is.
        at: step by which `results` were measured (see `collect`), which the page then says; None: the end.

    Raises:
        ValueError: a name that no run has.
    """
    settings = list(dict.fromkeys(result.setting for result in results))
    baseline = baseline or settings[0]
    if baseline not in settings:
        raise ValueError(f'--baseline={baseline!r} is not one of {settings}')
    metrics = choose_metrics(results, metrics)
    finished = {setting: {r.seed: r for r in results if r.setting == setting and r.finished} for setting in settings}
    out: dict[str, Any] = {
        'settings_tried': len(settings), 'runs': len(results), 'finished': sum(map(len, finished.values())),
        'unfinished': {f'{r.setting}, seed {r.seed}': r.state for r in results if not r.finished},
        'baseline': baseline, 'metrics': list(metrics), 'settings': {}, 'differences': {}}
    for setting, of_seed in finished.items():
        out['settings'][setting] = {'seeds': len(of_seed)} | spread(
            {name: values for name in metrics if (values := values_of(of_seed, name))})
        if setting == baseline:
            continue
        row = {}
        for name in metrics:
            seeds = [seed for seed in of_seed if seed in finished[baseline]
                     and name in of_seed[seed].final and name in finished[baseline][seed].final]
            if seeds:
                row[name] = paired_difference([of_seed[s].final[name] for s in seeds],
                                              [finished[baseline][s].final[name] for s in seeds])._asdict()
        out['differences'][setting] = row
    if at is not None:
        out['at'] = at
    pair = choose_trade_off(results, trade_off)
    if pair:
        out['trade_off'] = of_trade_off(finished, baseline, *pair)
    return out


def values_of(of_seed: Mapping[int, Result], name: str) -> list[float]:
    """The final value of a metric by seed, in the order of the seeds, of the runs that have it."""
    return [of_seed[seed].final[name] for seed in sorted(of_seed) if name in of_seed[seed].final]


def choose_metrics(results: Sequence[Result], names: Sequence[str]) -> tuple[str, ...]:
    """`names`, or what a reader asks for first: evaluations, and the main metrics of training.

    Raises:
        ValueError: no run has one of `names`.
    """
    present = dict.fromkeys(name for result in results for name in result.final)
    for name in names:
        if name not in present:
            raise ValueError(f'--metrics: no run has {name!r}; there are {sorted(present)}')
    if names:
        return tuple(names)
    evaluated = [name for name in present if name.startswith((EVALUATED, 'eval_', 'heldout_'))
                 and name.removeprefix(EVALUATED) not in COUNTS]
    return tuple(evaluated + [name for name in TRAINING if name in present]) or tuple(present)


def choose_trade_off(results: Sequence[Result], names: Sequence[str]) -> tuple[str, str] | None:
    """(task, drift), or None where runs have nothing of the kind.

    Raises:
        ValueError: `names` are not two metrics that a run has.
    """
    finals = [result.final for result in results if result.finished]
    if names:
        for name in names:
            if not any(name in final for final in finals):
                raise ValueError(f'--trade_off: no finished run has {name!r}')
        task, drift = names
        return task, drift
    return next((pair for pair in TRADE_OFFS if finals and all(set(pair) <= set(final) for final in finals)), None)


def of_trade_off(finished: Mapping[str, Mapping[int, Result]], baseline: str, task: str,
                 drift: str) -> dict[str, Any]:
    """Means over seeds, the settings that no other beats in both, and gains over interpolation and early stopping."""
    points = {}
    for setting, of_seed in finished.items():
        both = {seed: r for seed, r in of_seed.items() if task in r.final and drift in r.final}
        if both:
            points[setting] = spread({'drift': values_of(both, drift), 'task': values_of(both, task)})
    drifts, tasks = (np.array([point[name] for point in points.values()]) for name in ('drift', 'task'))
    best = [setting for setting, keep in zip(points, stats.undominated(drifts, tasks)) if keep] if points else []
    out: dict[str, Any] = {'task': task, 'drift': drift, 'points': points, 'front': best}
    lines = {seed: line for seed, result in finished[baseline].items()
             if any(line := front_of(result.interpolation, task, drift))}  # those that were measured in both
    if lines:
        alphas = sorted({alpha for line in lines.values() for alpha in line[2]})
        out['interpolation'] = {f'{alpha:g}': spread({
            'drift': [line[0][line[2].index(alpha)] for line in lines.values() if alpha in line[2]],
            'task': [line[1][line[2].index(alpha)] for line in lines.values() if alpha in line[2]]})
            for alpha in alphas}
        out['gains_over_interpolation'] = gains_over(lines, finished, baseline, task, drift)
    stops = {seed: line for seed, result in finished[baseline].items()
             if len((line := checkpoints_of(result.rows, task, drift))[0]) > 1}
    if stops:
        out['gains_over_stopping'] = gains_over(stops, finished, baseline, task, drift)
    return out


def gains_over(lines: Mapping[int, Sequence[list[float]]], finished: Mapping[str, Mapping[int, Result]], baseline: str,
               task: str, drift: str) -> dict[str, Any]:
    """{setting: paired difference of the task} from the front of the baseline's `lines`, drifts and tasks by seed, at
    the setting's drift; of the seeds that have both."""
    gains = {}
    for setting, of_seed in finished.items():
        seeds = [seed for seed in of_seed if seed in lines and {task, drift} <= set(of_seed[seed].final)]
        if setting != baseline and seeds:
            gains[setting] = paired_difference(
                [of_seed[seed].final[task] for seed in seeds],
                [front_height(np.array(lines[seed][0]), np.array(lines[seed][1]), of_seed[seed].final[drift])
                 for seed in seeds])._asdict()
    return gains


def checkpoints_of(rows: Sequence[Mapping[str, Any]], task: str, drift: str) -> tuple[list[float], list[float]]:
    """(drifts, tasks) of a run's checkpoints on held-out prompts; none of what the batches of training had."""
    if not all(name.startswith((EVALUATED, 'eval_')) for name in (task, drift)):
        return [], []
    rows = [row for row in rows if row.get(task) is not None and row.get(drift) is not None]
    return [row[drift] for row in rows], [row[task] for row in rows]


def front_of(interpolation: Sequence[Mapping[str, float]], task: str,
             drift: str) -> tuple[list[float], list[float], list[float]]:
    """(drifts, tasks, alphas) of what was interpolated."""
    names = [name.removeprefix(EVALUATED).removeprefix('eval_') for name in (drift, task)]
    rows = [row for row in interpolation if all(name in row for name in names)]
    return [row[names[0]] for row in rows], [row[names[1]] for row in rows], [row['alpha'] for row in rows]


# ---- Tables ----------------------------------------------------------------------------------------------------------

def tables(summary: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{heading: rows} as a page and a terminal show them."""
    out = {'Settings': report.rows_with_spread(summary['settings'])}
    rows = []
    for setting, of_metric in summary['differences'].items():
        rows += [{'setting': setting, 'metric': name} | difference_row(Difference(**difference))
                 for name, difference in of_metric.items()]
    if rows:
        out[f'Differences from {summary["baseline"]}, paired by seed'] = rows
    trade_off = summary.get('trade_off', {})
    if trade_off.get('points'):
        out[f'{trade_off["task"]} against {trade_off["drift"]}'] = [
            line | {'unbeaten': 'yes' if line[''] in trade_off['front'] else ''}
            for line in report.rows_with_spread(trade_off['points'])]
    if trade_off.get('interpolation'):
        out[f'{summary["baseline"]}, interpolated with its start'] = report.rows_with_spread(
            {f'α {alpha}': row for alpha, row in trade_off['interpolation'].items()})
    for name, title in (('gains_over_interpolation', 'Gain over that interpolation at the same drift'),
                        ('gains_over_stopping', f'Gain over checkpoints of {summary["baseline"]} at the same drift')):
        if trade_off.get(name):
            out[title] = [{'setting': setting} | difference_row(Difference(**gain))
                          for setting, gain in trade_off[name].items()]
    return out


def difference_row(difference: Difference) -> dict[str, str]:
    mean, std, low, high, above, pairs = difference
    return {'difference': f'{mean:.3g}' if std is None else report.with_spread(mean, std),
            f'{stats.LEVEL:.0%} interval': '–' if low is None else f'[{low:.3g}, {high:.3g}]',
            'above': f'{above}/{pairs}'}


def heading(summary: Mapping[str, Any]) -> str:
    """What was tried, so that nobody takes the best of many for the only one."""
    return (f'{summary["settings_tried"]} settings were tried in {summary["runs"]} runs, of which '
            f'{summary["finished"]} have finished.'
            + (f' Measured at step {summary["at"]}, or last before it.' if 'at' in summary else ''))


def markdown(summary: Mapping[str, Any]) -> str:
    """All tables as text."""
    parts = [heading(summary)]
    parts += [f'{name}: {state}' for name, state in summary['unfinished'].items()]
    for title, rows in tables(summary).items():
        parts += [f'**{title}**', report.markdown(rows)]
    return '\n\n'.join(parts)


# ---- Page ------------------------------------------------------------------------------------------------------------

def page_of(results: Sequence[Result], summary: Mapping[str, Any], title: str) -> report.Report:
    """Tables, curves with bands and the trade-off as one page."""
    page = report.Report(title, heading(summary) + ' Every number comes from their work directories; ± is the standard '
                         'deviation over the seeds of finished runs.')
    if summary['unfinished']:
        page.table([{'run': name, 'state': state} for name, state in summary['unfinished'].items()])
    for name, rows in tables(summary).items():
        page.heading(name)
        page.table(rows)
        if name.startswith('Differences'):
            page.text(f'Percentile bootstrap over the seeds, {stats.DRAWS} resamples from a fixed seed. Of few seeds '
                      'the interval is narrower than it should be; no correction is made for the number of settings.')
    if 'trade_off' in summary:
        add_trade_off(page, results, summary['trade_off'], summary['baseline'])
    page.heading('Curves')
    for name in curve_names(results, summary['metrics']):
        lines, bands, x_label = curves_of(results, name)
        page.lines(lines, f'{name}, mean and standard deviation over seeds', x=x_label, y=name, bands=bands)
    return page


def add_trade_off(page: report.Report, results: Sequence[Result], trade_off: Mapping[str, Any], baseline: str) -> None:
    """Ends of the settings, the line through those that none beats, and the interpolation."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    styles = {}
    points = trade_off['points']
    front = sorted((points[setting]['drift'], points[setting]['task']) for setting in trade_off['front'])
    curves['unbeaten'] = [x for x, _ in front], [y for _, y in front]
    styles['unbeaten'] = 'k:'
    if 'interpolation' in trade_off:
        label = f'{baseline}, interpolated'
        rows = trade_off['interpolation'].values()
        curves[label], styles[label] = ([row['drift'] for row in rows], [row['task'] for row in rows]), 's--'
    for setting in points:
        ends = [(r.final[trade_off['drift']], r.final[trade_off['task']]) for r in results
                if r.setting == setting and r.finished and {trade_off['drift'], trade_off['task']} <= set(r.final)]
        curves[setting], styles[setting] = ([x for x, _ in ends], [y for _, y in ends]), '^'
    page.lines(curves, 'every finished run; dotted: the means that no other beats in both', x=trade_off['drift'],
               y=trade_off['task'], styles=styles)


def curve_names(results: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` that runs have at more than one step, `CURVES` of them at most."""
    several = [name for name in metrics
               if any(sum(row.get(name) is not None for row in result.rows) > 1 for result in results)]
    return several[:CURVES]


def curves_of(results: Sequence[Result], name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """({setting: (xs, means)}, {setting: (low, high)}, label of x) over finished runs, at steps that all seeds have.

    Where batches are of different sizes, x counts what was trained on and not steps.
    """
    sizes = {result.config.get('batch_size') for result in results}
    lines, bands = {}, {}
    for setting in dict.fromkeys(result.setting for result in results):
        runs = [{row['step']: row[name] for row in r.rows if row.get(name) is not None}
                for r in results if r.setting == setting and r.finished]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        if not steps:
            continue
        config = next(r.config for r in results if r.setting == setting)
        scale = config.get('batch_size', 1) if len(sizes) > 1 else 1
        values = np.array([[run[step] for step in steps] for run in runs], np.float64)
        mean = values.mean(0)
        lines[setting] = [step * scale for step in steps], mean
        if len(runs) > 1:
            deviation = values.std(0, ddof=1)
            bands[setting] = mean - deviation, mean + deviation
    return lines, bands, 'items trained on' if len(sizes) > 1 else 'step'

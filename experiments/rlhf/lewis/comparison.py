"""Elastic Reset and what it has to beat, on the Lewis game, where drift from the language is known exactly:

    python -m experiments.rlhf.lewis.comparison                     # a minute on one core; runs/lewis/report.html, metrics.json

Policy gradient alone, with a KL penalty to the initial policy, to its average or to a snapshot; resets to the initial
policy, to the average, Elastic Reset; and interpolation of the plain run afterwards. The same steps and seeds for each.
Interrupt it anywhere and run it again: it continues and ends with the same numbers.
"""
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from experiments.runtime import launch, report, storage
from experiments.runtime.stages import claim, once
from rlhf_jax import elastic_reset as er
from rlhf_jax.tasks import lewis

NAMES = {'fixed_reference': 'KL to the initial policy', 'ema_anchor': 'KL to the average (EMA anchor)',
         'reference_reset': 'KL to a snapshot (reference reset)', 'reset_to_init': 'reset to the initial policy',
         'reset_to_ema': 'reset to the average', 'elastic_reset': 'Elastic Reset'}
ALGORITHMS = {'a2c': 'A2C', 'reinforce': 'REINFORCE', 'gumbel': 'Gumbel-softmax'}
SIDES = {'before': 'before_reset_', 'after': ''}  # of the reset at the end of the run -> prefix in a history
TASK = 'held_out_communication'
# What a method may be charged with -> from a history, with the prefix of its side.
DRIFTS = {'kl': lambda run, side: run[f'{side}kl'], 'language': lambda run, side: 1 - run[f'{side}held_out_language']}
FRONTS = {'kl_front': 'the KL penalties', 'interpolation': 'interpolation', 'early_stopping': 'early stopping'}
CHUNK = 2000  # steps between two looks at whether a signal has come, at most

History = dict[str, np.ndarray]  # metric -> [seeds, log points], as `lewis.advance` returns it


class Run(NamedTuple):
    """One of the compared runs. `decay` None: the method has none of its own."""
    method: str
    kl_coefficient: float
    decay: float | None

    @property
    def plain(self) -> bool:
        return self.method == 'fixed_reference' and self.kl_coefficient == 0

    @property
    def resets(self) -> bool:
        return self.method in ('reset_to_init', 'reset_to_ema', 'elastic_reset')

    @property
    def file_name(self) -> str:
        return '_'.join(str(x) for x in self if x is not None) + '.npz'

    def label(self, algorithm: str) -> str:
        if self.plain:
            return f'{ALGORITHMS[algorithm]} alone'
        beta = f', β {self.kl_coefficient:g}' if self.kl_coefficient else ''
        return NAMES[self.method] + beta + (f', decay {self.decay:g}' if self.decay is not None else '')


class Comparison(NamedTuple):
    """Attributes:
        histories: of every run.
        interpolation: metric -> [seeds, alphas].
        start: metric of the pretrained agents -> [seeds].
        metrics: means and standard deviations over seeds, for `metrics.json`; see `summarize`.
    """
    histories: dict[Run, History]
    interpolation: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    metrics: dict[str, Any]


# ---- Settings ------------------------------------------------------------------------------------------------------

def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """Every run of the comparison, the plain one first."""
    found = [Run(name, kl, decay) for name in er.METHODS if name in config.methods
             for kl in config.methods[name].kl_coefficients for decay in config.methods[name].decays or (None,)]
    return sorted(found, key=lambda run: not run.plain)


def elastic(config: ml_collections.ConfigDict, method: str) -> er.ElasticReset:
    return er.method(method, config.elastic.period, tick_every=config.elastic.tick_every,
                     tick_offset=config.elastic.tick_offset)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for what would fail, or mean nothing, once the runs have begun."""
    launch.check_fields('config.methods', config.methods, tuple(er.METHODS))
    training = lewis.Training(**config.training)
    _split(config, config.seeds[0] if config.seeds else 0)
    for name, method in config.methods.items():
        settings = elastic(config, name)
        settings.resets(training.num_steps)
        lewis.check_schedule(training, settings)
        if not method.kl_coefficients:
            raise ValueError(f'config.methods.{name}.kl_coefficients is empty; (0.0,) is no KL')
        for kl in method.kl_coefficients:
            if not 0 <= kl < math.inf:
                raise ValueError(f'config.methods.{name}.kl_coefficients: {kl} must be at least 0')
        for decay in method.decays:
            if not 0 <= decay <= 1:
                raise ValueError(f'config.methods.{name}.decays: {decay} must be in [0, 1]')
    if config.training.num_steps % config.elastic.period:
        raise ValueError(f'config.elastic.period={config.elastic.period} must divide training.num_steps='
                         f'{config.training.num_steps}, so that all runs end right at a reset')
    found = runs(config)
    if not any(run.plain for run in found):
        raise ValueError('config.methods.fixed_reference.kl_coefficients must have 0.0: the plain run, which is '
                         'interpolated')
    if len({*found}) < len(found):
        raise ValueError('config.methods: a coefficient or a decay is given twice')
    if not {0.0, 1.0} <= {*config.alphas}:
        raise ValueError(f'config.alphas={tuple(config.alphas)} must have 0.0 and 1.0, the ends of the interpolation')
    if len(config.seeds) < 2 or len({*config.seeds}) < len(config.seeds):
        raise ValueError(f'config.seeds={tuple(config.seeds)}: two or more, each once, for a spread')


def _split(config: ml_collections.ConfigDict, seed: int) -> tuple[np.ndarray, ...]:
    c = config.game
    supervised, self_play, held_out = lewis.Game(c.properties, c.types).split(
        np.random.default_rng(seed), supervised=c.supervised, self_play=c.self_play)
    return supervised, self_play, held_out[:c.held_out or None]


# ---- Runs ----------------------------------------------------------------------------------------------------------

def compare(config: ml_collections.ConfigDict, workdir: str | pathlib.Path,
            progress: Callable[..., tqdm] = functools.partial(tqdm, dynamic_ncols=True)) -> Comparison:
    """Makes those runs that `workdir` does not hold yet, all seeds of a run at once, and compares them.

    Every run is kept in a file of its own when it is finished. A signal is answered within `CHUNK` steps, where the
    caller has put `launch.stop_on_signal` in place (as `launch.main` has).

    Args:
        config: as `configs/rlhf/lewis.py` has it.
        workdir: a local folder, for this comparison alone.
        progress: makes the bar; takes tqdm's arguments.

    Raises:
        ValueError: `check`, or `workdir` holds a comparison with another config.
        FloatingPointError: a run diverged.
    """
    check(config)
    workdir = claim(config, workdir)
    game = lewis.Game(config.game.properties, config.game.types)
    supervised, *objects = (jnp.asarray(np.stack(x)) for x in zip(*(_split(config, s) for s in config.seeds)))
    keys = jnp.stack([jax.random.key(seed) for seed in config.seeds])

    def pretrained():
        def one(key, supervised, *objects):
            init = lewis.init(jax.random.fold_in(key, 0), game, config.hidden)
            params = lewis.pretrain(jax.random.fold_in(key, 1), init, game, supervised, **config.pretrain)
            return params, lewis.measure(params, params['speaker'], game, *objects)
        return _join(*jax.jit(jax.vmap(one))(keys, supervised, *objects))
    params, start = _parted(once(workdir / 'pretrained.npz', pretrained))
    setting = _Setting(config, game, jax.vmap(lambda k: jax.random.fold_in(k, 2))(keys), params, tuple(objects))

    found, histories = runs(config), {}
    with progress(total=len(found) * config.training.num_steps, unit='step', desc='Lewis game') as bar:
        for run in found:
            bar.set_postfix_str(run.label(config.training.method))
            before = bar.n
            arrays = once(workdir / run.file_name, lambda: setting.make(run, bar.update))
            bar.update(config.training.num_steps - (bar.n - before))
            final, histories[run] = _parted(arrays)
            if run.plain:
                interpolated = once(workdir / 'interpolation.npz', lambda: setting.interpolate(final))
    return Comparison(histories, interpolated, start, summarize(config, histories, interpolated, start))


@functools.cache
def _program(training: lewis.Training, game: lewis.Game, settings: er.ElasticReset, num_steps: int) -> Callable:
    """`lewis.advance` by `num_steps`, compiled, over seeds; KL coefficient and decay are arguments."""
    def advance(carry, key, start, objects, kl_coefficient, decay):
        whole = dataclasses.replace(training, kl_coefficient=kl_coefficient)
        return lewis.advance(carry, key, start, game, *objects, whole, settings, num_steps, decay)
    return jax.jit(jax.vmap(advance, (0, 0, 0, 0, None, None)))


@functools.cache
def _begin(training: lewis.Training) -> Callable:
    return jax.jit(jax.vmap(lambda params: lewis.begin(params, training, er.ElasticReset())))


class _Setting:
    """What all runs share. `objects`: to play with, held out; arrays have a leading axis of seeds."""

    def __init__(self, config, game, keys, params, objects):
        self._training, self._config = lewis.Training(**config.training), config
        self._game, self._keys, self._params, self._objects = game, keys, params, objects
        every, blocks = self._training.log_every, self._training.num_steps // self._training.log_every
        self._chunk = every * max(n for n in range(1, blocks + 1)
                                  if blocks % n == 0 and (n == 1 or n * every <= CHUNK))

    def make(self, run: Run, update: Callable[[int], Any]) -> dict[str, np.ndarray]:
        """The whole run; `update` hears of every chunk of steps."""
        carry, history = _begin(self._training)(self._params), []
        program = _program(self._training, self._game, elastic(self._config, run.method), self._chunk)
        for _ in range(self._training.num_steps // self._chunk):
            carry, part = program(carry, self._keys, self._params['speaker'], self._objects, run.kl_coefficient,
                                  run.decay)
            history.append(jax.device_get(part))
            if not all(np.isfinite(x).all() for x in history[-1].values()):
                raise FloatingPointError(f'{run.label(self._training.method)}: not finite within the first '
                                         f'{len(history) * self._chunk} steps; lower config.training.learning_rate')
            update(self._chunk)
        whole = {name: np.concatenate([part[name] for part in history], axis=1) for name in history[0]}
        return _join(carry.params if run.plain else {}, whole)

    def interpolate(self, final: lewis.Params) -> dict[str, np.ndarray]:
        """The plain run's speakers, put back by each alpha, with its listeners as they ended: as a reset does it."""
        def one(start, final, objects, alpha):
            speaker = er.interpolate(start, final['speaker'], alpha)
            return lewis.measure(final | {'speaker': speaker}, start, self._game, *objects)
        over_alphas = jax.vmap(one, (None, None, None, 0))
        return jax.device_get(jax.jit(jax.vmap(over_alphas, (0, 0, 0, None)))(
            self._params['speaker'], final, self._objects, jnp.asarray(self._config.alphas)))


def _join(params: lewis.Params, measures: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One flat dict for a file; parameters by their path."""
    flat = flax.traverse_util.flatten_dict({'params': params}, sep='/') if params else {}
    return jax.device_get(flat | dict(measures))


def _parted(arrays: dict[str, np.ndarray]) -> tuple[lewis.Params, dict[str, np.ndarray]]:
    params = {name: x for name, x in arrays.items() if name.startswith('params/')}
    return (flax.traverse_util.unflatten_dict(params, sep='/').get('params', {}),
            {name: x for name, x in arrays.items() if name not in params})


# ---- Numbers -------------------------------------------------------------------------------------------------------

def summarize(config: ml_collections.ConfigDict, histories: dict[Run, History],
              interpolation: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything in `metrics.json`; `x` and `x_std` are mean and standard deviation over seeds.

    `methods`: at the end of each run; of resetting methods, `before` and `after` the reset there, and `lowest` and
    `highest` over the last period, the envelope of the saw-tooth. `gains`: held-out communication beyond the fronts of
    `fronts` at the same drift, paired by seed (`front_height`), and at how many of the seeds it is above.
    """
    algorithm = config.training.method
    methods = {'pretrained': _spread(start)}
    for run, history in histories.items():
        label = run.label(algorithm)
        per_period = config.elastic.period // config.training.log_every
        for side, prefix in SIDES.items() if run.resets else (('after', ''),):
            row = {name: history[prefix + name][:, -1] for name in start}
            if run.method not in ('fixed_reference', 'reference_reset'):
                row['kept'] = history['kept'][:, -1]
            if run.resets:
                both = np.concatenate([history[p + TASK][:, -per_period:] for p in SIDES.values()], 1)
                row |= {'lowest': both.min(1), 'highest': both.max(1)}
            methods[f'{label}, {side} the reset' if run.resets else label] = _spread(row)
    for i, alpha in enumerate(config.alphas):
        methods[f'interpolation, α {alpha:g}'] = _spread({name: x[:, i] for name, x in interpolation.items()})

    gains = {}
    for drift in DRIFTS:
        lines = fronts(histories, interpolation, start, drift)
        for run, history in histories.items():
            if run.method == 'fixed_reference':
                continue
            for side, prefix in SIDES.items() if run.resets else (('after', ''),):
                label = run.label(algorithm)
                row = gains.setdefault(f'{label}, {side} the reset' if run.resets else label, {})
                x, y = DRIFTS[drift](history, prefix)[:, -1], history[prefix + TASK][:, -1]
                for name, (xs, ys) in lines.items():
                    gain = np.array([y[s] - front_height(xs[s], ys[s], x[s]) for s in range(len(y))])
                    row |= _spread({f'{name}_at_{drift}': gain}) | {f'{name}_at_{drift}_above': int((gain > 0).sum())}
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


def front_height(drift: np.ndarray, task: np.ndarray, at: float) -> float:
    """The best task for a drift of at most `at` on the line through points [P], ordered by their drift.

    Left of all points, the task of the one that drifted least (what is there is better than that in both).
    """
    order = np.lexsort((-task, drift))
    return float(np.interp(at, drift[order], np.maximum.accumulate(task[order])))


def _spread(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    out = {}
    for name, values in rows.items():
        out |= {name: float(np.mean(values)), f'{name}_std': float(np.std(values, ddof=1))}
    return out


# ---- Report --------------------------------------------------------------------------------------------------------

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
    for method in er.METHODS:
        found = [run for run in histories if run.method == method]
        if found and method != 'fixed_reference':
            out.append(found[-1])
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


def main() -> None:
    p = launch.parser(__doc__, config='game, budget and methods (default: configs/rlhf/lewis.py)')
    p.add_argument('--workdir', default='runs/lewis')
    args, config = launch.parse(p, default_config='configs/rlhf/lewis.py')
    launch.initialize(args)
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

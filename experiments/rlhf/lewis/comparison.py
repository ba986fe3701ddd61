"""Runs the methods that are compared on the Lewis game, where drift from the language is known exactly.

Policy gradient alone, with a KL penalty to the initial policy, to its average or to a snapshot; resets to the initial
policy, to the average, Elastic Reset; and interpolation of the plain run afterwards. The same steps and seeds for each.
`runs.py` says which runs there are, `summary.py` what they are worth, `report.py` shows it.
"""
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from experiments.rlhf.lewis.runs import Run, check, elastic, imitation, runs, split_objects
from experiments.rlhf.lewis.summary import History, summarize
from experiments.runtime.stages import claim, once
from rlhf_jax import elastic_reset as er
from rlhf_jax.tasks import lewis

CHUNK = 2000  # steps between two looks at whether a signal has come, at most


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


# ---- Runs ----------------------------------------------------------------------------------------------------------

def compare(config: ml_collections.ConfigDict, workdir: str | pathlib.Path,
            progress: Callable[..., tqdm] = functools.partial(tqdm, dynamic_ncols=True)) -> Comparison:
    """Makes those runs that `workdir` does not hold yet, all seeds of a run at once, and compares them.

    Every run is kept in a file of its own when it is finished. A signal is answered within `CHUNK` steps, where the
    caller has put `signals.raising` in place (as `launch.main` has).

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
    supervised, *objects = (jnp.asarray(np.stack(x)) for x in zip(*(split_objects(config, s) for s in config.seeds)))
    keys = jnp.stack([jax.random.key(seed) for seed in config.seeds])

    def pretrained():
        def one(key, supervised, *objects):
            init = lewis.init(jax.random.fold_in(key, 0), game, config.hidden)
            params = lewis.pretrain(jax.random.fold_in(key, 1), init, game, supervised, **config.pretrain)
            return params, lewis.measure(params, params['speaker'], game, *objects)
        return _join(*jax.jit(jax.vmap(one))(keys, supervised, *objects))
    params, start = _parted(once(workdir / 'pretrained.npz', pretrained))
    setting = _Setting(config, game, jax.vmap(lambda k: jax.random.fold_in(k, 2))(keys), params, tuple(objects))

    every, histories = runs(config), {}
    with progress(total=len(every) * config.training.num_steps, unit='step', desc='Lewis game') as bar:
        for run in every:
            bar.set_postfix_str(run.label(config.training.method))
            before = bar.n
            arrays = once(workdir / run.file_name, lambda: setting.make(run, bar.update))
            bar.update(config.training.num_steps - (bar.n - before))
            final, histories[run] = _parted(arrays)
            if run.plain:
                interpolated = once(workdir / 'interpolation.npz', lambda: setting.interpolate(final))
    return Comparison(histories, interpolated, start, summarize(config, histories, interpolated, start))


@functools.cache
def _program(training: lewis.Training, game: lewis.Game, settings: er.ElasticReset, imitation: lewis.Imitation | None,
             num_steps: int) -> Callable:
    """`lewis.advance` by `num_steps`, compiled, over seeds; KL coefficient and decay are arguments."""
    def advance(carry, key, start, objects, kl_coefficient, decay):
        whole = dataclasses.replace(training, kl_coefficient=kl_coefficient)
        return lewis.advance(carry, key, start, game, *objects, whole, settings, num_steps, decay, imitation)
    return jax.jit(jax.vmap(advance, (0, 0, 0, 0, None, None)))


@functools.cache
def _begin(training: lewis.Training, imitation: lewis.Imitation | None) -> Callable:
    return jax.jit(jax.vmap(lambda params: lewis.begin(params, training, er.ElasticReset(), imitation)))


def chunk_steps(training: lewis.Training) -> int:
    """Steps between two looks at whether a signal has come: the largest divisor of the run, in log blocks, of at most
    `CHUNK` steps; one block if that is longer."""
    blocks = training.num_steps // training.log_every
    fitting = [n for n in range(1, blocks + 1) if blocks % n == 0 and n * training.log_every <= CHUNK]
    return training.log_every * max(fitting, default=1)


class _Setting:
    """What all runs share. `objects`: to play with, held out; arrays have a leading axis of seeds."""

    def __init__(self, config, game, keys, params, objects):
        self._training, self._config = lewis.Training(**config.training), config
        self._game, self._keys, self._params, self._objects = game, keys, params, objects
        self._chunk = chunk_steps(self._training)

    def make(self, run: Run, update: Callable[[int], Any]) -> dict[str, np.ndarray]:
        """The whole run; `update` hears of every chunk of steps."""
        students = imitation(self._config, run.method)
        carry, history = _begin(self._training, students)(self._params), []
        program = _program(self._training, self._game, elastic(self._config, run.method), students, self._chunk)
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

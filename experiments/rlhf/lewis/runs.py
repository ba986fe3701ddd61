"""The compared runs on the Lewis game, as a config describes them."""
import math
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.runtime import checks
from rlhf_jax import elastic_reset as er
from rlhf_jax.tasks import lewis

NAMES = {'fixed_reference': 'KL to the initial policy', 'ema_anchor': 'KL to the average (EMA anchor)',
         'reference_reset': 'KL to a snapshot (reference reset)', 'reset_to_init': 'reset to the initial policy',
         'reset_to_ema': 'reset to the average', 'elastic_reset': 'Elastic Reset',
         'imitation': 'seeded iterated learning'}
AGENTS = {'speaker': r'speaker/.*', 'both': r'(speaker|listener)/.*'}  # who is averaged and reset -> parameters
METHODS = (*er.METHODS, 'imitation')
ALGORITHMS = {'a2c': 'A2C', 'reinforce': 'REINFORCE', 'gumbel': 'Gumbel-softmax'}


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
        """Whether it has two sides every period: resets, or generations of students."""
        return self.method in ('reset_to_init', 'reset_to_ema', 'elastic_reset', 'imitation')

    @property
    def sides(self) -> dict[str, str]:
        """What the table calls each side of the last reset -> its name in `summary.SIDES`."""
        if not self.resets:
            return {'': 'after'}
        event = 'a generation' if self.method == 'imitation' else 'the reset'
        return {f', {side} {event}': side for side in ('before', 'after')}

    @property
    def file_name(self) -> str:
        return '_'.join(str(x) for x in self if x is not None) + '.npz'

    def label(self, algorithm: str) -> str:
        if self.plain:
            return f'{ALGORITHMS[algorithm]} alone'
        beta = f', β {self.kl_coefficient:g}' if self.kl_coefficient else ''
        return NAMES[self.method] + beta + (f', decay {self.decay:g}' if self.decay is not None else '')


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """Every run of the comparison, the plain one first."""
    every = [Run(name, kl, decay) for name in METHODS if name in config.methods
             for kl in config.methods[name].kl_coefficients for decay in config.methods[name].decays or (None,)]
    return sorted(every, key=lambda run: not run.plain)


def elastic(config: ml_collections.ConfigDict, method: str) -> er.ElasticReset:
    """The settings of `method` with the schedule of `config.elastic`; under imitation nothing is reset."""
    method = 'fixed_reference' if method == 'imitation' else method
    return er.method(method, config.elastic.period, tick_every=config.elastic.tick_every,
                     tick_offset=config.elastic.tick_offset, policy=AGENTS[config.elastic.agents])


def imitation(config: ml_collections.ConfigDict, method: str) -> lewis.Imitation | None:
    """Imitation under the method of that name, a generation every `config.elastic.period`; None under the others."""
    if method != 'imitation':
        return None
    if config.elastic.period % config.training.log_every:
        raise ValueError(f'config.training.log_every={config.training.log_every} must divide config.elastic.period='
                         f'{config.elastic.period}, so that both sides of a generation are logged')
    return lewis.Imitation(config.elastic.period, **config.imitation)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for what would fail, or mean nothing, once the runs have begun."""
    checks.fields('config.methods', config.methods, METHODS)
    checks.choice('config.elastic.agents', config.elastic.agents, AGENTS)
    if any(seed < 0 for seed in config.seeds):
        raise ValueError(f'config.seeds={tuple(config.seeds)}: none may be negative')
    training = lewis.Training(**config.training)
    split_objects(config, config.seeds[0] if config.seeds else 0)
    for name, method in config.methods.items():
        settings = elastic(config, name)
        imitation(config, name)
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
    every = runs(config)
    if not any(run.plain for run in every):
        raise ValueError('config.methods.fixed_reference.kl_coefficients must have 0.0: the plain run, which is '
                         'interpolated')
    if len({*every}) < len(every):
        raise ValueError('config.methods: a coefficient or a decay is given twice')
    if not {0.0, 1.0} <= {*config.alphas}:
        raise ValueError(f'config.alphas={tuple(config.alphas)} must have 0.0 and 1.0, the ends of the interpolation')
    if len(config.seeds) < 2 or len({*config.seeds}) < len(config.seeds):
        raise ValueError(f'config.seeds={tuple(config.seeds)}: two or more, each once, for a spread')


def split_objects(config: ml_collections.ConfigDict, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objects to learn the language from, to play with, and to measure on: int [N, properties] each."""
    game = config.game
    supervised, self_play, held_out = lewis.Game(game.properties, game.types).split(
        np.random.default_rng(seed), supervised=game.supervised, self_play=game.self_play)
    return supervised, self_play, held_out[:game.held_out or None]

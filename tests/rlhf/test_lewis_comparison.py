"""The comparison on the Lewis game, tiny: what must agree agrees, and interruptions change no number."""
import functools
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from configs.rlhf import lewis as config_lib
from experiments import lewis as command
from experiments.rlhf.lewis import comparison as lewis
from experiments.rlhf.lewis import report as lewis_report
from experiments.rlhf.lewis import runs, summary
from experiments.runtime import launch, report, statistics
from experiments.runtime.signals import Stopped, signals
from rlhf_jax.tasks import lewis as lewis_task

QUIET = functools.partial(tqdm, disable=True)


def tiny():
    """Few runs, so that few programs are compiled."""
    config = config_lib.get_config('tiny')
    with config.unlocked():
        for name, kl_coefficients, decays in (('fixed_reference', (0.0, 0.5), ()), ('ema_anchor', (0.0,), (0.5,)),
                                              ('reset_to_init', (0.0,), ()), ('elastic_reset', (0.0,), (1.0, 0.5))):
            config.methods[name].update(kl_coefficients=kl_coefficients, decays=decays)
        del config.methods.reference_reset, config.methods.reset_to_ema
    return config


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    """The uninterrupted comparison: its folder, runs by method and setting, and all of it."""
    workdir = tmp_path_factory.mktemp('whole')
    comparison = lewis.compare(tiny(), workdir, QUIET)
    return workdir, {tuple(run): history for run, history in comparison.histories.items()}, comparison


@pytest.mark.slow
def test_stopped_by_signals_within_runs_the_numbers_are_the_same(compared, tmp_path, monkeypatch):
    make = lewis._Setting.make
    for finished in (1, 3):  # by the command that is stopped; it begins with the first that was not
        begun = []

        def stopped(self, run, update):
            begun.append(run)
            stop = lambda steps: os.kill(os.getpid(), signal.SIGTERM)
            return make(self, run, update if len(begun) <= finished else stop)
        with monkeypatch.context() as patch:
            patch.setattr(lewis._Setting, 'make', stopped)
            with pytest.raises(Stopped) as stop, signals.raising('run the same command to continue', 0):
                lewis.compare(tiny(), tmp_path, QUIET)
        assert stop.value.message == 'stopped by signal; run the same command to continue'
        assert not list(tmp_path.glob('*.partial.npz'))
    made = []
    monkeypatch.setattr(lewis._Setting, 'make', lambda self, run, update: made.append(run) or make(self, run, update))
    again = lewis.compare(tiny(), tmp_path, QUIET)
    assert len(made) == 3  # 4 of 7 were kept
    assert again.metrics == compared[2].metrics
    for run, history in again.histories.items():
        for name, values in history.items():
            np.testing.assert_array_equal(values, compared[2].histories[run][name], err_msg=f'{run} {name}')


def test_an_average_that_never_moves_is_the_initial_policy(compared):
    _, runs, _ = compared
    to_init, still = runs['reset_to_init', 0.0, None], runs['elastic_reset', 0.0, 1.0]
    for name in set(to_init) - {'kept'}:
        np.testing.assert_allclose(still[name], to_init[name], atol=1e-5, err_msg=name)
    assert (still['kept'] == 0).all() and (still['kl'][:, 1::2] == 0).all()
    assert np.abs(runs['elastic_reset', 0.0, 0.5]['kl'][:, 1] - to_init['kl'][:, 1]).min() > 1e-4


def test_without_resets_and_penalty_a_run_is_the_plain_one(compared):
    _, runs, _ = compared
    plain, other = runs['fixed_reference', 0.0, None], runs['ema_anchor', 0.0, 0.5]
    for name in set(plain) - {'kept'}:
        np.testing.assert_allclose(other[name], plain[name], atol=1e-5, err_msg=name)
        if not name.startswith('before_reset_') and name != 'reward':
            np.testing.assert_array_equal(plain[name], plain[f'before_reset_{name}'])
    assert (runs['fixed_reference', 0.5, None]['kl'][:, -1] < plain['kl'][:, -1]).all()


def test_interpolation_ends_at_the_initial_and_the_final_policy(compared):
    _, runs, comparison = compared
    plain = runs['fixed_reference', 0.0, None]
    for name in ('kl', 'held_out_language', 'language'):
        np.testing.assert_allclose(comparison.interpolation[name][:, 0], comparison.start[name], atol=1e-6)
    for name, values in comparison.interpolation.items():
        np.testing.assert_allclose(values[:, -1], plain[name][:, -1], atol=1e-5, err_msg=name)


def test_both_sides_of_a_generation_are_logged(compared):
    _, runs, comparison = compared
    plain, taught = runs['fixed_reference', 0.0, None], runs['imitation', 0.0, None]
    np.testing.assert_allclose(taught['before_reset_kl'][:, :2], plain['kl'][:, :2], atol=1e-5)
    assert np.abs(taught['kl'] - taught['before_reset_kl'])[:, 1::2].min() > 1e-3  # after steps 20 and 40
    np.testing.assert_array_equal(taught['kl'][:, ::2], taught['before_reset_kl'][:, ::2])
    row = comparison.metrics['methods']['seeded iterated learning, after a generation']
    assert row['kl'] == pytest.approx(taught['kl'][:, -1].mean()) and 'kept' not in row
    assert 'interpolation_at_kl' in comparison.metrics['gains']['seeded iterated learning, before a generation']


def test_both_sides_of_a_reset_are_logged(compared):
    _, runs, _ = compared
    history = runs['elastic_reset', 0.0, 0.5]  # log points at steps 10, 20, 30, 40; resets after 20 and 40
    np.testing.assert_array_equal(history['kl'][:, ::2], history['before_reset_kl'][:, ::2])
    assert (history['kl'][:, 1::2] < history['before_reset_kl'][:, 1::2]).all()
    rows = compared[2].metrics['methods']
    before, after = (rows[f'Elastic Reset, decay 0.5, {side} the reset'] for side in ('before', 'after'))
    assert before['kl'] == pytest.approx(history['before_reset_kl'][:, -1].mean())
    assert after['kl'] == pytest.approx(history['kl'][:, -1].mean())
    assert after['lowest'] <= min(before[summary.TASK], after[summary.TASK]) <= after['highest']


def test_seeds_differ_and_spreads_are_theirs(compared):
    _, runs, comparison = compared
    final = runs['fixed_reference', 0.0, None]['kl'][:, -1]
    row = comparison.metrics['methods']['A2C alone']
    assert abs(final[0] - final[1]) > 1e-4
    assert (row['kl'], row['kl_std']) == pytest.approx((final.mean(), abs(final[0] - final[1]) / 2 ** .5))


def test_gains_are_paired_by_seed(compared):
    _, runs, comparison = compared
    history, label = runs['elastic_reset', 0.0, 0.5], 'Elastic Reset, decay 0.5, before the reset'
    gains = [history[f'before_reset_{summary.TASK}'][s, -1] - statistics.front_height(
        comparison.interpolation['kl'][s], comparison.interpolation[summary.TASK][s], history['before_reset_kl'][s, -1])
        for s in range(2)]
    row = comparison.metrics['gains'][label]
    assert row['interpolation_at_kl'] == pytest.approx(np.mean(gains))
    assert row['interpolation_at_kl_low'] == pytest.approx(min(gains))  # of two seeds a resample often has one twice
    assert row['interpolation_at_kl_high'] == pytest.approx(max(gains))
    assert row['interpolation_at_kl_above'] == sum(g > 0 for g in gains)


def test_section_of_the_report(compared, tmp_path):
    page = report.Report('title')
    lewis_report.write_section(page, tiny(), compared[2])
    page.save(tmp_path / 'report.html')
    text = (tmp_path / 'report.html').read_text()
    assert text.count('<img') == 5 and text.count('<table') == 2
    for label in ('A2C alone', 'KL to the initial policy, β 0.5', 'interpolation, α 0.5',
                  'Elastic Reset, decay 0.5, after the reset'):
        assert label in text
    assert json.dumps(compared[2].metrics, allow_nan=False)


def test_another_config_in_the_same_workdir_is_refused(compared):
    config = tiny()
    config.hidden = 7
    with pytest.raises(ValueError, match='another config: .*; choose another --workdir or delete it'):
        lewis.compare(config, compared[0], QUIET)


@pytest.mark.parametrize('field, value, message', [
    ('seeds', (0, -1), r'config.seeds=\(0, -1\): none may be negative'),
    ('elastic.period', 80, r'elastic.period=80 is longer than the run of 40 steps: it would never reset'),
    ('elastic.period', 15, 'log_every=10 must divide elastic.period=15'),
    ('elastic.period', 30, r'config.elastic.period=30 must divide training.num_steps=40'),
    ('elastic.tick_every', 0, r'elastic.tick_every=0 must be'),
    ('methods.elastic_reset.decays', (0.5, 1.5), r'config.methods.elastic_reset.decays: 1.5 must be in \[0, 1\]'),
    ('methods.elastic_reset.decays', (0.5, 0.5), 'is given twice'),
    ('methods.fixed_reference.kl_coefficients', (0.1,), 'must have 0.0: the plain run'),
    ('methods.ema_anchor.kl_coefficients', (-0.1,), 'ema_anchor.kl_coefficients: -0.1 must be at least 0'),
    ('methods.ema_anchor.kl_coefficients', (), 'ema_anchor.kl_coefficients is empty'),
    ('alphas', (0.5, 1.0), r'config.alphas=\(0.5, 1.0\) must have 0.0 and 1.0'),
    ('seeds', (3,), r'config.seeds=\(3,\): two or more, each once'),
    ('training.method', 'ppo', "method='ppo' is not one of"),
    ('elastic.agents', 'listener', "config.elastic.agents='listener' is not one of"),
    ('imitation.speaker_steps', 0, 'imitation.speaker_steps=0 must be at least 1'),
    ('imitation.learning_rate', 0.0, 'imitation.learning_rate=0.0 must be positive'),
    ('imitation.listener_target', 'words', "imitation.listener_target='words' is not one of"),
    ('training.temperature', 0.0, 'temperature=0.0 must be positive'),
    ('training.listener_pace', 2.0, r'listener_pace=2.0 must be in \[0, 1\]'),
    ('game.supervised', 0.01, 'supervised: no object of 9 is left'),
])
def test_bad_settings_are_one_line_before_anything_is_written(field, value, message, tmp_path):
    config = tiny().unlock()
    *path, last = field.split('.')
    functools.reduce(getattr, path, config)[last] = value
    with pytest.raises(ValueError, match=message) as error:
        lewis.compare(config, tmp_path / 'run', QUIET)
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('argument, message', [
    ('--config=configs/rlhf/lewis.py:huge', "error: lewis: size 'huge' is not one of"),
    ('--config.methods.elastic_rest.decays=(0.5,)', 'did you mean config.methods.elastic_reset?'),
    ('--workdri=x', 'did you mean --workdir?'),
    ('--workdir=gs://bucket/run', 'needs a local folder'),
])
def test_command_refuses(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['lewis', argument])
    with pytest.raises(SystemExit) as stop:
        launch.main(command.main)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_method_that_there_is_not(tmp_path):
    config = tiny().unlock()
    config.methods.elastic_rest = config.methods.elastic_reset
    with pytest.raises(ValueError, match='config.methods.elastic_rest is not a field; did you mean .*elastic_reset'):
        lewis.compare(config, tmp_path, QUIET)


@pytest.mark.parametrize('size, steps, period, rate', [('a2c', 50_000, 2000, 1e-4), ('gumbel', 50_000, 2000, 1e-4),
                                                       ('reinforce', 25_000, 5000, 1e-3)])
def test_published_settings(size, steps, period, rate):
    config = config_lib.get_config(size)
    runs.check(config)
    assert (config.training.method, config.training.num_steps, config.training.learning_rate) == (size, steps, rate)
    settings = runs.elastic(config, 'elastic_reset')
    assert settings.resets(steps)[:2] == [period - 1, 2 * period - 1]
    assert settings.due('step', 0).tick and settings.due('step', 100).tick and not settings.due('step', 99).tick
    assert config.methods.elastic_reset.decays == (0.995,)
    assert config.training.temperature == (10.0 if size == 'gumbel' else 1.0)


@pytest.mark.parametrize('agents', ['speaker', 'both'])
def test_who_is_reset(agents):
    """An average that stays where it began takes back whom it is of."""
    config = tiny().unlock()
    config.elastic.agents = agents
    game = lewis_task.Game(config.game.properties, config.game.types)
    start = lewis_task.init(jax.random.key(0), game, config.hidden)
    objects = jnp.asarray(game.objects())
    training = lewis_task.Training(**config.training)
    params, _ = jax.jit(lambda p: lewis_task.train(jax.random.key(1), p, game, objects, objects, training,
                                                   runs.elastic(config, 'reset_to_init')))(start)
    jax.tree.map(np.testing.assert_array_equal, params['speaker'], start['speaker'])
    moved = np.abs(params['listener']['types']['kernel'] - start['listener']['types']['kernel']).max()
    assert moved == 0 if agents == 'both' else moved > 1e-4  # its pace is 0.003 of the speaker's


def test_quickstart_settings():
    config = config_lib.get_config()
    runs.check(config)
    assert len(config.seeds) >= 5 and len(runs.elastic(config, 'elastic_reset').resets(config.training.num_steps)) >= 4


@pytest.mark.parametrize('num_steps, log_every, chunk', [(50_000, 500, 2000), (1000, 50, 1000), (40, 10, 40),
                                                         (9000, 3000, 3000), (2800, 400, 400)])
def test_signals_are_looked_for_between_blocks_of_log_points(num_steps, log_every, chunk):
    assert lewis.chunk_steps(lewis_task.Training(num_steps=num_steps, log_every=log_every)) == chunk

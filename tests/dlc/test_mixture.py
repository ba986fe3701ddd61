"""The toy mixture: its density, the divergence that is measured, and the comparison."""
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tqdm import tqdm

from configs.dlc import mixture as config_lib
from experiments import mixture as command
from experiments.dlc import mixture
from experiments.dlc.mixture import Mixture
from experiments.runtime import report

QUIET = functools.partial(tqdm, disable=True)
NINE = Mixture(9, 0.04, 2.0)


def test_modes_stand_on_a_square_grid_about_the_origin():
    centers = NINE.centers
    assert centers.shape == (9, 2)
    assert {*map(tuple, centers.tolist())} == {(a, b) for a in (-2, 0, 2) for b in (-2, 0, 2)}
    x, index = jax.jit(lambda key: NINE.draw(key, 4000))(jax.random.key(0))
    np.testing.assert_allclose(np.std(x, 0), NINE.deviation, rtol=0.03)
    np.testing.assert_allclose((x - centers[index]).var(0), 0.04, rtol=0.1)
    np.testing.assert_allclose(np.bincount(index, minlength=9) / 4000, 1 / 9, atol=0.02)


def test_density_is_that_of_the_gaussians():
    x = np.random.default_rng(0).normal(0, 2, (300, 2))
    want = np.log(np.mean([stats.multivariate_normal(c, 0.04).pdf(x) for c in NINE.centers], 0))
    np.testing.assert_allclose(jax.jit(NINE.log_density)(jnp.asarray(x)), want, rtol=1e-3, atol=1e-3)


def test_bandwidth_is_silvermans_for_one_mode():
    one = np.random.default_rng(0).normal(0, math.sqrt(0.04), (2, 500))
    estimate = stats.gaussian_kde(one, bw_method='silverman')
    np.testing.assert_allclose(mixture.bandwidth(NINE, 9 * 500) / math.sqrt(0.04), estimate.factor, rtol=1e-6)


def test_divergence_is_low_for_exact_draws_and_counts_lost_modes():
    @jax.jit
    def measured(key):
        drawn, index = NINE.draw(jax.random.fold_in(key, 0), 4096)
        lost = jnp.where((index == 8)[:, None], drawn - 2.0, drawn)  # one mode's draws are given to its neighbour
        wide = NINE.deviation * jax.random.normal(key, drawn.shape)
        return [mixture.divergence(NINE, jax.random.fold_in(key, 1), x) for x in (drawn, lost, wide)]
    floor, lost, wide = measured(jax.random.key(1))
    # Against one Gaussian of the whole deviation: its cross entropy less the entropy of nine modes far apart.
    apart = math.log(2 * math.pi * NINE.deviation ** 2) + 1 - (math.log(2 * math.pi * 0.04) + 1 + math.log(9))
    assert 0 < floor < 0.05 and wide == pytest.approx(apart, abs=0.15) and lost > floor + 1


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('mixture')
    return workdir, mixture.compare(config_lib.get_config('tiny'), workdir, QUIET)


def test_the_index_is_read_and_the_comparison_is_repeatable(compared, monkeypatch):
    workdir, metrics = compared
    assert {name: set(rows) for name, rows in metrics.items()} == dict.fromkeys(('none', 'index', 'floor'), {'4'})
    assert all(row['kl'] > metrics['floor'][modes]['kl'] for rows in (metrics['none'], metrics['index'])
               for modes, row in rows.items())  # six steps teach nothing
    (workdir / 'index_4.npz').unlink()  # as if it had been interrupted there
    made = []
    run = mixture.run
    monkeypatch.setattr(mixture, 'run', lambda *args: made.append(args[2]) or run(*args))
    assert mixture.compare(config_lib.get_config('tiny'), workdir, QUIET) == metrics and made == ['index']
    with np.load(workdir / 'none_4.npz') as none, np.load(workdir / 'index_4.npz') as index:
        assert none['samples'].shape == index['samples'].shape == (2, 512, 2)
        assert np.abs(none['samples'] - index['samples']).max() > 1e-4


def test_the_command_writes_a_report(compared, monkeypatch, capsys):
    workdir, metrics = compared
    monkeypatch.setattr(sys, 'argv', ['mixture', '--config=configs/dlc/mixture.py:tiny', f'--workdir={workdir}'])
    command.main()
    printed = capsys.readouterr().out
    row = metrics['index']['4']
    assert f'| on the index of the mode | {report.with_spread(row["kl"], row["kl_std"])} |' in printed
    assert (workdir / 'report.html').read_text().count('<img') == 3


@pytest.mark.parametrize('change, match', [
    (dict(modes=(4, 5)), '5 is not a square number'), (dict(modes=()), 'one number or more'),
    (dict(modes=(4, 4)), 'each once'), (dict(variance=0.0), 'variance=0.0 must be positive'),
    (dict(num_steps=0), 'num_steps=0 must be at least 1'), (dict(sample_steps=1), 'sample_steps=1 must lie in 2..1000'),
    (dict(seeds=(3,)), 'two or more, each once'), (dict(seeds=(3, -1)), 'none negative')])
def test_settings_that_mean_nothing_are_named(tmp_path, change, match):
    config = config_lib.get_config('tiny')
    config.update(change)
    with pytest.raises(ValueError, match=match):
        mixture.compare(config, tmp_path, QUIET)

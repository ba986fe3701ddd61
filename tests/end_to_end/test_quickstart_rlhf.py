"""The language quickstart's tiny config: everything it promises is written, and interruptions change no number."""
import json
import shutil

import pytest

from configs.rlhf import quickstart as config_lib
from experiments.quickstarts import rlhf as quickstart
from experiments.runtime import signals

pytestmark = pytest.mark.slow


def get_config():
    """Two methods of the Lewis game; rlhf/test_lewis_comparison.py has all."""
    config = config_lib.get_config('tiny').copy_and_resolve_references().unlock()
    config.lewis.methods = dict(fixed_reference=dict(kl_coefficients=(0.0,), decays=()),
                                elastic_reset=dict(kl_coefficients=(0.0,), decays=(0.95,)))
    return config.lock()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    return workdir, quickstart.run(get_config(), workdir)


def test_report_and_metrics_hold_what_is_promised(uninterrupted):
    workdir, metrics = uninterrupted
    assert metrics == json.loads((workdir / 'metrics.json').read_text())
    assert list(metrics['methods']) == ['fine-tuned', 'synchronous', 'asynchronous', 'learned reward']
    for row in metrics['methods'].values():
        assert {'accuracy', 'gold', 'kl', 'perplexity', 'length'} <= set(row)
    assert metrics['methods']['fine-tuned']['kl'] == pytest.approx(0, abs=1e-5)
    # Batches 0 and 1 come from version 0, all others from the version before.
    assert metrics['staleness']['synchronous'] == {'mean': 0, 'greatest': 0}
    assert metrics['staleness']['asynchronous']['greatest'] == 1
    assert {'gold_first', 'gold_best', 'gold_last', 'reward_first', 'reward_last'} <= set(metrics['over_optimisation'])
    assert 0 <= metrics['reward_model_accuracy'] <= 1 and metrics['lewis']
    page = (workdir / 'report.html').read_text()
    for part in ('Methods', 'A reward that can be checked', 'Who waits for whom', 'A reward that is learned',
                 'Elastic Reset on the Lewis game', 'learner idle', 'generator idle', 'realised staleness'):
        assert part in page
    assert page.count('<img') >= 11 and 'src="http' not in page
    assert set(json.loads((workdir / 'seconds.json').read_text())) >= {'fine-tuning', 'synchronous', 'asynchronous'}


def test_interrupted_in_an_asynchronous_run_the_numbers_are_the_same(uninterrupted, tmp_path, monkeypatch):
    """All stages but one run and the last are there; that run is stopped with a batch in flight, then goes on."""
    whole, metrics = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns('asynchronous_1', 'metrics.json', 'report.html'))
    config, taken = get_config(), iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, 'agreed', lambda self: next(taken) == 4)
        with pytest.raises(signals.Stopped) as stop:
            quickstart.run(config, again)
    assert 'asynchronous_1: stopped by signal at step 4 of 6' in stop.value.message
    assert not (again / 'metrics.json').exists()
    assert quickstart.run(config, again) == metrics


def test_another_config_in_the_same_workdir_is_refused(uninterrupted):
    other = get_config().unlock()
    other.sft.seed = 1
    with pytest.raises(ValueError, match='another config: .*; choose another --workdir or delete it'):
        quickstart.run(other, uninterrupted[0])

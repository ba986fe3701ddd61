"""Which checkpoints stay, and reading one that is not the newest."""
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import curve, metrics, processes, steps
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.hooks import Metrics
from experiments.runtime.retention import Retention, best_by

REWARDS = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.5, 5: 0.3, 6: 0.4, 7: 0.1, 8: 0.2}


def fill(directory, retention, measured=lambda step: {'eval_reward': REWARDS[step]}, last=8):
    """Saves steps 1..last, each with its number as state, by two checkpointers as an interrupted run has them."""
    for steps_saved in (range(1, 4), range(4, last + 1)):
        checkpointer = Checkpointer(directory / 'checkpoints', keep=retention)
        for step in steps_saved:
            checkpointer.save(step, {'w': jnp.full(2, step)}, measured=measured(step))
        checkpointer.close()
    checkpointer = Checkpointer(directory / 'checkpoints', read_only=True)
    kept = checkpointer.steps()
    checkpointer.close()
    return kept


@pytest.mark.parametrize('retention, kept', [
    (Retention(2), [7, 8]), (Retention(1, every=3), [3, 6, 8]), (Retention(1, metric='eval_reward'), [2, 8]),
    (Retention(1, metric='eval_reward', lowest=True), [7, 8]),
    (Retention(2, every=4, metric='eval_reward'), [2, 4, 7, 8])], ids=['newest', 'every', 'best', 'lowest', 'all'])
def test_what_stays(tmp_path, retention, kept):
    assert fill(tmp_path, retention) == kept


def test_a_step_without_its_metric_is_no_candidate_and_said_once(tmp_path, caplog):
    measured = lambda step: {'eval_reward': REWARDS[step]} if step in (3, 5) else {'loss': 1.0}
    assert fill(tmp_path, Retention(1, metric='eval_reward'), measured) == [5, 8]
    lines = [record.message for record in caplog.records if 'keep=best:eval_reward: no value of it' in record.message]
    assert len(lines) == 2 and 'at step 1 (there are loss)' in lines[0] and 'at step 4' in lines[1]  # one a start


@pytest.mark.parametrize('lowest, best', [(False, 5), (True, 6)])
def test_steps_kept_by_another_metric_are_the_worst(tmp_path, lowest, best):
    assert fill(tmp_path, Retention(1, metric='loss', lowest=True), lambda step: {'loss': 1 / step}, last=4) == [4]
    checkpointer = Checkpointer(tmp_path / 'checkpoints', keep=Retention(1, metric='eval_reward', lowest=lowest))
    for step, reward in ((5, -1.0), (6, -3.0), (7, -2.0)):
        checkpointer.save(step, {'w': jnp.full(2, step)}, measured={'eval_reward': reward})
    assert checkpointer.steps() == [best, 7]
    checkpointer.close()


def test_how_keep_is_written():
    assert best_by('') == ('', False)
    assert best_by('best:eval_reward') == ('eval_reward', False)
    assert best_by('best:heldout_loss') == ('heldout_loss', True)
    assert best_by('best:eval_kl:max') == ('eval_kl', False) and best_by('best:accuracy:min') == ('accuracy', True)
    for metric in ('nll_en', 'ce_de', 'ce_pairs', 'fluency_en', 'image_median_rank', 'eval_kl_per_token', 'loss_ibot',
                   'nats_per_token', 'drift_perplexity', 'samples.frechet', 'sfid', 'judge_losses'):
        assert best_by(f'best:{metric}') == (metric, True)
    for metric in ('bleu_de', 'image_recall_1', 'image_first_of_20', 'eval_accuracy', 'eval_confidence'):
        assert best_by(f'best:{metric}') == (metric, False)
    for wrong in ('best', 'best:', 'newest:loss', 'best:loss:least'):
        with pytest.raises(ValueError, match="write 'best:METRIC'"):
            best_by(wrong)


def test_any_step_is_read_and_one_that_was_not_kept_is_named(tmp_path):
    assert fill(tmp_path, Retention(1, every=3)) == [3, 6, 8]
    like = {'w': jax.ShapeDtypeStruct((2,), jnp.int32)}
    checkpointer = Checkpointer(tmp_path / 'checkpoints', read_only=True)
    for step, found in ((3, 3), (6, 6), (None, 8)):
        number, state, _ = checkpointer.restore(like, step=step)
        assert number == found
        np.testing.assert_array_equal(state['w'], [found] * 2)
    with pytest.raises(ValueError, match=r'--step=4: .*checkpoints holds steps 3, 6, 8'):
        checkpointer.restore(like, step=4)
    checkpointer.close()
    assert steps.of_run('all', tmp_path) == [3, 6, 8] and steps.of_run('last', tmp_path) == [8]
    assert steps.wanted('last', tmp_path, 'x.npz') == [None] and steps.wanted('last', tmp_path, '{step}') == [8]
    assert steps.placed('a/{step}.npz', 6) == 'a/6.npz' and steps.placed('a.npz', None) == 'a.npz'
    with pytest.raises(ValueError, match='no checkpoint there yet'):
        steps.of_run('all', tmp_path / 'nothing')
    for step, outputs, message in (('newest', (), "give a checkpoint's step"), ('-1', (), "give a checkpoint's step"),
                                   ('all', ('x.npz',), 'x.npz would be written once for each checkpoint')):
        with pytest.raises(ValueError, match=message):
            steps.check(step, *outputs)


def test_metrics_of_a_state_are_those_measured_of_it():
    measured = Metrics()
    measured.note(4, {'eval_reward': 1.0})
    measured.note(7, {'loss': 2.0})
    assert measured.measured(8) == {'loss': 2.0} and measured.measured(4) == {'eval_reward': 1.0}
    assert measured.measured(6) == {}  # of a later state


def test_what_is_measured_is_what_process_0_finds(tmp_path, monkeypatch):
    """Another process, whose disk shows other rows and samples, leaves none of the steps out and adds none."""
    curve.Curve(tmp_path / 'curve.jsonl', 'a').add(2, {'loss': 1.0})
    (tmp_path / '2.npz').touch()
    places = [f'{tmp_path}/{{step}}.npz']
    assert curve.Curve(tmp_path / 'curve.jsonl', 'a').missing([2, 4]) == [4]
    assert steps.of_places('all', places) == [2]
    monkeypatch.setattr(processes, 'agreed', lambda value: [2, 4])
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    assert curve.Curve(tmp_path / 'curve.jsonl', 'a').missing([2, 4]) == [2, 4]
    assert steps.of_places('all', places) == [2, 4]
    assert steps.of_places('all', [f'{tmp_path}/late/{{step}}.npz']) == [2, 4]


def test_a_flag_that_came_later_leaves_earlier_curves_what_they_are():
    flags = argparse.Namespace(temperature=1.0, json='a', min_new_tokens=None)
    before = curve.settings_of(argparse.Namespace(temperature=1.0, json='b'))
    assert curve.settings_of(flags) == before
    flags.min_new_tokens = 0
    assert curve.settings_of(flags) != before


def test_a_curve_goes_on_and_mixes_nothing(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
    for step in (2, 4):
        writer.write(step, {'loss': 1.0, 'seconds_per_step': 1800.0})
    writer.close()
    path = tmp_path / 'curve.jsonl'
    first = curve.Curve(path, 'a', run=tmp_path)
    assert first.missing([2, 4, 6]) == [2, 4, 6]
    first.add(4, {'samples': {'frechet': 3.0}})
    again = curve.Curve(path, 'a', run=tmp_path)
    assert again.missing([2, 4, 6]) == [2, 6]
    again.add(2, {'samples': {'frechet': 5.0}})
    again.add(6, {'samples': {'frechet': 2.0}})
    assert metrics.read_metrics(path) == [
        {'step': 2, 'hours': 1.0, 'samples.frechet': 5.0, 'settings': 'a'},
        {'step': 4, 'hours': 2.0, 'samples.frechet': 3.0, 'settings': 'a'},
        {'step': 6, 'samples.frechet': 2.0, 'settings': 'a'}]
    with pytest.raises(ValueError, match='measured with other flags'):
        curve.Curve(path, 'b')
    path.write_text('{"fid": 3}')
    with pytest.raises(ValueError, match='holds no curve'):
        curve.Curve(path, 'a')

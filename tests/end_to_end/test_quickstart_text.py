"""The quickstarts of text to image and, on its stages, of learning from pictures, at their tiny configs.

Everything they promise is written, and interruptions change no number.
"""
import functools
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from configs.dlc import quickstart_align
from configs.dlc import quickstart_text as config_lib
from experiments.dlc.text_to_code import TextToCode
from experiments.quickstarts import align
from experiments.quickstarts import text_to_image as quickstart
from experiments.runtime import signals, stages
from experiments.runtime.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('on_one_device')]


PROMPTS = quickstart.PROMPTS


@pytest.fixture(scope='module')
def few_prompts():
    """One way of putting each pair of digits, not four: all are drawn, again and again."""
    few = PROMPTS[::4]
    labels = np.array([label for label, _ in few])
    with pytest.MonkeyPatch.context() as patch:
        for module in (quickstart, align):
            patch.setattr(module, 'PROMPTS', few)
        for name, value in (('TEXTS', tuple(text for _, text in few)), ('LABELS', labels),
                            ('SEEN', ~quickstart.UNSEEN[labels])):
            patch.setattr(align, name, value)
        yield


def get_config():
    config = config_lib.get_config('tiny').copy_and_resolve_references().unlock()
    config.sample_batch = 20  # divides the numbers of prompts and of held-out images
    return config.lock()


@pytest.fixture(scope='module')
def uninterrupted(few_prompts, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    return workdir, quickstart.run(get_config(), workdir)


def test_report_and_metrics_hold_what_is_promised(uninterrupted):
    workdir, metrics = uninterrupted
    assert metrics == json.loads((workdir / 'metrics.json').read_text())
    for kind in ('seen', 'unseen'):
        row = metrics['methods'][f'text to image, {kind} pairs']
        assert {'both', 'both_std', 'upper', 'upper_std', 'lower', 'lower_std'} == set(row)
        real = metrics['methods'][f'held-out images, {kind} pairs']
        assert real['both'] > 0.8 and real['both'] <= min(real['upper'], real['lower'])  # whatever was trained
        assert {f'{what}, {kind} pairs' for what in ('text to code', 'codes of held-out images',
                                                     'images from codes of held-out images')} <= set(metrics['methods'])
    draws = np.load(workdir / 'samples' / 'text_1.npz')
    assert draws['images'].shape == (100, 16, 16, 1) and draws['codes'].shape == (100, 32)
    page = (workdir / 'report.html').read_text()
    for part in ('Does the image show what the text says?', 'Samples', 'Training', 'a zero above a zero (seen pair)',
                 'a zero above a three (unseen pair)', 'both digits right'):
        assert f'>{part}<' in page
    assert page.count('<img') == 9 + 7 + 1 + 3 and 'src="http' not in page


def test_interrupted_while_the_text_model_trains_the_numbers_are_the_same(uninterrupted, tmp_path, monkeypatch):
    whole, metrics = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns('text_to_code', 'text_1.npz', 'metrics.json'))
    (again / 'samples' / 'text_0.npz').unlink()
    config, taken = get_config(), iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, 'agreed', lambda self: next(taken) == 3)
        with pytest.raises(signals.Stopped):
            quickstart.run(config, again)
    assert not (again / 'metrics.json').exists()
    assert quickstart.run(config, again) == metrics


def test_what_is_said_is_compared_with_what_is_seen():
    upper, lower, labels = np.array([7, 7, 1, 0]), np.array([2, 3, 2, 0]), np.array([72, 72, 72, 0])
    assert quickstart.shares(upper, lower, labels) == {'both': 0.5, 'upper': 0.75, 'lower': 0.75}
    assert [label for label, _ in PROMPTS][::4] == list(range(100))
    assert PROMPTS[4 * 72 + 2][1] == 'a two below a seven' and quickstart.UNSEEN.sum() == 20


# ---- Learning from pictures ------------------------------------------------------------------------------------------

def align_config(text):
    config = quickstart_align.get_config('tiny').copy_and_resolve_references()
    config.text = str(text)
    config.text_to_image.sample_batch = 20
    config.methods = 'Online DPO, asynchronous', 'Online DPO, Elastic Reset'
    return config


@pytest.fixture(scope='module')
def aligned(uninterrupted, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('aligned')
    return workdir, align.run(align_config(uninterrupted[0]), workdir)


def test_report_and_metrics_of_learning_from_pictures(aligned):
    workdir, metrics = aligned
    assert metrics == json.loads((workdir / 'metrics.json').read_text())
    assert list(metrics['methods']) == ['fine-tuned', 'Online DPO, asynchronous', 'Online DPO, Elastic Reset',
                                        'Online DPO, asynchronous, 0.5 of the way']
    for name, row in metrics['methods'].items():
        assert set(row) == set(align.HEADINGS) and all(map(np.isfinite, row.values()))
        assert (row['kl'] == 0) == (name == 'fine-tuned')
    for judge in ('proxy', 'gold'):  # of real pictures, whatever was trained
        assert min(metrics['judges'][judge].values()) > 0.6
    staleness = lambda name: read_metrics(workdir / f'{name}_1' / 'metrics.jsonl')[-1]['token_staleness']
    assert staleness('elastic_reset') == 0 and staleness('online_dpo_async') == 1
    assert any(row['reset'] for row in read_metrics(workdir / 'elastic_reset_1' / 'metrics.jsonl'))
    page = (workdir / 'report.html').read_text()
    for part in ('Methods', 'Reward against drift', 'Training', 'Before and after, from the same noise',
                 'both right, unseen pairs', 'proxy reward'):
        assert f'>{part}<' in page


@pytest.mark.parametrize('fields, message', [
    (dict(methods=()), r'methods=\(\): name some of'),
    (dict(methods=('Best-of-M',)), "methods='Best-of-M' is not one of .*; did you mean 'Best-of-N'"),
    (dict(interpolate=(0.5, 1.5)), 'interpolate=0.5,1.5: shares of the way from start to end, between 0 and 1'),
    (dict(text='mistyped'), 'text=mistyped: holds no text quickstart; give the --workdir of one, or leave it empty'),
])
def test_what_means_nothing_is_refused_before_anything_is_trained(fields, message, tmp_path, monkeypatch):
    config = quickstart_align.get_config('tiny').copy_and_resolve_references()
    config.update(fields)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, 'train_models', None)
    with pytest.raises(ValueError, match=message):
        align.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_control_is_between_the_start_and_a_trained_model(aligned, uninterrupted):
    workdir, _ = aligned
    ends = [functools.partial(TextToCode.load, place)
            for place in (uninterrupted[0] / 'text_to_code', workdir / 'online_dpo_async_1')]
    start, end = (model().params for model in ends)
    halfway = align.between(*ends, 0.5).params
    chex.assert_trees_all_close(halfway, jax.tree.map(lambda a, b: (a + b) / 2, start, end), rtol=1e-6, atol=1e-7)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), start, end)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_judges_and_captions_keep_to_their_digits(aligned):
    workdir, _ = aligned
    rows = {name: [json.loads(line) for line in (workdir / 'captions' / f'{name}.jsonl').read_text().splitlines()]
            for name in ('seen', 'unseen')}
    labels = {name: {row['label'] for row in of_split} for name, of_split in rows.items()}
    assert len(rows['seen']) == 80 and len(rows['unseen']) == 20
    assert not labels['seen'] & labels['unseen'] and len(labels['seen'] | labels['unseen']) == 100
    proxy, gold = (np.load(workdir / 'judges' / name / 'judge.npz')['weight_0'] for name in ('proxy', 'gold'))
    assert (proxy != gold).any()


def test_a_method_of_several_seeds_has_their_mean_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(align, 'measure_model', lambda config, judges, real, draws, *_: {'seen': draws})
    runs = {'Online DPO': {'online_dpo_1': None, 'online_dpo_2': None}, 'Best-of-N': {'best_of_n_1': None}}
    sets = {'fine-tuned': 0.5, 'online_dpo_1': 0.6, 'online_dpo_2': 0.8, 'best_of_n_1': 0.7}
    pictures = type('Store', (), {'array': lambda self, name: np.zeros((1, 2, 2, 1))})()
    stores = {'heldout': pictures, 'unseen': pictures}
    assert align.measure(None, {}, stores, sets, dict.fromkeys(sets), runs)['methods'] == {
        'fine-tuned': {'seen': 0.5}, 'Best-of-N': {'seen': 0.7},
        'Online DPO': {'seen': pytest.approx(0.7), 'seen_std': pytest.approx(0.02 ** 0.5)}}


def test_interrupted_while_a_policy_learns_from_pictures_the_numbers_are_the_same(
        uninterrupted, aligned, tmp_path, monkeypatch):
    whole, metrics = aligned
    again = tmp_path / 'again'
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns('elastic_reset_1*', 'metrics.json'))
    config, taken = align_config(uninterrupted[0]), iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, 'agreed', lambda self: next(taken) == 3)
        with pytest.raises(signals.Stopped):
            align.run(config, again)
    assert not (again / 'metrics.json').exists()
    assert align.run(config, again) == metrics


def test_a_text_quickstart_of_another_config_leaves_the_work_directory_alone(tmp_path):
    config = quickstart_align.get_config('tiny').copy_and_resolve_references()
    config.text = str(tmp_path / 'text')
    other = config.text_to_image.copy_and_resolve_references()
    other.sample_batch += 1
    stages.claim(other, config.text)
    with pytest.raises(ValueError, match='text holds a run with another config: sample_batch'):
        align.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_stages_that_are_not_given_are_trained(tmp_path, monkeypatch):
    config, asked = quickstart_align.get_config('tiny'), []

    def train(config, workdir, clock):
        asked.append((config, workdir))
        raise InterruptedError
    monkeypatch.setattr(quickstart, 'train_models', train)
    with pytest.raises(InterruptedError):
        align.run(config, tmp_path)
    assert asked == [(config.text_to_image, tmp_path / 'text')]

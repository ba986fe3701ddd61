"""The quickstart of learning from pictures, at its tiny config: what it promises is written, and interruptions change
no number."""
import json
import shutil

import numpy as np
import pytest

from configs.dlc import quickstart_align as config_lib
from experiments.quickstarts import align as quickstart
from experiments.runtime import signals
from experiments.runtime.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('on_one_device')]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    return workdir, quickstart.run(config_lib.get_config('tiny'), workdir)


def test_report_and_metrics_hold_what_is_promised(uninterrupted):
    workdir, metrics = uninterrupted
    assert metrics == json.loads((workdir / 'metrics.json').read_text())
    assert list(metrics['methods']) == ['fine-tuned', *config_lib.METHODS]
    for name, row in metrics['methods'].items():
        assert set(row) == set(quickstart.HEADINGS) and all(map(np.isfinite, row.values()))
        assert (row['kl'] == 0) == (name == 'fine-tuned')
    for judge in ('proxy', 'gold'):  # of real pictures, whatever was trained
        assert min(metrics['judges'][judge].values()) > 0.6
    staleness = lambda name: read_metrics(workdir / f'{name}_1' / 'metrics.jsonl')[-1]['token_staleness']
    assert staleness('online_dpo') == 0 and staleness('online_dpo_async') == 1
    assert any(row['reset'] for row in read_metrics(workdir / 'elastic_reset_1' / 'metrics.jsonl'))
    page = (workdir / 'report.html').read_text()
    for part in ('Methods', 'Training', 'Before and after, from the same noise', 'both right, unseen pairs',
                 'proxy reward'):
        assert f'>{part}<' in page


def test_judges_and_captions_keep_to_their_digits(uninterrupted):
    workdir, _ = uninterrupted
    rows = {name: [json.loads(line) for line in (workdir / 'captions' / f'{name}.jsonl').read_text().splitlines()]
            for name in ('seen', 'unseen')}
    labels = {name: {row['label'] for row in of_split} for name, of_split in rows.items()}
    assert len(rows['seen']) == 320 and len(rows['unseen']) == 80
    assert not labels['seen'] & labels['unseen'] and len(labels['seen'] | labels['unseen']) == 100
    proxy, gold = (np.load(workdir / 'judges' / name / 'judge.npz')['weight_0'] for name in ('proxy', 'gold'))
    assert (proxy != gold).any()


def test_interrupted_while_a_policy_learns_and_given_the_text_stages_the_numbers_are_the_same(
        uninterrupted, tmp_path, monkeypatch):
    whole, metrics = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns('best_of_n_1*', 'metrics.json', 'text'))
    config = config_lib.get_config('tiny').copy_and_resolve_references()
    config.text = str(whole / 'text')
    (again / 'config.json').unlink()
    taken = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, 'agreed', lambda self: next(taken) == 3)
        with pytest.raises(signals.Stopped):
            quickstart.run(config, again)
    assert not (again / 'metrics.json').exists()
    assert quickstart.run(config, again) == metrics

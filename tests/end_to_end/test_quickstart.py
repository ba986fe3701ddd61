"""The quickstart's tiny config: everything it promises is written, and interruptions change no number."""
import functools
import json
import shutil

import numpy as np
import pytest

from configs.dlc import quickstart as config_lib
from experiments.dlc.data import sources
from experiments.quickstarts import dlc as quickstart
from experiments.runtime import modules, signals, stages

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('on_one_device', 'few_digits')]


@pytest.fixture(scope='module')
def few_digits():
    """Every sixth image of each split, in batches of 64: all of them are encoded, sampled from and measured against,
    again and again."""
    rows, encode = sources.split_rows, quickstart.encode_lib.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'split_rows', lambda *split: rows(*split)[::6])
        patch.setattr(quickstart.encode_lib, 'encode', functools.partial(encode, batch_size=64))
        yield


def get_config():
    config = config_lib.get_config('tiny').copy_and_resolve_references().unlock()
    config.sample_batch = 64
    return config.lock()


@pytest.fixture(scope='module')
def uninterrupted(few_digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    PROGRAMS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, 'Batched', CountedProgram)
        metrics = quickstart.run(get_config(), workdir)
    return workdir, metrics


PROGRAMS = []


class CountedProgram(modules.Batched):
    """A program that notes its making: each is compiled once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        PROGRAMS.append(self.batch_size)


def test_every_seed_and_method_shares_its_model_s_program(uninterrupted):
    # One encodes both splits; models of codes and of embeddings and three generators sample; soft codes, and codes and
    # embeddings of pairs.
    assert len(PROGRAMS) == 1 + 5 + 3


def test_report_and_metrics_hold_what_is_promised(uninterrupted):
    workdir, metrics = uninterrupted
    assert metrics == json.loads((workdir / 'metrics.json').read_text())
    assert set(metrics['methods']) == {*quickstart.METHODS, 'real training images'}
    for row in metrics['methods'].values():
        assert {'frechet', 'precision', 'recall', 'frechet_std', 'nearest_train'} <= set(row)
        assert np.isfinite([row[name] for name in ('frechet', 'precision', 'recall')]).all()
    assert set(metrics['representation']) == {'sem', 'codes', 'embedding'}
    assert set(metrics['codes']) == {'training images', 'held-out images', 'code model'}
    assert {'perplexity', 'dead_entries', 'nearest_train_code'} <= set(metrics['codes']['code model'])
    for row in metrics['composition'].values():
        assert row['first'] + row['second'] == pytest.approx(row['either'])
    page = (workdir / 'report.html').read_text()
    for part in ('Methods', 'Samples', 'Compositions', 'Codes and representation', 'Training'):
        assert f'>{part}<' in page
    # 5 methods and the held-out images, 3 kinds of compositions, 4 plots
    assert page.count('<img') == 13 and 'src="http' not in page


def test_interrupted_at_two_stages_the_numbers_are_the_same(uninterrupted, tmp_path, monkeypatch):
    """One generator and the samples of two methods are missing; stopped in that generator and while sampling; then to
    the end."""
    whole, workdir = uninterrupted[0], tmp_path / 'again'
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns(
        'generator_none', 'unconditional_*.npz', 'code_then_image_1.npz', 'metrics.json', 'report.html'))
    config, taken = get_config(), iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, 'agreed', lambda self: next(taken) == 3)
        with pytest.raises(signals.Stopped) as stop:
            quickstart.run(config, workdir)
    assert 'run the same command to continue' in stop.value.message

    made = []

    def once(path, make):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        return original(path, make)
    original = stages.once
    with monkeypatch.context() as patch:
        patch.setattr(stages, 'once', once)
        with pytest.raises(KeyboardInterrupt):
            quickstart.run(config, workdir)
    assert (workdir / 'generator_none' / 'checkpoints').exists() and not (workdir / 'metrics.json').exists()

    assert quickstart.run(config, workdir) == uninterrupted[1]


def test_another_config_in_the_same_workdir_is_refused(uninterrupted):
    other = get_config().unlock()
    other.encoder.seed = 1
    with pytest.raises(ValueError, match='another config: .*; choose another --workdir or delete it'):
        quickstart.run(other, uninterrupted[0])

"""The benchmark runs whole at sizes that mean nothing, and refuses to time two sides that disagree."""
import json

import pytest

torch = pytest.importorskip('torch')

from benchmarks import dlc, dlc_rows
from benchmarks import torch_reference as reference


def test_every_row_at_tiny_size(tmp_path, capsys):
    rows = ['dit_forward', 'dit_sampling', 'dit_training', 'sedd_sampling']
    report = dlc.main(['--sizes=tiny', '--eager', '--repeats=2', f'--json={tmp_path / "out.json"}', '--rows', *rows])
    printed = capsys.readouterr().out
    assert list(report['rows']) == rows == list(json.loads((tmp_path / 'out.json').read_text())['rows'])
    for name, row in report['rows'].items():
        assert len(row['seconds']['ours']) == len(row['seconds']['eager']) == 2
        assert row['ratio'] > 0 and row['share_of_peak'] > 0 and row['target'] == dlc.TARGETS[name]
        assert name in printed
    assert report['first_step']['seconds']['ours'] > 0 and report['peak_flops'] > 0 and report['versions']['torch']


@pytest.mark.slow
@pytest.mark.parametrize('name', ['encoder_training'])
def test_encoder_row_agrees(name):
    getattr(dlc_rows, name)(dlc.SIZES['tiny'], bf16=False, compiled=False).check()


def test_disagreement_is_an_error_that_names_what_differs(monkeypatch):
    monkeypatch.setattr(reference, 'modulate', lambda x, shift, scale: x * (1.01 + scale[:, None]) + shift[:, None])
    with pytest.raises(dlc.Disagreement, match='DiT forward'):
        dlc_rows.dit_forward(dlc.SIZES['tiny'], bf16=False, compiled=False).check()


def test_bfloat16_rows_agree_too():
    dlc_rows.dit_forward(dlc.SIZES['tiny'], bf16=True, compiled=False).check()


def test_ratio_is_of_medians_against_the_fastest_rival():
    times = {'first/ours': [9.0], 'ours': [1.0, 2.0, 9.0], 'eager': [6.0, 8.0, 7.0], 'compiled': [3.0, 4.0, 5.0],
             'cpu/ours': [1.0, 1.0, 1.0], 'cpu/eager': [3.0, 3.0, 3.0], 'cpu/compiled': [5.0, 5.0, 5.0]}
    result = dlc.verdict('dit_forward', times)
    assert (result['ratio'], result['best_rival'], result['cpu_ratio']) == (2.0, 'compiled', 3.0) and result['reached']

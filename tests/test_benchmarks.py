"""The benchmark runs whole at sizes that mean nothing, and refuses to time two sides that disagree."""
import json

import pytest

torch = pytest.importorskip('torch')

from benchmarks import dlc, dlc_rows  # noqa: E402
from benchmarks import torch_reference as reference  # noqa: E402


@pytest.mark.parametrize('rows', [['dit_forward'], pytest.param(
    ['dit_sampling', 'dit_training', 'sedd_sampling', 'encoder_training', 'loader'], marks=pytest.mark.slow)])
def test_rows_at_tiny_size(rows, tmp_path, capsys):
    report = dlc.main(['--sizes=tiny', '--eager', '--repeats=2', f'--json={tmp_path / "out.json"}', '--rows', *rows])
    printed = capsys.readouterr().out
    assert list(report['rows']) == rows == list(json.loads((tmp_path / 'out.json').read_text())['rows'])
    for name, row in report['rows'].items():
        rival = 'lists' if name == 'loader' else 'eager'
        assert len(row['seconds']['ours']) == len(row['seconds'][rival]) == 2
        assert row['ratio'] > 0 and row['target'] == dlc.TARGETS[name] and name in printed
        assert name == 'loader' or row['share_of_peak'] > 0
    assert report['peak_flops'] > 0 and report['versions']['torch']
    assert 'dit_training' not in rows or report['first_step']['seconds']['ours'] > 0


def test_disagreement_is_an_error_that_names_what_differs(monkeypatch):
    monkeypatch.setattr(reference, 'modulate', lambda x, shift, scale: x * (1.01 + scale[:, None]) + shift[:, None])
    with pytest.raises(dlc.Disagreement, match='DiT forward'):
        dlc_rows.dit_forward(dlc.SIZES['tiny'], bf16=False, compiled=False).check()


@pytest.mark.slow
def test_bfloat16_rows_agree_too():
    dlc_rows.dit_forward(dlc.SIZES['tiny'], bf16=True, compiled=False).check()


def test_ratio_is_of_medians_against_the_fastest_rival():
    times = {'first/ours': [9.0], 'ours': [1.0, 2.0, 9.0], 'eager': [6.0, 8.0, 7.0], 'compiled': [3.0, 4.0, 5.0],
             'cpu/ours': [1.0, 1.0, 1.0], 'cpu/eager': [3.0, 3.0, 3.0], 'cpu/compiled': [5.0, 5.0, 5.0]}
    result = dlc.verdict('dit_forward', times)
    assert (result['ratio'], result['best_rival'], result['cpu_ratio']) == (2.0, 'compiled', 3.0) and result['reached']

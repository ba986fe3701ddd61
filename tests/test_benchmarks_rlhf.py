"""The benchmark of the language half runs whole at sizes that mean nothing, and refuses to time sides that disagree."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import dlc, measure, rlhf, rlhf_policy

FIGURES = {'decode': 3, 'dpo_step': 1, 'overhead': 7, 'overlap': 4, 'publish': 4, 'processes': 2, 'roofline': 1,
           'learner': 1, 'iteration': 1}


@pytest.mark.parametrize('rows', [
    ['decode', 'dpo_step'], ['overhead', 'overlap', 'publish'], ['roofline', 'learner', 'iteration'],
    pytest.param(['processes'], marks=pytest.mark.slow)], ids='+'.join)
def test_rows_at_tiny_size(rows, tmp_path, capsys):
    if 'decode' in rows:
        pytest.importorskip('torch'), pytest.importorskip('transformers')
    report = rlhf.main(['--sizes=tiny', '--eager', '--repeats=2', f'--json={tmp_path / "out.json"}', '--rows', *rows])
    printed = capsys.readouterr().out
    assert list(report['rows']) == rows == list(json.loads((tmp_path / 'out.json').read_text())['rows'])
    for name, row in report['rows'].items():
        assert len(row['figures']) == FIGURES[name]
        assert all(len(values) == 2 for side, values in row['seconds'].items() if 'first/' not in side)
        for figure in row['figures']:
            low, high = figure['turns']
            assert figure['name'] in printed and np.isfinite([low, figure['value'], high]).all()


@pytest.fixture
def planted(monkeypatch):
    """(name) -> PyTorch's models have 1 % more of that tensor than ours."""
    rows = pytest.importorskip('benchmarks.rlhf_rows')
    to_torch = rows.convert.to_torch

    def plant(name):
        def spoilt(*args):
            state = to_torch(*args)
            return state | {name: state[name] * 1.01}
        monkeypatch.setattr(rows.convert, 'to_torch', spoilt)
        return rows
    return plant


def test_decoding_with_another_weight_is_not_timed(planted):
    decode = planted('gpt_neox.layers.1.mlp.dense_4h_to_h.weight').Decode(rlhf.SIZES['tiny'], compiled=False)
    with pytest.raises(measure.Disagreement, match='tokens'):
        decode.check()


def test_a_loop_that_reads_its_cache_wrongly_is_not_timed(monkeypatch):
    rows = pytest.importorskip('benchmarks.rlhf_rows')
    decode = rows.Decode(rlhf.SIZES['tiny'], compiled=False)
    # Decode steps have rotary angles of one position. Tiny weights attend almost evenly, so that leaving the rotation
    # out shows only for some of the tokens that are drawn; with longer queries and keys it shows for any.
    rotate = rows.torch_gpt_neox.rotate
    monkeypatch.setattr(rows.torch_gpt_neox, 'rotate',
                        lambda x, cos, sin: rotate(x, cos, sin) if len(cos) > 1 else 100 * x)
    with pytest.raises(measure.Disagreement, match='tokens of the loop|tokens that the loop drew'):
        decode.check()


def test_a_training_step_with_another_weight_is_not_timed(planted):
    with pytest.raises(measure.Disagreement, match='DPO loss|gradient'):
        planted('gpt_neox.layers.0.attention.query_key_value.bias').DpoStep(rlhf.SIZES['tiny'], compiled=False).check()


def test_figures():
    ratio = measure.figure('x', lambda theirs, ours: theirs / ours, [6.0, 8.0, 7.0], [1.0, 2.0, 9.0], target=3.5)
    assert (ratio.value, ratio.turns, ratio.reached) == (3.5, (7 / 9, 6.0), True) and 'target >= 3.50' in str(ratio)
    bound = measure.figure('x', lambda s: s - 1, [1.02, 1.04, 1.10], target=0.03, at_most=True, form='.0%')
    assert not bound.reached and 'NOT reached' in str(bound) and '4% (2%..10%)' in str(bound)
    assert measure.figure('x', float, [1.0]).reached is None


def test_bytes_of_decoding_by_hand():
    """Two tokens after the first, 3 tokens of prompt: two reads of the weights, and of 4 and 5 slots of both caches."""
    module = rlhf_policy.policy(dict(vocab_size=11, width=8, depth=1, num_heads=2))
    weights = rlhf_policy.num_params(module) - 11 * 8
    assert rlhf_policy.decode_bytes(module, 5, 3, 3) == 4 * (2 * weights + 2 * 5 * 8 * (4 + 5))
    half = module.clone(dtype=jnp.bfloat16)
    assert rlhf_policy.decode_bytes(half, 5, 3, 3) == rlhf_policy.decode_bytes(module, 5, 3, 3) / 2


@pytest.mark.parametrize('half', [dlc, rlhf])
def test_a_gpu_is_asked_for_where_there_is_none(half):
    with pytest.raises(SystemExit, match='not on a GPU'):
        half.main(['--device=gpu'])

"""The GPU benchmark runs whole at sizes that mean nothing, keeps what it has, and its two sides compute the same."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')

from benchmarks import dlc_rows, gpu, gpu_sizes, rlhf_policy, rlhf_rows, torch_gpt_neox
from benchmarks import torch_reference as reference
from benchmarks.measure import random_params
from dlc_jax.diffusion.discrete import DiscreteDiffusion
from dlc_jax.models.sedd import SEDD

inline = lambda work, limit: work()


def test_a_row_at_tiny_size(tmp_path, capsys):
    report = gpu.main(['--sizes=tiny', '--repeats=2', '--rows', 'decode_410m_x64', f'--json={tmp_path / "x.json"}'],
                      run=inline)
    row = report['rows']['decode_410m_x64']
    assert json.loads((tmp_path / 'x.json').read_text())['rows'] == json.loads(json.dumps(report['rows']))
    assert all(len(row[side]['seconds'][work]) == 2 for side in gpu.SIDES for work in ('step', 'prefill'))
    printed = capsys.readouterr().out
    assert 'of bandwidth' in printed and 'PyTorch over ours' in printed


@pytest.mark.slow
def test_all_rows_at_tiny_size():
    rows = [row for row in gpu_sizes.sizes('tiny', 0) if row != 'decode_410m_x64']
    report = gpu.main(['--sizes=tiny', '--repeats=1', '--rows', *rows], run=inline)
    assert all('error' not in out for row in report['rows'].values() for out in row.values())


def test_what_fails_or_does_not_fit_the_time_is_said_and_the_rest_goes_on(capsys):
    def run(work, limit):
        of_a_row = 'row' in work.__code__.co_freevars
        return {'error': 'MemoryError: too large'} if of_a_row else work()
    report = gpu.main(['--sizes=tiny', '--rows', 'dit', 'sedd'], run=run)
    assert report['rows']['sedd']['torch'] == {'error': 'MemoryError: too large'}
    assert capsys.readouterr().out.count('FAILED: MemoryError') == 4


def test_every_published_row_has_both_sides_and_a_target():
    for row in gpu_sizes.sizes('published', 80 * 2 ** 30):
        assert row.split('_')[0] in gpu.TARGETS
        assert all(callable(gpu.builder(row, side)) for side in gpu.SIDES)


def test_two_sides_of_sedd_training_agree():
    model = SEDD(vocab_size=16, length=8, width=32, depth=2, num_heads=2, cond_dim=16)
    process = DiscreteDiffusion(16)
    rng = np.random.default_rng(0)
    x0, t = rng.integers(0, 16, (4, 8)).astype(np.int32), np.array([0.1, 0.4, 0.7, 0.95], np.float32)
    xt = np.where(rng.random((4, 8)) < t[:, None], 16, x0).astype(np.int32)
    params = random_params(jax.eval_shape(model.init, jax.random.key(0), x0, jnp.ones(4))['params'])
    ours = process.example_loss(model.apply({'params': params}, xt, process.sigma(t)), xt, x0, t).mean()
    side = dlc_rows.Side(False)
    twin = side.load(reference.SEDD(vocab_size=16, length=8, width=32, depth=2, num_heads=2, cond_dim=16), 'sedd',
                     model, params)
    theirs = reference.score_entropy(twin, *(torch.tensor(x).long() for x in (x0, xt)), torch.tensor(t))
    side.agree('SEDD training loss', ours, theirs)


def test_graph_decoder_draws_from_the_model():
    """Log-probabilities that it returns are those of its own tokens, two samples a prompt."""
    twins = rlhf_rows.twins(dict(vocab_size=97, width=32, depth=2, num_heads=2), 12)
    tokens = rlhf_policy.prompts(twins.module, 2, 8)[0]
    decoder = torch_gpt_neox.GraphDecoder(twins.torch, 2, 8, 4, num_samples=2)
    drawn, logprobs = decoder(torch.tensor(tokens).long())
    both = np.concatenate([np.tile(tokens, (2, 1)), drawn.numpy().astype(np.int32)], 1)
    want = rlhf_policy.response_logprobs(twins.module, twins.params, jnp.asarray(both), 4)
    np.testing.assert_allclose(logprobs.numpy(), want, rtol=1e-4, atol=1e-4)
    assert len(np.unique(drawn.numpy())) > 2


def test_microbatches_of_pairs_give_the_same_step():
    module = rlhf_policy.policy(dict(vocab_size=97, width=32, depth=1, num_heads=2))
    params = rlhf_policy.params_of(module)
    reference_params = jax.tree.map(lambda x: 0.9 * x, params)
    batch = rlhf_policy.pairs(module, 8, 12, 4)
    steps = [rlhf_policy.Learner(module, params, reference_params, parts).launch(batch) for parts in (1, 2)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), *steps)


def test_no_gpu_is_said():
    if not gpu.gpu_memory():
        with pytest.raises(SystemExit, match='no GPU'):
            gpu.main([], run=inline)

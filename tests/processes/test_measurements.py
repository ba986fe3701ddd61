"""A measurement on two processes of which one was killed goes on where it was, and gives what one process measures."""
import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import jobs
from configs.dlc import quickstart
from experiments import evaluate
from experiments.dlc import encoder
from experiments.dlc.weights import writing
from rlhf_jax import convert
from rlhf_jax.models import gpt2, heads
from rlhf_jax.weights import files
from tests.dlc.random_params import random_params

pytestmark = pytest.mark.slow

BLOCKS_OF_SAMPLES, BLOCKS = 5, 7  # that each of two processes looks at; the rest is of the reference


def test_killed_in_a_measurement(tmp_path, monkeypatch):
    config = quickstart.get_config('tiny').encoder.copy_and_resolve_references().unlock()
    config.weights_only = True
    params = random_params(encoder.make_model(config), jnp.zeros((1, 8, 8, 1)), jnp.zeros((1, 16), bool))
    writing.write_run('sem', config, params, tmp_path / 'encoder')
    rng = np.random.default_rng(0)
    for name, num in (('samples', 80), ('reference', 32)):
        np.savez(tmp_path / f'{name}.npz', arr_0=rng.integers(0, 256, (num, 8, 8, 1), np.uint8))
    command = ('experiments.evaluate', f'--samples={tmp_path}/samples.npz', f'--reference={tmp_path}/reference.npz',
               f'--dinov2={tmp_path}/encoder', '--batch_size=1')
    monkeypatch.setattr('sys.argv', [*command, f'--json={tmp_path}/alone.json'])
    evaluate.main()

    scores, kept = tmp_path / 'scores.json', tmp_path / 'scores.json.partial'
    (tmp_path / 'commands.json').write_text(json.dumps([[*command, f'--json={scores}']]))
    job = lambda killed_at: jobs.run('tests.processes.commands', str(tmp_path / 'commands.json'), processes=2,
                                     devices=1, own={0: (f'--killed_at={killed_at}',)})
    ends = job(BLOCKS_OF_SAMPLES)
    assert ends[0][0] == -signal.SIGKILL and ends[1][0] != 0, ends
    progress, = kept.rglob('00000-of-00002.partial/progress.json')
    assert json.loads(progress.read_text())['done'] == 32 and not scores.exists()  # of 40
    ends = job(BLOCKS - BLOCKS_OF_SAMPLES + 2)  # one that began anew would not live to see its last block
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert scores.read_bytes() == (tmp_path / 'alone.json').read_bytes() and not kept.exists()
    assert json.loads(scores.read_text())['dinov2']['frechet'] > 0


def test_killed_in_a_measurement_of_a_policy(tmp_path):
    """Each of two processes samples from four prompts and scores the responses, 8 blocks. The first dies in its third,
    and on the next start reads those before: else it would not live to write its last."""
    policy = gpt2.GPT2(width=16, depth=1, num_heads=2, vocab_size=259, max_length=128)
    for name, module in (('policy', policy), ('reward', heads.RewardModel(policy))):
        params = random_params(module, jnp.zeros((1, 2), jnp.int32))
        files.save(tmp_path / name, convert.to_torch('gpt2', module, params), convert.config_of('gpt2', module))
    measure = ('experiments.evaluate', f'--policy={tmp_path}/policy', '--tokenizer=bytes', '--task=arithmetic',
               f'--gold={tmp_path}/reward', '--num=8', '--batch_size=1', '--temperature=1', '--max_new_tokens=4')
    commands = {name: (*measure, f'--json={tmp_path}/{name}.json', f'--out={tmp_path}/{name}.jsonl')
                for name in ('whole', 'struck')}

    def job(killed_at, *names):
        (tmp_path / 'commands.json').write_text(json.dumps([commands[name] for name in names]))
        return jobs.run('tests.processes.commands', str(tmp_path / 'commands.json'), processes=2, devices=1,
                        own={0: (f'--killed_at={killed_at}',)})
    ends = job(8 + 3, 'whole', 'struck')
    assert ends[0][0] == -signal.SIGKILL and ends[1][0] != 0, ends
    written = {path.name for path in (tmp_path / 'struck.json.partial').glob('responses-*/*.npz')}
    assert {'0.npz', '1.npz'} <= written <= {f'{i}.npz' for i in (0, 1, 4, 5, 6, 7)}
    ends = job(8 - 2 + 1, 'struck')
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert sorted(path.name for path in tmp_path.glob('struck*')) == ['struck.json', 'struck.jsonl']
    for end in ('json', 'jsonl'):
        assert (tmp_path / f'struck.{end}').read_bytes() == (tmp_path / f'whole.{end}').read_bytes()
    assert {'gold', 'length'} <= json.loads((tmp_path / 'struck.json').read_text()).keys()

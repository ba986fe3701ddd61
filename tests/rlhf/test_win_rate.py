"""Win rate in a run's own evaluation: gold rewards of held-out responses against those of the data's own."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.rlhf import base
from experiments.rlhf.data.texts import Encoder, TooLong
from experiments.rlhf.policy import completions as completions_lib
from experiments.rlhf.policy import generator as generator_lib
from experiments.runtime import mesh as mesh_lib
from rlhf_jax import tokenizers

ONE = mesh_lib.make_mesh({}, jax.devices()[:1])


def test_held_out_responses_are_held_against_the_datas_own(tmp_path, monkeypatch, caplog):
    """Gold is the length here, so that who wins is known; order and number of prompts are those of the evaluation."""
    rows = [dict(prompt=f'p{i}', response='r' * i, chosen='', rejected='') for i in range(1, 7)]
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    config = base.policy()
    config.batch_size = 4
    config.model.update(dict(kind='gpt2', size='124M', width=16, depth=1, num_heads=2, vocab_size=259, max_length=64))
    config.data.update(dict(task='pairs', path=str(tmp_path), split='train'))
    config.sampling.update(dict(max_prompt=8, max_new_tokens=4))
    config.reward.update(dict(kind='function', function='length_reward:gold', gold='length_reward:gold'))
    (tmp_path / 'length_reward.py').write_text(
        'seen = []\ndef gold(texts, rows):\n    seen.append(list(texts))\n    return [float(len(t)) for t in texts]\n')
    monkeypatch.syspath_prepend(tmp_path)
    generator = generator_lib.Generator(config, ONE)
    generator._rows = [row | {'reference': row['response']} for row in generator._rows]
    generator.task = dataclasses.replace(generator.task, metrics=None)
    generator.prepare(5)
    import length_reward
    order = [row['response'] for index in (0, 1) for row in generator.rows(index)][:5]
    assert length_reward.seen == [order]
    lengths = np.array([len(text) for text in order], np.float32)
    batches = [{'gold': np.stack([lengths[part] + 1, lengths[part]], 1), 'mask': np.zeros((len(part), 2, 1))}
               for part in (np.arange(4), np.arange(4, 5))]  # of two samples one is longer, one as long
    found = generator.measures(batches, [])
    assert found == {'win_rate': 0.5, 'win_ties': 0.5, 'win_margin': 0.5}
    batches[0]['gold'][0, 0] = np.nan
    assert generator.measures(batches, [])['win_rate'] == pytest.approx(4 / 9)

    def too_long(completions):
        raise TooLong('reads at most 3 tokens')
    monkeypatch.setattr(generator._scorer, '_gold', too_long)
    generator._reference_gold = None
    generator.prepare(5)
    assert 'no win rate' in caplog.text and generator.measures(batches, []) == {}


def test_given_responses_follow_their_prompt_and_end(tmp_path):
    tokenizer = tokenizers.ByteTokenizer()
    completions = completions_lib.given(Encoder(tokenizer, False, 'bytes'), [[1, 2], [3]],
                                [{'reference': 'a'}, {'reference': ''}])
    assert completions.texts == ['a', ''] and completions.ended.all()
    assert [row[keep].tolist() for row, keep in zip(completions.tokens, completions.mask)] == [
        [1, 2, ord('a'), tokenizer.eos], [3, tokenizer.eos]]
    assert not completions.mask[1, 2:].any()

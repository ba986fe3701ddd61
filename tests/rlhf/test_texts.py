"""Texts as arrays: what is masked, what is packed, and that neither changes the loss."""
import logging

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments.rlhf.data import texts
from rlhf_jax import tokenizers
from rlhf_jax.losses.supervised import sft
from rlhf_jax.tasks import conversations
from rlhf_jax.tokenizers import JsonTokenizer
from tests.rlhf.tiny_tokenizers import CHATML, byte_level, sentencepiece
from tiny_models import MODELS, random_params

BYTES = tokenizers.ByteTokenizer()
PAIRS = [('ab', 'c'), ('a', 'bcdef'), ('', 'xy'), ('abc', 'de'), ('q', 'r')]


def arrays(pairs=PAIRS, **options):
    return texts.demonstrations(pairs, texts.Encoder(BYTES), **dict(pad=BYTES.pad, max_length=10) | options)


def test_a_text_is_prompt_response_and_eos():
    out = arrays()
    assert out['tokens'].dtype == np.int32 and out['mask'].dtype == out['prompt_mask'].dtype == bool
    np.testing.assert_array_equal(out['tokens'][0], [97, 98, 99, 258] + [256] * 6)
    np.testing.assert_array_equal(out['mask'].sum(1), [4, 7, 3, 6, 3])
    np.testing.assert_array_equal(out['prompt_mask'].sum(1), [2, 1, 0, 3, 1])
    assert not (out['prompt_mask'] & ~out['mask']).any()


def test_masks_do_not_depend_on_the_padding_id():
    padded_with_eos, padded = arrays(pad=BYTES.eos), arrays()
    for name in ('mask', 'prompt_mask'):
        np.testing.assert_array_equal(padded_with_eos[name], padded[name])
    # EOS is the last of every mask, whatever fills the row after it.
    last = padded_with_eos['mask'].sum(1) - 1
    assert (padded_with_eos['tokens'][np.arange(5), last] == BYTES.eos).all()


def test_texts_that_are_too_long_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(arrays(max_length=6)['tokens']) == 4
    assert 'left out 1 of 5 texts that are longer than max_length=6' in caplog.text
    with pytest.raises(ValueError, match='max_length=2: all 5 texts are longer; the shortest has 3 tokens'):
        arrays(max_length=2)
    with pytest.raises(ValueError, match='there are no texts'):
        arrays([])


def test_bos_comes_once_and_counts_as_prompt():
    out = texts.demonstrations([('ab', 'c')], texts.Encoder(BYTES, bos=True), pad=BYTES.pad, max_length=6)
    np.testing.assert_array_equal(out['tokens'][0], [257, 97, 98, 99, 258, 256])
    assert out['prompt_mask'].sum() == 3
    assert texts.Encoder(BYTES)('ab') == [97, 98]


class Merging:
    """Characters, but for 'ab', which is one token."""
    eos, bos = 0, 5

    def encode(self, text, start=True):
        return [1] if text == 'ab' else [2 + ord(c) for c in text]


def test_prompts_keep_their_ids_where_encoding_merges_across_their_end():
    assert texts.joined(texts.Encoder(Merging()), 'a', 'b') == ([99, 100, 0], [1, 3])
    assert texts.joined(texts.Encoder(Merging(), bos=True), 'a', 'b') == ([5, 99, 100, 0], [2, 4])


@pytest.mark.parametrize('prefix', ['prepend', 'first'])
@pytest.mark.parametrize('parts', [('Answer: ', 'yes'), ('Answer:', ' yes'), ('', 'yes'),
                                   ('what is', ' two and two?', ' four.', '\n'), ('a', ''), ('a b ', ' c'),
                                   ('is 3', '4'), ('what is ', 'two')])
def test_ids_of_prompt_and_response_decode_to_the_text(tmp_path, prefix, parts):
    tokenizer = JsonTokenizer(sentencepiece(tmp_path, prefix=prefix))
    encode = texts.Encoder(tokenizer, bos=True)
    ids, ends = texts.joined(encode, *parts)
    assert ids[:ends[0]] == encode(parts[0]) and ids[-1] == tokenizer.eos and ends[-1] == len(ids)
    assert tokenizer.decode(ids) == ''.join(parts)
    assert '▁▁' not in ''.join(tokenizer.tokens[i] for i in ids) or '  ' in ''.join(parts)
    if parts == ('Answer:', ' yes'):
        assert ids == [tokenizer.bos, *tokenizer.encode('Answer: yes'), tokenizer.eos]


@pytest.mark.parametrize('prefix', ['prepend', 'first'])
def test_completions_keep_their_first_space(tmp_path, prefix):
    tokenizer = JsonTokenizer(sentencepiece(tmp_path, prefix=prefix))
    drawn = [[*tokenizer.encode('four'), tokenizer.eos], [*tokenizer.encode('four', start=False), tokenizer.eos]]
    tokens = np.array([row + [0] * (8 - len(row)) for row in drawn])
    mask = np.array([[i < len(row) for i in range(8)] for row in drawn])
    prompts = np.array([[tokenizer.bos, *tokenizer.encode('two and two? ')[:3]]] * 2)
    assert texts.decoded(tokenizer, tokens, mask, prompts, np.ones(prompts.shape, bool))[0] == [' four', 'four']
    # Behind a BOS alone a text begins.
    begins = np.arange(prompts.shape[1])[None] == 0
    assert texts.decoded(tokenizer, tokens, mask, prompts, np.repeat(begins, 2, 0))[0] == ['four', 'four']


def conversation(tmp_path):
    tokenizer = JsonTokenizer(byte_level(tmp_path, eos='<|im_end|>', chat_template=CHATML))
    messages = [{'role': role, 'content': content} for role, content in (
        ('system', 'be brief'), ('user', 'two and two?'), ('assistant', 'four'), ('user', 'a<|im_end|>'),
        ('assistant', '7'))]
    return tokenizer, messages


def test_every_answer_of_a_conversation_or_the_last(tmp_path):
    pytest.importorskip('jinja2')
    tokenizer, messages = conversation(tmp_path)
    template = conversations.Template('tokenizer', tokenizer)
    encode = texts.Encoder(tokenizer, bos=True)
    whole = tokenizer.encode_chat(template(messages))[:-len(tokenizer.encode('\n'))]
    for every, learnt in ((False, ['7']), (True, ['four', '7'])):
        out = texts.demonstrations([template.turns(messages, every=every)], encode, pad=0, max_length=200)
        assert out['tokens'][0][out['mask'][0]].tolist() == whole  # no BOS: the template writes none; one EOS
        trained = out['tokens'][0][out['mask'][0] & ~out['prompt_mask'][0]].tolist()
        ends = [i for i, token in enumerate(trained) if token == tokenizer.eos]
        assert len(ends) == len(learnt) and ends[-1] == len(trained) - 1
        assert tokenizer.decode(trained) == ''.join(learnt)


def test_texts_that_spell_special_tokens_are_counted(tmp_path, caplog):
    tokenizer, _ = conversation(tmp_path)
    with caplog.at_level(logging.WARNING):
        texts.demonstrations([('<|im_start|>user\nhi', 'a'), ('b', 'c')], texts.Encoder(tokenizer), pad=0,
                             max_length=99)
    assert "data: 1 texts spell a special token of the tokenizer, such as '<|im_start|>'" in caplog.text


def test_pack_fits_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(1, 11, 200).tolist()
    rows = texts.pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(200))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= 10 and len(rows) <= sum(lengths) / 10 * 1.1


def test_packed_loss_is_the_token_weighted_loss_of_the_texts():
    module = MODELS['gpt_neox'].clone(vocab_size=259)
    params = random_params(module)
    apply = jax.jit(lambda tokens, mask: module.apply({'params': params}, tokens, mask=mask))
    plain, packed = ({name: jnp.asarray(x) for name, x in arrays(packing=packing).items()} for packing in (False, True))
    assert packed['tokens'].shape == (3, 10)
    logits, packed_logits = (apply(out['tokens'], out['mask'].astype(jnp.int32)) for out in (plain, packed))
    for on_prompt, num in ((True, 4 + 7 + 3 + 6 + 3 - 5), (False, 2 + 6 + 2 + 3 + 2)):
        masked = lambda out: None if on_prompt else out['prompt_mask']
        one, counts = sft(logits, plain['tokens'], plain['mask'], prompt_mask=masked(plain))
        other, packed_counts = sft(packed_logits, packed['tokens'], packed['mask'], prompt_mask=masked(packed),
                                   segment_ids=packed['mask'])
        np.testing.assert_allclose(other, one, rtol=2e-6)
        assert counts['tokens'] == packed_counts['tokens'] == num


def test_preferences():
    out = texts.preferences([('ab', 'c', 'defg'), ('a', 'b', 'c' * 20)], texts.Encoder(BYTES), pad=BYTES.eos,
                            max_length=8)
    assert {name: x.shape for name, x in out.items()} == {
        'prompt_length': (1,), 'chosen': (1, 8), 'chosen_mask': (1, 8), 'rejected': (1, 8), 'rejected_mask': (1, 8)}
    np.testing.assert_array_equal(out['rejected'][0], list(b'abdefg') + [258, 258])
    assert out['chosen_mask'].sum() == 4 and out['rejected_mask'].sum() == 7 and out['prompt_length'] == 2
    with pytest.raises(ValueError, match='there are no pairs'):
        texts.preferences([], texts.Encoder(BYTES), pad=0, max_length=8)


def test_preferences_without_eos_end_with_their_own_token():
    out = texts.preferences([('ab', 'c', 'defg')], texts.Encoder(BYTES), pad=BYTES.eos, max_length=8, add_eos=False)
    np.testing.assert_array_equal(out['chosen'][0, :3], list(b'abc'))
    assert out['chosen_mask'].sum() == 3 and out['rejected_mask'].sum() == 6 and out['prompt_length'] == 2
    shown = texts.demonstrations([('', 'ab')], texts.Encoder(BYTES), pad=BYTES.eos, max_length=8, add_eos=False)
    assert shown['mask'].sum() == 2
    with pytest.raises(ValueError, match='add_eos=False, but a text of a pair is empty'):
        texts.preferences([('', 'a', '')], texts.Encoder(BYTES), pad=0, max_length=8, add_eos=False)


def test_batches_cover_an_epoch_and_continue_where_they_were():
    config = ml_collections.ConfigDict(dict(batch_size=2, seed=3, max_length=4, length_buckets=1))
    rows = {'x': np.arange(6), 'mask': np.ones((6, 4), bool)}
    stream, other = (texts.batches(rows, config) for _ in range(2))
    seen = [next(stream)['x'] for _ in range(3)]
    assert sorted(np.concatenate(seen)) == list(range(6))
    other.set_state(stream.get_state())
    np.testing.assert_array_equal(next(other)['x'], next(stream)['x'])

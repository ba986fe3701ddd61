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
from tiny_models import MODELS, random_params

BYTES = tokenizers.ByteTokenizer()
PAIRS = [('ab', 'c'), ('a', 'bcdef'), ('', 'xy'), ('abc', 'de'), ('q', 'r')]


def arrays(pairs=PAIRS, **options):
    return texts.demonstrations(pairs, BYTES.encode, **dict(eos=BYTES.eos, pad=BYTES.pad, max_length=10) | options)


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
    config = ml_collections.ConfigDict(dict(bos=True, tokenizer='bytes'))
    encode = texts.encoder(config, BYTES)
    out = texts.demonstrations([('ab', 'c')], encode, eos=BYTES.eos, pad=BYTES.pad, max_length=6)
    np.testing.assert_array_equal(out['tokens'][0], [257, 97, 98, 99, 258, 256])
    assert out['prompt_mask'].sum() == 3
    config.bos = False
    assert texts.encoder(config, BYTES)('ab') == [97, 98]


def test_prompts_keep_their_ids_where_encoding_merges_across_their_end():
    merging = lambda text: [1] if text == 'ab' else [2 + ord(c) for c in text]
    assert texts.joined(merging, 0, 'a', 'b') == ([99, 100, 0], 1)
    merging = lambda text: [5] + ([1] if text == 'ab' else [2 + ord(c) for c in text])  # 5: BOS
    assert texts.joined(merging, 0, 'a', 'b') == ([5, 99, 100, 0], 2)


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
    out = texts.preferences([('ab', 'c', 'defg'), ('a', 'b', 'c' * 20)], BYTES.encode, eos=BYTES.eos, pad=BYTES.eos,
                            max_length=8)
    assert {name: x.shape for name, x in out.items()} == {
        'prompt_length': (1,), 'chosen': (1, 8), 'chosen_mask': (1, 8), 'rejected': (1, 8), 'rejected_mask': (1, 8)}
    np.testing.assert_array_equal(out['rejected'][0], list(b'abdefg') + [258, 258])
    assert out['chosen_mask'].sum() == 4 and out['rejected_mask'].sum() == 7 and out['prompt_length'] == 2
    with pytest.raises(ValueError, match='there are no pairs'):
        texts.preferences([], BYTES.encode, eos=0, pad=0, max_length=8)


def test_batches_cover_an_epoch_and_continue_where_they_were():
    config = ml_collections.ConfigDict(dict(batch_size=2, seed=3))
    stream, other = (texts.batches({'x': np.arange(6)}, config) for _ in range(2))
    seen = [next(stream)['x'] for _ in range(3)]
    assert sorted(np.concatenate(seen)) == list(range(6))
    other.set_state(stream.get_state())
    np.testing.assert_array_equal(next(other)['x'], next(stream)['x'])

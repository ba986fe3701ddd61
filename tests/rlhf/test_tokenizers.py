"""Bytes, and a tokenizer.json made here."""
import json

import pytest

from rlhf_jax.tokenizers import ByteTokenizer, JsonTokenizer, WordTokenizer


def test_bytes():
    tokenizer = ByteTokenizer()
    text = 'naïve → 7 + 5 = 12\n'
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.decode([72, tokenizer.eos, 105, tokenizer.pad, tokenizer.bos]) == 'Hi'
    assert tokenizer.decode([0xe2, 72]) == '\ufffdH'  # a cut character
    assert len({tokenizer.pad, tokenizer.bos, tokenizer.eos}) == 3 and tokenizer.vocab_size == 259
    with pytest.raises(ValueError, match='id 259 is not one of 259'):
        tokenizer.decode([1, 259])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer like GPT-NeoX's, with a post-processor that would add a bos and a truncation."""
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=['<|endoftext|>', '<|padding|>'],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)
    tokenizer.train_from_iterator(['the cat sat on the mat', 'the answer is 12'] * 10, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    tokenizer.enable_truncation(4)
    path = tmp_path_factory.mktemp('tokenizer')
    tokenizer.save(str(path / 'tokenizer.json'))
    (path / 'special_tokens_map.json').write_text(json.dumps(
        {'eos_token': {'content': '<|endoftext|>', 'lstrip': False}, 'bos_token': '<|endoftext|>'}))
    return path


def test_json_tokenizer(folder):
    tokenizer = JsonTokenizer(folder)
    ids = tokenizer.encode('the cat sat on the mat')
    assert ids[0] == tokenizer.encode('the')[0] != 0 and len(ids) > 4  # no bos, not truncated
    assert len(ids) < len('the cat sat on the mat') and tokenizer.decode(ids) == 'the cat sat on the mat'
    assert (tokenizer.eos, tokenizer.bos) == (0, 0)
    assert tokenizer.pad == 0  # no padding token named: eos
    assert JsonTokenizer(folder / 'tokenizer.json', pad='<|padding|>').pad == 1
    assert max(ids) < tokenizer.vocab_size <= 300


def test_text_cannot_spell_a_special_token(folder):
    tokenizer = JsonTokenizer(folder)
    ids = tokenizer.encode('a<|endoftext|>b')
    assert 0 not in ids and tokenizer.decode(ids) == 'a<|endoftext|>b'
    assert tokenizer.decode([*ids, 0]) == 'a<|endoftext|>b'


def test_what_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='tokenizer.json'):
        JsonTokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match='not a tokenizer.json'):
        JsonTokenizer(tmp_path)
    with pytest.raises(ValueError, match="'<eos>' is not in the vocabulary"):
        JsonTokenizer(folder, eos='<eos>')


def test_words():
    tokenizer = WordTokenizer(('a', 'seven', 'above'))
    assert tokenizer.encode('a seven  above a') == [2, 3, 4, 2] and tokenizer.vocab_size == 5
    assert tokenizer.decode([2, tokenizer.mask, 3, tokenizer.pad]) == 'a seven'
    with pytest.raises(ValueError, match="no word 'sevn' here; did you mean 'seven'"):
        tokenizer.encode('a sevn')
    with pytest.raises(ValueError, match='the words are a, seven, above'):
        tokenizer.encode('xyz')
    with pytest.raises(ValueError, match='must differ'):
        WordTokenizer(('a', 'a'))

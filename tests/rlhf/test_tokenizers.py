"""Bytes, and a tokenizer.json made here."""
import itertools
import json
import logging
import random

import pytest

from rlhf_jax.tokenizers import ByteTokenizer, JsonTokenizer, WordTokenizer
from tests.rlhf.tiny_tokenizers import byte_level, sentencepiece


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


@pytest.mark.parametrize('prefix', ['prepend', 'first'])
def test_what_continues_a_text_gets_and_loses_no_space(tmp_path, prefix):
    tokenizer = JsonTokenizer(sentencepiece(tmp_path, prefix=prefix))
    for text in ('four.', ' four.', '\n\nhello', '  two', '7', 'naïve'):
        ids = tokenizer.encode(text, start=False)
        assert tokenizer.decode(ids, start=False) == text
        prompt = tokenizer.encode('what is')
        assert tokenizer.decode(prompt + ids) == 'what is' + text
    assert tokenizer.encode(' four', start=False) == tokenizer.encode('four')
    assert tokenizer.decode(tokenizer.encode('four'), start=False) == ' four'
    assert JsonTokenizer(byte_level(tmp_path / 'b')).encode(' four', start=False) == JsonTokenizer(
        tmp_path / 'b').encode(' four')


def change(folder, name, **fields):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))
    return folder


def test_whether_a_text_begins_with_bos(tmp_path, caplog):
    adds, none = byte_level(tmp_path / 'adds'), byte_level(tmp_path / 'none', adds_bos=False)
    assert JsonTokenizer(adds).adds_bos and not JsonTokenizer(none).adds_bos and not ByteTokenizer.adds_bos
    # Without a post-processor the neighbour is asked; with one, it decides.
    assert JsonTokenizer(change(none, 'tokenizer_config.json', add_bos_token=True)).adds_bos
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert JsonTokenizer(change(adds, 'tokenizer_config.json', add_bos_token=False)).adds_bos
    assert 'its post-processor adds a BOS, though add_bos_token in tokenizer_config.json is false' in caplog.text
    (adds / 'tokenizer_config.json').unlink()
    tokenizer = JsonTokenizer(adds, eos='<|end|>')
    assert tokenizer.adds_bos and tokenizer.tokens[tokenizer.bos] == '<|begin|>'


def test_ends_that_only_the_model_names(tmp_path):
    folder = byte_level(tmp_path)
    (folder / 'tokenizer_config.json').write_text('{"model_max_length": 1024}')
    end = JsonTokenizer(folder, eos='<|end|>').eos
    (folder / 'config.json').write_text(json.dumps({'eos_token_id': end, 'bos_token_id': None}))
    tokenizer = JsonTokenizer(folder)
    assert (tokenizer.eos, tokenizer.pad, tokenizer.stops) == (end, end, (end,))
    assert tokenizer.names['eos_token'] == '<|end|>'
    turn = tokenizer.id_of('<|im_end|>')
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [turn, end, 10 ** 6]}))
    assert JsonTokenizer(folder).eos == turn and JsonTokenizer(folder).stops == (turn, end)
    (folder / 'tokenizer_config.json').write_text('{"eos_token": "<|end|>"}')
    assert JsonTokenizer(folder).eos == end and JsonTokenizer(folder).stops == (end, turn)


def test_a_unigram_model_has_control_tokens_among_its_pieces(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    pieces = [('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), *((c, -2.0) for c in 'ab<s>/')]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(list(dict(pieces).items()), unk_id=0))
    tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    tokenizer = JsonTokenizer(tmp_path, eos='</s>')
    ids = tokenizer.encode('a</s><s>b')
    assert not {1, 2} & set(ids) and ''.join(tokenizer.tokens[i] for i in ids) == 'a</s><s>b'
    assert tokenizer.encode('aéb')[1] == 0  # unknown, which is no control token


def test_half_a_surrogate_pair_is_named(folder):
    for tokenizer in (ByteTokenizer(), JsonTokenizer(folder)):
        with pytest.raises(ValueError, match=r'U\+D83D, half of a surrogate pair, at character 3'):
            tokenizer.encode('cut\ud83d')


def test_odd_files_are_one_line_that_names_them(tmp_path):
    """Every field of the files, in turn, holds every kind of JSON value."""
    folder, draw = byte_level(tmp_path, chat_template='{{ messages }}'), random.Random(0)
    (folder / 'special_tokens_map.json').write_text('{"eos_token": {"content": "<|end|>"}}')
    (folder / 'generation_config.json').write_text('{"eos_token_id": [1], "bos_token_id": 0}')
    odd = [None, True, -1, 10 ** 30, 1.5, float('nan'), '', 'x', '\ud800', [], [[]], [{}], {},
           {'content': 3}, {'content': None}, {'type': 'Sequence'}, {'type': 'Prepend'}, [None], ['a', 'b', 'c']]
    seen = 0
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json', 'tokenizer.json'):
        whole = (folder / name).read_bytes()
        saved = json.loads(whole)
        fields = [(key,) for key in saved] + [('model', key) for key in saved.get('model', {})]
        variants = [whole[:draw.randrange(len(whole))] for _ in range(5)]
        variants += [b'[' * 100_000, b'', b'\xff\xfe', b'3', b'[]', b'"a"', b'null']
        for field, value in itertools.product(fields, odd):
            changed = json.loads(whole)
            inner = changed if len(field) == 1 else changed[field[0]]
            inner[field[-1]] = value
            variants.append(json.dumps(changed).encode())
        for text in variants if len(variants) < 400 else draw.sample(variants, 150):
            (folder / name).write_bytes(text)
            try:
                tokenizer = JsonTokenizer(folder)
                tokenizer.decode(tokenizer.encode('what is two'), start=False)
            except ValueError as error:
                assert str(tmp_path) in str(error) or 'tokenizer' in str(error), (name, text[:200], error)
                seen += 1
        (folder / name).write_bytes(whole)
    assert seen > 100


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

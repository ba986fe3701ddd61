"""Captions on their way from images to tokens: read, stored, cut, batched."""
import json
import logging
import lzma
import types

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs.dlc import text_to_code_digits
from dlc_jax import text_to_code
from experiments import encode
from experiments.dlc.data import captions, codestore, codestore_writer, digit_pairs, sources
from experiments.dlc.data.decode import OPTIONS
from experiments.dlc.text_to_code import make_words
from experiments.runtime.stream import Share

META = dict(num_codes=4, vocab_size=8, captions=True)
TEXTS = ['a one above a two', 'a\nthree  under a four', 'a zero on top of a five', 'a six below a nine',
         'a two under a two']


def codes(num=len(TEXTS)):
    return (np.arange(num)[:, None] + np.arange(4)) % 8


@pytest.fixture
def folder(tmp_path):
    """Four images, in two classes, each with a text beside it."""
    for i in range(4):
        (tmp_path / 'images' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        image = tmp_path / 'images' / 'ab'[i % 2] / f'{i}.png'
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(image)
        image.with_suffix('.txt').write_text(f'picture  number\n{i}\n')
    return tmp_path / 'images'


def source(folder):
    return sources.image_source(dict(name='folder', path=str(folder)), 'all')


# ---- Of images -------------------------------------------------------------------------------------------------------

def test_captions_beside_images(folder):
    images = source(folder)
    captions.attach(images, 'txt')
    assert images.captions == {f'{"ab"[i % 2]}/{i}.png': f'picture number {i}' for i in range(4)}


def test_captions_of_a_jsonl(folder, tmp_path):
    rows = [{'file_name': f'{"ab"[i % 2]}/{i}.png', 'text': f'number {i}'} for i in range(4)]
    (tmp_path / 'all.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n\n')
    images = source(folder)
    captions.attach(images, str(tmp_path / 'all.jsonl'))
    assert images.captions['b/3.png'] == 'number 3'


@pytest.mark.parametrize('change, message', [
    (lambda f: (f / 'a' / '2.txt').unlink(), r'1 of 4 images have no caption, the first is a/2.png \(no a/2.txt'),
    (lambda f: (f / 'b' / '1.txt').write_text(' \n'), 'the first is b/1.png'),
    (lambda f: (f / 'b' / '1.txt').write_bytes(b'\xff'), '1.txt: not UTF-8')])
def test_an_image_without_caption_is_named(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        captions.attach(source(folder), 'txt')


@pytest.mark.parametrize('line', ['{"file_name": "a/0.png"}', '{"file_name": ', '[1]', '{"name": "x", "text": 3}',
                                  '[' * 100_000, '{"name": ["x"], "text": "y"}', '{"name": "x", "text": "\\ud800"}'])
def test_a_damaged_line_is_named(folder, tmp_path, line):
    (tmp_path / 'x.jsonl').write_text('{"file_name": "a/0.png", "caption": "zero"}\n' + line)
    with pytest.raises(ValueError, match='x.jsonl: line 2 is not'):
        captions.attach(source(folder), str(tmp_path / 'x.jsonl'))


def test_a_byte_order_mark_is_no_part_of_a_caption(folder, tmp_path):
    (folder / 'a' / '0.txt').write_bytes(b'\xef\xbb\xbfa red fox')
    images = source(folder)
    captions.attach(images, 'txt')
    assert images.captions['a/0.png'] == 'a red fox'
    (tmp_path / 'x.jsonl').write_bytes(b'\xef\xbb\xbf{"name": "a", "text": "b"}')
    assert captions.read_jsonl(tmp_path / 'x.jsonl') == {'a': 'b'}


def test_control_characters_do_not_reach_the_store(tmp_path):
    lines = [{'name': 'a', 'text': 'red\x1b[31m \x9b5n\x00 fox\u2028 runs'}, {'name': 'b', 'text': '\u0627\u200d'}]
    (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    assert captions.read_jsonl(tmp_path / 'x.jsonl') == {'a': 'red [31m 5n fox runs', 'b': '\u0627\u200d'}


def test_repeated_names_are_counted(tmp_path, caplog):
    (tmp_path / 'x.jsonl').write_text(''.join(f'{{"name": "a", "text": "{i}"}}\n' for i in range(3)))
    with caplog.at_level(logging.WARNING):
        assert captions.read_jsonl(tmp_path / 'x.jsonl') == {'a': '2'}
    assert 'x.jsonl: 2 lines repeat the name of an image' in caplog.text


@pytest.mark.parametrize('content', [b'\xff\xfe{\x00', lzma.compress(b'{}'), b'{"name": "a", "text": "\xe9"}'])
def test_a_jsonl_that_is_not_utf8_is_named(tmp_path, content):
    (tmp_path / 'x.jsonl').write_bytes(content)
    with pytest.raises(ValueError, match=r'x.jsonl: not UTF-8 text \(byte'):
        captions.read_jsonl(tmp_path / 'x.jsonl')


def test_only_folders_have_files_beside_images():
    with pytest.raises(ValueError, match='give a jsonl file'):
        captions.attach(sources.image_source(dict(name='digits', channels=1), 'train'), 'txt')


def test_images_of_an_encoder_trained_in_memory_are_encoded_one_by_one(folder):
    """They have the names that captions know them by, and any size."""
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(folder / 'a' / '0.png')
    trained_on = ml_collections.ConfigDict(dict(name='npz', path='x.npz', in_memory=True, image_size=0, heldout=0.5))
    args = types.SimpleNamespace(data='folder', path=str(folder), layout=None, **dict.fromkeys(OPTIONS))
    images = sources.image_source(encode.data_config(trained_on, args), 'train')
    captions.attach(images, 'txt')
    assert len(images.captions) == len(images) == images.held_back == 2
    assert sources.image_source(dict(name='folder', path=str(folder), image_size=8, in_memory=True, heldout=0.5),
                                'train').held_back == 2


def test_encoded_images_keep_their_captions(folder, tmp_path):
    """A damaged image has no row, and its caption none either."""
    (folder / 'a' / '2.png').write_bytes(b'\x89PNG but no more')
    model = types.SimpleNamespace(num_codes=2, vocab_size=256)
    first = lambda x, **kw: np.repeat(x.reshape(len(x), -1)[:, :1].astype(int), 2, 1)
    encoder = types.SimpleNamespace(
        config=types.SimpleNamespace(model=model), params={'w': np.ones(2)}, transform=lambda image: image,
        encode=lambda x, **kw: {'codes': first(x), 'embeddings': np.zeros((len(x), 1))})
    images = source(folder)
    captions.attach(images, 'txt')
    encode.encode(encoder, images, tmp_path / 'codes', image_size=8, batch_size=3)
    store = codestore.open_code_store(tmp_path / 'codes')
    assert store.names == ['a/0.png', 'b/1.png', 'b/3.png'] and store.meta['items'] == 4
    numbers = [int(store.captions[i].split()[-1]) for i in range(3)]
    assert numbers == [0, 1, 3] and list(store.array('codes')[:, 0]) == [50 * i for i in numbers]
    images.captions = {name: 'another' for name in images.captions}
    with pytest.raises(ValueError, match='holds a store with captions='):
        encode.encode(encoder, images, tmp_path / 'codes', image_size=8)


# ---- In a store ------------------------------------------------------------------------------------------------------

def write(path, texts=TEXTS, meta=META, stop=None):
    with codestore_writer.writer(path, num=len(texts), meta=meta) as store:
        for i in range(store.done, len(texts)):
            if i == stop:
                raise KeyboardInterrupt
            store.append({'codes': codes(len(texts))[i:i + 1]}, names=[str(i)], captions=texts[i:i + 1])
    return codestore.open_code_store(path)


def test_interrupted_store_has_each_caption_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / 'codes', stop=3)
    with open(tmp_path / 'codes.partial' / 'captions.txt', 'a') as file:
        file.write('half a capt')  # as after a kill
    found = write(tmp_path / 'codes').captions
    assert [found[i] for i in range(len(found))] == [' '.join(text.split()) for text in TEXTS]


def test_captions_that_are_not_there_are_named(tmp_path):
    with codestore_writer.writer(tmp_path / 'bare', num=5, meta=dict(num_codes=4, vocab_size=8)) as store:
        store.append({'codes': codes()}, names=TEXTS)
    with pytest.raises(ValueError, match='bare: holds codes without captions; encode the data set with --captions'):
        _ = codestore.open_code_store(tmp_path / 'bare').captions
    with pytest.raises(ValueError, match='captions come with every row'):
        with codestore_writer.writer(tmp_path / 'none', num=5, meta=META) as store:
            store.append({'codes': codes()}, names=TEXTS)
    with pytest.raises(ValueError, match='1 rows but 0 captions'):
        write(tmp_path / 'empty', ['a', ' '])
    store = write(tmp_path / 'codes')
    lines = (store.path / 'captions.txt').read_text().splitlines()
    for broken, error, message in ((lines[:-1], OSError, '4 lines, meta.json says 5'),
                                   ([*lines[:2], '', *lines[3:]], ValueError, 'line 3 is empty')):
        (store.path / 'captions.txt').write_text('\n'.join(broken) + '\n')
        with pytest.raises(error, match=message):
            _ = store.captions


# ---- As tokens -------------------------------------------------------------------------------------------------------

@pytest.fixture
def config(tmp_path):
    config = text_to_code_digits.get_config()
    config.model.update(dict(num_codes=4, vocab_size=8))
    config.data.path, config.batch_size, config.caption_length = str(write(tmp_path / 'codes').path), 2, 5
    return config


def test_batches_are_rows_of_the_store_and_continue_anywhere(config, caplog):
    words, tokenizer = make_words(config), captions.open_tokenizer(config)
    batches = captions.open_batches(config.data.path, config, words)
    with caplog.at_level(logging.WARNING):
        seen = [next(batches) for _ in range(5)]  # two epochs
    drawn = []
    for batch in seen:
        for row, tokens, mask in zip(batch['codes'], batch['captions'], batch['caption_mask']):
            (index,) = np.flatnonzero((codes() == row).all(1))
            assert tokenizer.encode(TEXTS[index])[:5] == list(tokens[mask]) and mask.sum() == 5
            drawn.append(index)
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    assert batches.cut == 2 and batches.seen == 10  # 'a zero on top of a five', once an epoch
    assert '1 of ' in caplog.text and 'captions so far had more than caption_length=5 tokens' in caplog.text
    again = captions.open_batches(config.data.path, config, words)
    again.set_state({'position': 4})
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, seen[2][name])
    halves = [captions.CaptionedCodes(config.data.path, config, tokenizer, words, share=Share((i,), 2))
              for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([next(half)['captions'] for half in halves]), seen[0]['captions'])


def test_tokens_of_a_caption_are_cut_on_the_right(config):
    tokenizer = captions.open_tokenizer(config)
    batches = captions.open_batches(config.data.path, config, make_words(config))
    rows = batches.rows(2, 4)
    np.testing.assert_array_equal(rows['captions'][0], tokenizer.encode(TEXTS[2])[:5])
    np.testing.assert_array_equal(rows['codes'], codes()[2:4])


@pytest.mark.parametrize('change, message', [
    (dict(vocabulary=('a',)), 'has 3 tokens before .* words.separator=19'), (dict(tokenizer=''), 'pretrained is empty'),
    (dict(tokenizer='nowhere'), 'nowhere/?.*: no such file'), (dict(tokenizer='bytes'), 'tokenizer=bytes has 259')])
def test_tokenizer_that_does_not_fit_is_named(config, change, message):
    config.update(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        captions.open_tokenizer(config)


# ---- Pairs of digits -------------------------------------------------------------------------------------------------

def test_pairs_show_what_their_captions_say():
    sets = {split: digit_pairs.DigitPairs(split, 200) for split in digit_pairs.SPLITS}
    for split, pairs in sets.items():
        for i in range(0, 200, 17):
            upper, lower = divmod(int(pairs.labels[i]), 10)
            assert pairs.captions[pairs.name(i)] in [digit_pairs.caption(upper, lower, k) for k in range(4)]
            assert digit_pairs.is_unseen(upper, lower) == (split == 'unseen')
        digits, classes = digit_pairs.single_digits(digit_pairs.SPLITS[split], heldout=0.25, seed=0)
        known = {digit.tobytes(): c for digit, c in zip(digits, classes)}
        for half, of in zip(digit_pairs.halves(pairs.images), (pairs.labels // 10, pairs.labels % 10)):
            assert [known[np.ascontiguousarray(x).tobytes()] for x in half] == list(of)
    assert len(set(sets['train'].labels)) == 80 and len(set(sets['unseen'].labels)) == 20
    assert digit_pairs.caption(7, 2, 2) == 'a two below a seven'
    apart = [{x.tobytes() for x in digit_pairs.single_digits(split, heldout=0.25, seed=0)[0]}
             for split in ('train', 'heldout')]
    assert not apart[0] & apart[1]


def test_words_of_the_captions_are_those_of_the_config():
    config = text_to_code_digits.get_config()
    tokenizer = captions.open_tokenizer(config)
    assert config.vocabulary == digit_pairs.WORDS
    longest = max(len(tokenizer.encode(digit_pairs.caption(7, 2, k))) for k in range(4))
    assert longest <= config.caption_length and text_to_code.Words(**config.words, num_codes=16) == make_words(config)


# ---- Fuzz ------------------------------------------------------------------------------------------------------------

def damaged(data, rng):
    """`data` with a few bytes changed, cut out or put in."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4) if data else 0):
        at, kind = rng.integers(len(data)), rng.integers(3)
        if kind == 0:
            data[at] = rng.integers(256)
        elif kind == 1:
            del data[at:at + rng.integers(1, 20)]
        if not data:
            break
        else:
            data[at:at] = rng.bytes(rng.integers(1, 20))
    return bytes(data)


def test_damaged_jsonl_ends_in_one_line(tmp_path):
    lines = [json.dumps({'file_name': f'{i}.png', 'caption': f'picture {i} é'}, ensure_ascii=False) for i in range(4)]
    whole = '\n'.join(lines).encode()
    rng, read = np.random.default_rng(0), 0
    for _ in range(400):
        (tmp_path / 'fuzz.jsonl').write_bytes(damaged(whole, rng))
        try:
            found = captions.read_jsonl(tmp_path / 'fuzz.jsonl')
            assert all(text.isprintable() for text in found.values())
            ' '.join([*found.values()]).encode()
            read += 1
        except (ValueError, OSError) as error:
            assert 'fuzz.jsonl' in str(error) and '\n' not in str(error)
    assert 0 < read < 400


@pytest.mark.parametrize('name', ['meta.json', 'codes.npy', 'captions.txt', 'names.txt'])
def test_a_damaged_store_ends_in_one_line(tmp_path, name):
    path = write(tmp_path / 'codes').path
    whole, rng, opened = (path / name).read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        (path / name).write_bytes(damaged(whole, rng))
        try:
            store = codestore.open_code_store(path)
            assert 0 <= store.array('codes').min() and store.array('codes').max() < store.vocab_size
            store.labels() if 'labels' in store.arrays else None
            [store.captions[i] for i in range(len(store))]
            assert isinstance(store.names, list)
            opened += 1
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and '\n' not in str(error)
    assert opened < 150 or name == 'names.txt'

import gzip
import json
import lzma
import os
import random

import pytest

from rlhf_jax.tasks import rows, text_files

ROWS = [{'text': 'a\u0085b', 'label': 1}, {'text': 'é', 'label': 0}]


def write(path, lines):
    opener = {'.gz': gzip.open, '.xz': lzma.open}.get(path.suffix, open)
    with opener(path, 'wt', encoding='utf-8') as f:
        for line in lines:
            f.write((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + '\n')
    return path


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.xz'])
def test_lines_end_at_newlines_alone(tmp_path, name):
    assert list(rows.read(write(tmp_path / name, ROWS), ('text', 'label'))) == ROWS


def test_a_list_of_rows(tmp_path):
    assert list(rows.read(write(tmp_path / 'a.json', [json.dumps(ROWS)]))) == ROWS
    with pytest.raises(ValueError, match='a.json: is no JSON.*named .jsonl'):
        list(rows.read(write(tmp_path / 'a.json', ROWS)))
    with pytest.raises(ValueError, match='b.json: holds a dict'):
        list(rows.read(write(tmp_path / 'b.json', ['{}'])))


def test_a_row_that_lacks_a_field_is_named(tmp_path):
    path = write(tmp_path / 'a.jsonl', [ROWS[0], {'text': None, 'label': 1}, '{"text": ', '[1]', {'label': 2}, ROWS[1]])
    with pytest.raises(ValueError, match=r"a.jsonl: row 1: missing field 'text'; it has \['label'\]") as error:
        list(rows.read(path, ('label', 'text')))
    assert '\n' not in str(error.value)
    bad = []
    assert list(rows.read(path, ('label', 'text'), bad=bad)) == ROWS
    assert [m.split(': ')[1] for m in bad] == ['row 1', 'row 2', 'row 3', 'row 4'] and 'is no JSON' in bad[1]


def test_folders_of_a_hub(tmp_path):
    (tmp_path / 'data').mkdir()
    write(tmp_path / 'data' / 'train-00001-of-00002.jsonl', ROWS[1:])
    write(tmp_path / 'data' / 'train-00000-of-00002.jsonl.gz', ROWS[:1])
    write(tmp_path / 'test.jsonl', ROWS[:1])
    write(tmp_path / 'README.md', ['x'])
    assert list(rows.read(tmp_path, split='train')) == ROWS and list(rows.read(tmp_path, split='test')) == ROWS[:1]
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\]"):
        list(rows.read(tmp_path))
    with pytest.raises(FileNotFoundError, match="no split 'validation'"):
        list(rows.read(tmp_path, split='validation'))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such'):
        list(rows.read(tmp_path / 'nowhere'))
    with pytest.raises(FileNotFoundError, match='holds no file'):
        list(rows.read(tmp_path))
    with pytest.raises(ValueError, match='a.csv: unknown format'):
        list(rows.read(write(tmp_path / 'a.csv', ['x'])))


def test_tables(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / 'train-00000-of-00001.parquet')
    assert list(rows.read(tmp_path, ('text',))) == ROWS
    for name, opener in (('stream.arrow', pa.ipc.new_stream), ('file.arrow', pa.ipc.new_file)):
        with opener(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert list(rows.read(tmp_path / name)) == ROWS
    with pytest.raises(ValueError, match="file.arrow: row 0: missing field 'title'"):
        list(rows.read(tmp_path / 'file.arrow', ('title',)))


def test_a_saved_dataset(tmp_path):
    pa = pytest.importorskip('pyarrow')
    (tmp_path / 'train').mkdir()
    (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train"]}')
    names = ['data-00001-of-00002.arrow', 'data-00000-of-00002.arrow']  # in the order of the state, not of the names
    (tmp_path / 'train' / 'state.json').write_text(json.dumps({'_data_files': [{'filename': n} for n in names]}))
    for name, row in zip(names, ROWS):
        table = pa.Table.from_pylist([row])
        with pa.ipc.new_stream(str(tmp_path / 'train' / name), table.schema) as writer:
            writer.write_table(table)
    assert list(rows.read(tmp_path)) == list(rows.read(tmp_path / 'train')) == ROWS


def test_parallel_text(tmp_path):
    en, de = write(tmp_path / 'a.en.gz', ['one dog', 'two']), write(tmp_path / 'a.de', ['ein Hund', 'zwei'])
    assert rows.read_parallel({'en': en, 'de': de}) == [{'en': 'one dog', 'de': 'ein Hund'},
                                                        {'en': 'two', 'de': 'zwei'}]
    with pytest.raises(ValueError, match='different numbers of lines'):
        rows.read_parallel({'en': en, 'de': write(tmp_path / 'b.de', ['ein Hund'])})
    with pytest.raises(ValueError, match="c.de: row 1: 'de' is empty"):
        rows.read_parallel({'en': en, 'de': write(tmp_path / 'c.de', ['ein Hund', ' '])})


def test_line_ends_of_unicode_and_byte_order_marks(tmp_path):
    texts = [{'text': 'a\u2028b\u2029c\u0085d\x0b\x0c\x1ce'}, {'text': 'plain'}]
    raw = '\r\n'.join(json.dumps(row, ensure_ascii=False) for row in texts).encode('utf-8-sig')
    (tmp_path / 'a.jsonl').write_bytes(raw)
    assert list(rows.read(tmp_path / 'a.jsonl', ('text',))) == texts
    (tmp_path / 'a.json').write_bytes(json.dumps(texts).encode('utf-8-sig'))
    assert list(rows.read(tmp_path / 'a.json')) == texts
    (tmp_path / 'en').write_bytes('a\u2028b\r\nc\r\n'.encode('utf-8-sig'))
    assert rows.read_parallel({'en': tmp_path / 'en'}) == [{'en': 'a\u2028b'}, {'en': 'c'}]


@pytest.mark.parametrize('line,message', [
    (b'{"text": "cut \\ud83d"}', "field 'text' holds U+D83D, half of a surrogate pair"),
    (b'{"text": "a", "more": {"x": ["\\uDE00"]}}', "field 'x' holds U+DE00"),
    (b'{"text": "\xff"}', 'is not UTF-8: byte 0xff at 10'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"text": ' + b'9' * 5000 + b'}', 'digits')], ids=['surrogate', 'inner', 'latin', 'deep', 'digits'])
def test_a_bad_line_is_named_or_skipped(tmp_path, line, message):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'{"text": "whole \\ud83d\\ude00"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(rows.BadRow, match='a.jsonl: row 1: ') as error:
        list(rows.read(path, ('text',)))
    assert message in str(error.value)
    bad = []
    assert list(rows.read(path, ('text',), bad=bad)) == [{'text': 'whole 😀'}, {'text': 'b'}] and len(bad) == 1


def test_files_that_are_not_whole_or_not_what_they_are_called(tmp_path):
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, raw, message in (
            ('cut.jsonl.gz', packed[:-20], 'is no whole .gz file'),
            ('plain.jsonl.gz', b'{"text": 1}', 'is no whole .gz file'),
            ('plain.jsonl.xz', b'{"text": 1}', 'is no whole .xz file'), ('cut.json.gz', packed[:50], 'is no whole .gz'),
            ('wide.jsonl', '{"text": "a"}'.encode('utf-16'), 'is UTF-16; save it as UTF-8'),
            ('latin.json', b'["\xe9"]', 'is not UTF-8'), ('deep.json', b'[' * 100_000, 'nested too deeply'),
            ('a.parquet', b'PAR1 no', 'cannot be read as parquet'), ('a.arrow', b'', 'cannot be read as arrow')):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError) as error:
            list(rows.read(tmp_path / name))
        assert str(tmp_path / name) in str(error.value) and message in str(error.value)
    (tmp_path / 'en').write_bytes(b'a\n\xff\n')
    with pytest.raises(ValueError, match='en: row 1: is not UTF-8'):
        rows.read_parallel({'en': tmp_path / 'en'})


def test_a_line_without_end_takes_no_more_memory_than_a_long_one(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, '_LONGEST_LINE', 1000)
    path = tmp_path / 'bomb.jsonl.gz'
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b'0' * 10 ** 6))
    with pytest.raises(ValueError, match='bomb.jsonl.gz: a line has more than 1,000 bytes'):
        list(rows.read(path))
    monkeypatch.setattr(text_files, '_LONGEST_FILE', 1000)
    path.rename(tmp_path / 'bomb.json.gz')
    with pytest.raises(ValueError, match='read as a whole has more than 1,000 bytes'):
        list(rows.read(tmp_path / 'bomb.json.gz'))


@pytest.mark.parametrize('text', [
    '[' * 100_000, '3', '{}', '{"_data_files": 3}', '{"_data_files": []}', '{"_data_files": [3]}',
    '{"_data_files": [{"filename": 7}]}', '{"_data_files": [{"filename": "."}]}',
    '{"_data_files": [{"filename": ".."}]}',
    '{"_data_files": [{"filename": "/etc/passwd"}]}', '{"_data_files": [{"filename": "../x.arrow"}]}',
    '{"_data_files": [{"filename": "pipe.arrow"}]}', '{"_data_files": [{"filename": "a\\u0000"}]}',
    '{"splits": ["."]}', '{"splits": [3]}', '{"splits": {}}', '{"splits": ["../x"]}', '{"splits": ["missing"]}'])
def test_indices_of_saved_folders(tmp_path, text):
    os.mkfifo(tmp_path / 'pipe.arrow')
    name = 'dataset_dict.json' if 'splits' in text else 'state.json'
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        list(rows.read(tmp_path))


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.jsonl.gz', 'a.jsonl.xz', 'a.parquet', 'a.arrow'])
def test_damaged_files_are_one_line_that_names_them(tmp_path, name):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    table, path, draw = pa.Table.from_pylist(ROWS * 20), tmp_path / name, random.Random(name)
    if name == 'a.parquet':
        pq.write_table(table, path)
    elif name == 'a.arrow':
        with pa.OSFile(str(path), 'wb') as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        write(path, [json.dumps(ROWS * 20)] if name == 'a.json' else ROWS * 20)
    whole, faults = path.read_bytes(), 0
    for trial in range(120):
        raw = bytearray(whole)
        if trial % 3 == 0:
            del raw[draw.randrange(len(raw)):]
        elif trial % 3 == 1:
            for _ in range(3):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
        else:
            place = draw.randrange(len(raw))
            raw[place:place + draw.randrange(8)] = draw.randbytes(draw.randrange(8))
        path.write_bytes(raw)
        try:
            list(rows.read(path, ('text',)))
        except ValueError as error:
            assert str(path) in str(error), error
            faults += 1
    assert faults > 20

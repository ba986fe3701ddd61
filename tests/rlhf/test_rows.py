import gzip
import json
import lzma

import pytest

from rlhf_jax.tasks import rows

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

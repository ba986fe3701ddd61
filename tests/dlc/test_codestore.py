import errno
import json
import os

import numpy as np
import pytest

from experiments.dlc.data import codestore, codestore_writer
from experiments.dlc.data.codestore import code_dtype, open_code_store
from experiments.dlc.data.codestore_writer import writer

META = dict(num_codes=4, vocab_size=10, class_names=('a', 'b'))
NUM = 10


def rows(start, stop):
    index = np.arange(start, stop)
    return {'codes': (index[:, None] * 3 + np.arange(4)) % 10, 'labels': (index % 2).astype(np.int32),
            'latents': np.float16(index[:, None, None] + np.zeros((1, 2, 3)))}


def fill(path, *, stop_at=None, meta=META, step=3):
    """Writes the store from wherever it stands; `stop_at` breaks off before that row."""
    with writer(path, num=NUM, meta=meta) as store:
        began = store.done
        for start in range(store.done, NUM, step):
            if stop_at is not None and start >= stop_at:
                raise KeyboardInterrupt
            stop = min(start + step, NUM)
            store.append(rows(start, stop), names=[f'image {i}\nwith a break' for i in range(start, stop)])
    return began


def assert_complete(path):
    store = open_code_store(path, num_codes=4, vocab_size=10)
    for name, expected in rows(0, NUM).items():
        np.testing.assert_array_equal(store.array(name), expected)
    assert len(store) == NUM and store.names == [f'image {i} with a break' for i in range(NUM)]
    assert store.meta['class_names'] == ['a', 'b'] and (store.num_codes, store.vocab_size) == (4, 10)
    assert {p.name for p in path.iterdir()} == {'codes.npy', 'labels.npy', 'latents.npy', 'meta.json', 'names.txt'}
    assert isinstance(store.array('codes'), np.memmap) and store.array('codes').dtype == np.uint8
    assert store.array('latents').dtype == np.float16


def test_write_and_read(tmp_path):
    assert fill(tmp_path / 'codes') == 0
    assert_complete(tmp_path / 'codes')
    assert not (tmp_path / 'codes.partial').exists()


def test_finished_store_is_left_alone(tmp_path):
    fill(tmp_path / 'codes')
    before = (tmp_path / 'codes' / 'codes.npy').stat().st_mtime_ns
    assert fill(tmp_path / 'codes') == NUM
    assert (tmp_path / 'codes' / 'codes.npy').stat().st_mtime_ns == before


@pytest.mark.parametrize('stop_at', [0, 3, 9])
def test_interrupted_store_continues(tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / 'codes', stop_at=stop_at)
    assert not (tmp_path / 'codes').exists()
    with pytest.raises(FileNotFoundError, match=f'unfinished, {stop_at} of 10 rows'):
        open_code_store(tmp_path / 'codes')
    assert fill(tmp_path / 'codes', step=2) == stop_at
    assert_complete(tmp_path / 'codes')


def test_killed_after_rows_that_were_not_noted(tmp_path):
    """Rows on disk beyond the last note, as after a kill, are written again rather than doubled."""
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / 'codes', stop_at=6)
    partial = tmp_path / 'codes.partial'
    note = json.loads((partial / 'progress.json').read_text())
    names = (partial / 'names.txt').read_bytes().split(b'\n')
    note |= {'done': 3, 'written': 3, 'names_bytes': len(b'\n'.join(names[:3])) + 1}
    (partial / 'progress.json').write_text(json.dumps(note))
    assert fill(tmp_path / 'codes') == 3
    assert_complete(tmp_path / 'codes')


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    real, calls = codestore_writer.write_all, []

    def filling_up(file, data):
        calls.append(1)
        if len(calls) == 7:  # in the middle of the second append
            real(file, data[:1])
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(file, data)
    monkeypatch.setattr(codestore_writer, 'write_all', filling_up)
    with pytest.raises(OSError, match='disk is full after 3 rows.*same command') as error:
        fill(tmp_path / 'codes')
    assert '\n' not in str(error.value) and error.value.errno == errno.ENOSPC
    monkeypatch.setattr(codestore_writer, 'write_all', real)
    assert fill(tmp_path / 'codes') == 3
    assert_complete(tmp_path / 'codes')


def test_too_few_rows_leave_no_store(tmp_path):
    with pytest.raises(ValueError, match='3 of 10 rows'):
        with writer(tmp_path / 'codes', num=NUM, meta=META) as store:
            store.append(rows(0, 3), names=['x'] * 3)
    assert not (tmp_path / 'codes').exists()
    assert fill(tmp_path / 'codes') == 3


@pytest.mark.parametrize('change,match', [
    (dict(codes=np.zeros((3, 5), int)), r'codes are \(3, 5\).*num_codes=4'),
    (dict(codes=np.full((3, 4), 10)), r'\[10, 10\], outside vocab_size=10'),
    (dict(codes=np.full((3, 4), -1)), 'outside vocab_size=10'),
    (dict(labels=np.zeros(2, np.int32)), 'labels: 2 rows but 3 names'),
    (dict(labels=np.zeros(3, np.float32)), 'those before were'),
    (dict(extra=np.zeros(3)), 'those before were'),
])
def test_bad_rows_are_named(tmp_path, change, match):
    with pytest.raises(ValueError, match=match) as error:
        with writer(tmp_path / 'codes', num=NUM, meta=META) as store:
            store.append(rows(0, 3), names=['x'] * 3)
            store.append(rows(3, 6) | change, names=['x'] * 3)
    assert '\n' not in str(error.value)
    assert fill(tmp_path / 'codes') == 3  # what was good is kept


def test_too_many_rows(tmp_path):
    with pytest.raises(ValueError, match='num=10'):
        with writer(tmp_path / 'codes', num=NUM, meta=META) as store:
            store.append(rows(0, 11), names=['x'] * 11)


@pytest.mark.parametrize('stop_at', [None, 4, 8])
def test_items_left_out_have_no_row(tmp_path, stop_at):
    """As images that cannot be read: the arrays end where the rows do, wherever an interruption came."""
    def fill_without(bad, stop_at=None):
        with writer(tmp_path / 'codes', num=NUM, meta=META) as store:
            for start in range(store.done, NUM, 2):
                if start == stop_at:
                    raise KeyboardInterrupt
                index = [i for i in range(start, start + 2) if i not in bad]
                batch = {name: array[[i - start for i in index]] for name, array in rows(start, start + 2).items()}
                store.append(batch, names=[str(i) for i in index], left_out=2 - len(index))
    bad = (0, 1, 5, 9)
    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            fill_without(bad, stop_at)
    fill_without(bad)
    store, kept = open_code_store(tmp_path / 'codes'), [i for i in range(NUM) if i not in bad]
    assert len(store) == 6 and store.meta['items'] == NUM and store.names == [str(i) for i in kept]
    for name, expected in rows(0, NUM).items():
        np.testing.assert_array_equal(store.array(name), expected[kept])
        np.testing.assert_array_equal(np.load(tmp_path / 'codes' / f'{name}.npy'), expected[kept])
    fill_without(bad)  # finished: returns at once
    with pytest.raises(ValueError, match='none of the 10 items could be read'):
        with writer(tmp_path / 'none', num=NUM, meta=META) as store:
            store.append({name: array[:0] for name, array in rows(0, 1).items()}, names=[], left_out=NUM)


def test_names_need_not_be_utf8(tmp_path):
    name = 'caf\udce9.png'  # as Python shows the byte E9 of a file's name
    with writer(tmp_path / 'codes', num=1, meta=META) as store:
        store.append(rows(0, 1), names=[name])
    assert open_code_store(tmp_path / 'codes').names == [name]
    assert (tmp_path / 'codes' / 'names.txt').read_bytes() == b'caf\xe9.png\n'


@pytest.mark.parametrize('stop_at', [6, None])
def test_another_store_is_not_continued(tmp_path, stop_at):
    try:
        fill(tmp_path / 'codes', stop_at=stop_at)
    except KeyboardInterrupt:
        pass
    with pytest.raises(ValueError, match='vocab_size=10, not 12.*delete it'):
        fill(tmp_path / 'codes', meta=META | {'vocab_size': 12})
    fill(tmp_path / 'codes')
    assert_complete(tmp_path / 'codes')


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='no code store'):
        fill(tmp_path)
    assert (tmp_path / 'thesis.txt').exists()


# ---- Opening -------------------------------------------------------------------------------------------------------

def test_length_and_vocabulary_are_checked(tmp_path):
    fill(tmp_path / 'codes')
    open_code_store(tmp_path / 'codes')
    for wanted in (dict(num_codes=5), dict(vocab_size=16)):
        with pytest.raises(ValueError, match='L x V = 4 x 10') as error:
            open_code_store(tmp_path / 'codes', **wanted)
        assert next(iter(wanted)) in str(error.value) and '\n' not in str(error.value)


def test_missing_store(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no code store there.*experiments.encode'):
        open_code_store(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='data.heldout is empty: give a code store written by experiments.encode'):
        open_code_store('', field='data.heldout')


def change_meta(path, **fields):
    meta = json.loads((path / 'meta.json').read_text())
    (path / 'meta.json').write_text(json.dumps(meta | fields))


def as_pipe(path):
    """Opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize('damage,match', [
    (lambda p: truncate(p / 'codes.npy'), 'codes.npy: truncated or damaged'),
    (lambda p: (p / 'latents.npy').write_bytes(b''), 'latents.npy: truncated or damaged'),
    (lambda p: (p / 'labels.npy').unlink(), 'labels.npy: missing'),
    (lambda p: np.save(p / 'labels.npy', np.zeros(9)), 'labels.npy: 9 rows, meta.json says 10'),
    (lambda p: np.save(p / 'codes.npy', np.zeros((10, 3), np.uint8)), r'codes.npy is \(10, 3\)'),
    (lambda p: np.save(p / 'codes.npy', np.full((10, 4), 77, np.uint8)), 'holds 77'),
    (lambda p: np.save(p / 'codes.npy', np.zeros((10, 4))), 'holds float64, not whole numbers'),
    (lambda p: np.save(p / 'codes.npy', np.full((10, 4), -1, np.int8)), 'holds -1 in row 0'),
    (lambda p: np.save(p / 'labels.npy', np.int32(3)), 'labels.npy: truncated or damaged'),
    (lambda p: truncate(p / 'meta.json'), 'meta.json: damaged'),
    (lambda p: (p / 'meta.json').write_text('[' * 100_000), 'meta.json: damaged'),
    (lambda p: change_meta(p, num='10'), "meta.json: damaged .*num='10'"),
    (lambda p: change_meta(p, num=True), 'meta.json: damaged'),
    (lambda p: change_meta(p, arrays=['labels']), "meta.json: damaged .*without 'codes'"),
    (lambda p: change_meta(p, arrays=['codes', '../labels']), 'meta.json: damaged .*arrays='),
    (lambda p: change_meta(p, class_names=3), 'meta.json: damaged .*class_names'),
    (lambda p: as_pipe(p / 'labels.npy'), 'labels.npy: missing'),
    (lambda p: as_pipe(p / 'meta.json'), 'meta.json: damaged'),
])
def test_damage_is_named(tmp_path, damage, match):
    fill(tmp_path / 'codes')
    damage(tmp_path / 'codes')
    with pytest.raises((OSError, ValueError), match=match) as error:
        open_code_store(tmp_path / 'codes')
    assert '\n' not in str(error.value)


def test_absent_array_is_named(tmp_path):
    fill(tmp_path / 'codes')
    with pytest.raises(ValueError, match="no 'images'"):
        open_code_store(tmp_path / 'codes').array('images')


def test_code_dtype():
    assert [code_dtype(v).name for v in (256, 257, 65536, 65537)] == ['uint8', 'uint16', 'uint16', 'int32']


@pytest.mark.parametrize('row', [0, 70_000])
@pytest.mark.parametrize('wrong', [-1, 300])
def test_every_code_is_looked_at(tmp_path, row, wrong):
    num = 70_001
    with writer(tmp_path / 'codes', num=num, meta=dict(num_codes=2, vocab_size=300)) as store:
        store.append({'codes': np.zeros((num, 2), int)}, names=[''] * num)
    codes = np.zeros((num, 2), np.int32)
    codes[row, 1] = wrong
    np.save(tmp_path / 'codes' / 'codes.npy', codes)
    with pytest.raises(ValueError, match=f'holds {wrong} in row {row} but meta.json says vocab_size=300'):
        open_code_store(tmp_path / 'codes')


@pytest.mark.parametrize('labels, num_classes, match', [
    ([0, 1, 2], None, '1 of 3 labels are outside 0..1, the first is 2 in row 2'),
    ([0, -1, 0], 5, '1 of 3 .* -1 in row 1'),
    ([0, 1, 5], 5, 'outside 0..4'), ([0.0, 1.0, 0.0], None, 'float64'), ([[0], [1], [0]], None, r'\(3, 1\)')])
def test_labels_out_of_range_are_named(tmp_path, labels, num_classes, match):
    with writer(tmp_path / 'codes', num=3, meta=META) as store:
        store.append({'codes': np.zeros((3, 4), int), 'labels': np.array(labels)}, names='abc')
    store = open_code_store(tmp_path / 'codes')
    with pytest.raises(ValueError, match=match) as error:
        store.labels(num_classes)
    assert '\n' not in str(error.value)


def test_stores_of_two_encoders_are_told_apart(tmp_path):
    stores = {}
    for name, meta in (('a', dict(encoder='x')), ('b', dict(encoder='x')), ('c', dict(encoder='y')), ('d', {}),
                       ('e', dict(encoder='x', class_names=('b', 'a')))):
        fill(tmp_path / name, meta=META | meta)
        stores[f'--{name}'] = open_code_store(tmp_path / name)
    codestore.check_one_encoder({name: stores[name] for name in ('--a', '--b', '--d')})
    with pytest.raises(ValueError, match='--a .* and --c .* were written by different encoders'):
        codestore.check_one_encoder({name: stores[name] for name in ('--a', '--b', '--c')})
    with pytest.raises(ValueError, match='have other classes'):
        codestore.check_one_encoder({name: stores[name] for name in ('--a', '--e')})


@pytest.mark.parametrize('damage', [
    '[' * 100_000, '{"done": 3}', '[]', '{"done": -1, "meta": {"items": 10}, "arrays": {}}', '',
    '{"done": 1, "meta": 3}',
    '{"done": 1, "meta": {"items": 10}, "arrays": {"../x": [[1], "u1"]}, "names_bytes": 1}'])
def test_damaged_progress_is_named(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / 'codes', stop_at=3)
    (tmp_path / 'codes.partial' / 'progress.json').write_text(damage)
    for act in (open_code_store, fill):
        with pytest.raises(OSError, match='progress.json: damaged .*delete .*codes.partial') as error:
            act(tmp_path / 'codes')
        assert '\n' not in str(error.value)

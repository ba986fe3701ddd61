import errno
import json

import numpy as np
import pytest

from experiments.dlc.data import codestore
from experiments.dlc.data.codestore import code_dtype, open_code_store, writer

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
    note |= {'done': 3, 'names_bytes': len(b'\n'.join(names[:3])) + 1}
    (partial / 'progress.json').write_text(json.dumps(note))
    assert fill(tmp_path / 'codes') == 3
    assert_complete(tmp_path / 'codes')


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    real, calls = codestore.write_all, []

    def filling_up(file, data):
        calls.append(1)
        if len(calls) == 7:  # in the middle of the second append
            real(file, data[:1])
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(file, data)
    monkeypatch.setattr(codestore, 'write_all', filling_up)
    with pytest.raises(OSError, match='disk is full after 3 rows.*same command') as error:
        fill(tmp_path / 'codes')
    assert '\n' not in str(error.value) and error.value.errno == errno.ENOSPC
    monkeypatch.setattr(codestore, 'write_all', real)
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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize('damage,match', [
    (lambda p: truncate(p / 'codes.npy'), 'codes.npy: truncated or damaged'),
    (lambda p: (p / 'latents.npy').write_bytes(b''), 'latents.npy: truncated or damaged'),
    (lambda p: (p / 'labels.npy').unlink(), 'labels.npy: missing'),
    (lambda p: np.save(p / 'labels.npy', np.zeros(9)), 'labels.npy: 9 rows, meta.json says 10'),
    (lambda p: np.save(p / 'codes.npy', np.zeros((10, 3), np.uint8)), r'codes.npy is \(10, 3\)'),
    (lambda p: np.save(p / 'codes.npy', np.full((10, 4), 77, np.uint8)), 'holds 77'),
    (lambda p: truncate(p / 'meta.json'), 'meta.json: damaged'),
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

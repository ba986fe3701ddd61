"""Runs at a URL, on fsspec's file system in memory in place of a bucket: the same calls as for `gs://`, no network."""
import json
import os
import sys
import threading
import time

import ml_collections
import numpy as np
import pytest

from experiments.dlc.data import codestore, codestore_shards, codestore_writer
from experiments.dlc.data.samples import check_out, write
from experiments.runtime import config_files, metrics, png, shards, storage
from experiments.runtime.checkpoint import Checkpointer
from experiments.runtime.report import Report


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty `gs://bucket`; the local cache is below `tmp_path`."""
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ('gcs', 'gs')
        cachable = False
        store, pseudo_dirs = {}, ['']

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix('gs://'))

        def _open(self, path, mode='rb', **kwargs):
            if mode in ('ab', 'r+b'):
                raise NotImplementedError('an object store writes whole objects')
            return super()._open(path, mode, **kwargs)

    monkeypatch.setitem(sys.modules['fsspec.registry']._registry, 'gcs', Bucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv('EXPERIMENTS_CACHE', str(tmp_path / 'cache'))
    yield 'gs://bucket/runs'
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_paths(bucket, tmp_path, monkeypatch):
    assert storage.is_remote('gs://b/x') and not storage.is_remote(tmp_path)
    assert str(storage.resolve('gs://b/x') / 'y') == 'gs://b/x/y'
    monkeypatch.setenv('HOME', str(tmp_path))
    assert str(storage.resolve('~/x')) == str(tmp_path / 'x')
    with pytest.raises(ValueError, match='no storage ftp://; use a local path or one of gs://, s3://'):
        storage.resolve('ftp://x/y')


def test_a_missing_package_is_named(monkeypatch):
    import fsspec
    def absent(name):
        raise ImportError(name)
    monkeypatch.setattr(fsspec, 'get_filesystem_class', absent)
    with pytest.raises(ValueError, match=r"gs://b/x: .* needs a package; pip install -e '.\[gcs\]'"):
        storage.resolve('gs://b/x')


@pytest.mark.parametrize('remote', [False, True])
def test_written_whole_or_not_at_all(bucket, tmp_path, remote):
    place = storage.resolve(bucket if remote else tmp_path)
    storage.check_writable(place, '--out')
    with storage.write_whole(place / 'x') as file:
        file.write(b'one')
    with pytest.raises(KeyError):
        with storage.write_whole(place / 'x') as file:
            file.write(b'tw')
            raise KeyError
    assert (place / 'x').read_bytes() == b'one'
    assert [f.name for f in place.iterdir()] == ['x']


def test_config_and_metrics(bucket, monkeypatch):
    config = ml_collections.ConfigDict({'experiment': 'x', 'pair': (1, 2)})
    config_files.save(config, bucket)
    assert config_files.read(bucket).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="gs://bucket/runs: holds a run of experiment='x', not 'y'"):
        config_files.check_workdir(ml_collections.ConfigDict({'experiment': 'y'}), bucket)

    monkeypatch.setattr(metrics, 'REMOTE_SECONDS', 0.0)
    writer = metrics.MetricsWriter(bucket, tensorboard=False)
    writer.write(1, {'loss': 3.0})
    assert metrics.read_metrics(bucket + '/metrics.jsonl') == [{'step': 1, 'loss': 3.0}]
    monkeypatch.setattr(metrics, 'REMOTE_SECONDS', 1e9)
    for step in (2, 3):
        writer.write(step, {'loss': 2.0})
    assert len(metrics.read_metrics(bucket + '/metrics.jsonl')) == 1
    writer.close()
    assert [row['step'] for row in metrics.read_metrics(bucket + '/metrics.jsonl')] == [1, 2, 3]
    writer = metrics.MetricsWriter(bucket, from_step=2, tensorboard=False)
    writer.write(3, {'loss': 1.0})
    writer.flush()  # before a checkpoint, which a run that is killed afterwards is resumed from
    assert [row['loss'] for row in metrics.read_metrics(bucket + '/metrics.jsonl')] == [3.0, 2.0, 1.0]
    writer.close()
    assert [row['loss'] for row in metrics.read_metrics(bucket + '/metrics.jsonl')] == [3.0, 2.0, 1.0]


def test_checkpoints_stay_at_their_url(bucket):
    """Orbax takes it from there, with a driver of its own that no fake file system reaches."""
    checkpointer = Checkpointer(bucket + '/checkpoints', read_only=True)
    assert str(checkpointer.directory) == 'gs://bucket/runs/checkpoints' and checkpointer.steps() == []


def fill(path, *, stop_at=None, value=0):
    with codestore_writer.writer(path, num=6, meta=dict(num_codes=2, vocab_size=9)) as store:
        began = store.done
        for i in range(store.done, 6):
            if i == stop_at:
                raise KeyboardInterrupt
            store.append({'codes': np.full((1, 2), (i + value) % 9)}, names=[str(i)])
    return began


def test_code_store(bucket, tmp_path):
    path = bucket + '/codes'
    with pytest.raises(FileNotFoundError, match='gs://bucket/runs/codes: no code store there'):
        codestore.open_code_store(path)
    with pytest.raises(KeyboardInterrupt):
        fill(path, stop_at=4)
    assert not storage.resolve(path).exists()
    with pytest.raises(FileNotFoundError, match='gs://bucket/runs/codes: unfinished, 4 of 6 rows'):
        codestore.open_code_store(path)
    assert fill(path) == 4 and fill(path) == 6
    assert {f.name for f in storage.resolve(path).iterdir()} == {'codes.npy', 'meta.json', 'names.txt'}

    storage.remove(tmp_path / 'cache')  # another machine
    assert fill(path) == 6
    store = codestore.open_code_store(path)
    np.testing.assert_array_equal(store.array('codes')[:, 0], range(6))
    assert isinstance(store.array('codes'), np.memmap) and store.path.is_relative_to(tmp_path / 'cache')
    before = (store.path / 'codes.npy').stat().st_mtime_ns
    assert (codestore.open_code_store(path).path / 'codes.npy').stat().st_mtime_ns == before  # not copied twice


def test_parts_of_a_store_are_put_together_by_whoever_reads_it(bucket, tmp_path):
    fill(bucket + '/whole')
    path, meta = bucket + '/codes', dict(num_codes=2, vocab_size=9)
    for i, rows in ((1, range(4, 6)), (0, range(4))):  # by two machines, whose caches nobody else sees
        part = shards.Shard(i, 2)
        unfinished = 'unfinished, 1 of 2 shards; missing are 0/2' if i == 0 else 'no code store there'
        with pytest.raises(FileNotFoundError, match=f'gs://bucket/runs/codes: {unfinished}'):
            codestore.open_code_store(path)
        with codestore_writer.writer(shards.place(path, part), num=len(rows),
                                     meta=codestore_shards.part_meta(meta, part, rows)) as store:
            store.append({'codes': np.repeat(np.array(rows)[:, None], 2, 1)}, names=[str(j) for j in rows])
        storage.remove(tmp_path / 'cache')
    store = codestore.open_code_store(path)
    np.testing.assert_array_equal(store.array('codes')[:, 0], range(6))
    contents = lambda place: {file.name: file.read_bytes() for file in storage.resolve(place).iterdir()}
    assert contents(path) == contents(bucket + '/whole')
    assert not storage.resolve(path + '.shards').exists()


def test_parts_of_before_and_after_stores_said_where_codes_come_from(bucket):
    said = [dict(drawn=False), dict(origin='image'), dict(origin='drawn')]
    for name, metas in (('codes', said[:2]), ('others', said[1:])):
        for i, more in enumerate(metas):
            part, meta = shards.Shard(i, 2), dict(num_codes=2, vocab_size=9) | more
            with codestore_writer.writer(shards.place(f'{bucket}/{name}', part), num=1,
                                         meta=codestore_shards.part_meta(meta, part, range(i, i + 1))) as store:
                store.append({'codes': np.full((1, 2), i)}, names=[str(i)])
    np.testing.assert_array_equal(codestore.open_code_store(bucket + '/codes').array('codes')[:, 0], [0, 1])
    with pytest.raises(ValueError, match="has origin='drawn', other parts 'image'"):
        codestore.open_code_store(bucket + '/others')


def test_an_upload_that_breaks_off_is_no_store_and_is_made_anew(bucket, monkeypatch, tmp_path):
    real = storage.epath.Path.copy
    def failing(self, target, **options):
        if self.name == 'names.txt':
            raise OSError('connection lost')
        return real(self, target, **options)
    with monkeypatch.context() as broken:
        broken.setattr(type(storage.epath.Path('x')), 'copy', failing)
        with pytest.raises(OSError, match='connection lost'):
            fill(bucket + '/codes')
    assert not (storage.resolve(bucket) / 'codes' / 'meta.json').exists()
    assert fill(bucket + '/codes') == 6
    storage.remove(tmp_path / 'cache')  # another machine
    np.testing.assert_array_equal(codestore.open_code_store(bucket + '/codes').array('codes')[:, 0], range(6))


def test_a_store_that_has_changed_is_copied_again(bucket, tmp_path):
    path = bucket + '/codes'
    fill(path)
    codestore.open_code_store(path)
    array = np.full((6, 2), 5, np.uint8)
    np.save(tmp_path / 'codes.npy', np.concatenate([array, array]))
    meta = json.loads((storage.resolve(path) / 'meta.json').read_text()) | {'num': 12}
    storage.epath.Path(tmp_path / 'codes.npy').copy(storage.resolve(path) / 'codes.npy', overwrite=True)
    (storage.resolve(path) / 'meta.json').write_text(json.dumps(meta))
    assert (codestore.open_code_store(path).array('codes') == 5).all()


def test_a_note_of_a_copy_that_was_cut_short_costs_a_copy(bucket):
    (storage.resolve(bucket) / 'w').mkdir(parents=True)
    (storage.resolve(bucket) / 'w' / 'a.txt').write_text('x')
    copy = storage.local_copy(bucket + '/w')
    copy.with_name('copied.json').write_text('{"a.t')
    (copy / 'a.txt').write_text('changed')
    copy.with_name(f'w.{os.getpid()}').mkdir()  # left by a process of this number that was killed while it copied
    assert storage.local_copy(bucket + '/w') == copy and (copy / 'a.txt').read_text() == 'x'
    assert json.loads(copy.with_name('copied.json').read_text()).keys() == {'a.txt'}


def test_processes_of_a_machine_do_not_take_copies_away_from_each_other(bucket, monkeypatch):
    """One copies; another, which looked before that was done, waits and takes the same copy."""
    (storage.resolve(bucket) / 'w').mkdir(parents=True)
    for name in 'ab':
        (storage.resolve(bucket) / 'w' / f'{name}.txt').write_text('x')
    real, copied = type(storage.resolve(bucket)).copy, []

    def slow(self, target, **options):
        copied.append(self.name)
        begun.set()
        time.sleep(0.2)
        return real(self, target, **options)
    begun, found = threading.Event(), []
    monkeypatch.setattr(type(storage.resolve(bucket)), 'copy', slow)
    threads = [threading.Thread(target=lambda: found.append(storage.local_copy(bucket + '/w'))) for _ in range(2)]
    threads[0].start()
    begun.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert sorted(copied) == ['a.txt', 'b.txt'] and len(set(found)) == 1 and len(found) == 2
    assert sorted(file.name for file in found[0].iterdir()) == ['a.txt', 'b.txt']


def test_samples_and_reports(bucket):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    for name in ('x.npz', 'x.png', 'many'):
        check_out(f'{bucket}/{name}')
        write([images], f'{bucket}/{name}')
    with (storage.resolve(bucket) / 'x.npz').open('rb') as file, np.load(file) as arrays:
        np.testing.assert_array_equal(arrays['arr_0'], images)
    assert (storage.resolve(bucket) / 'x.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(f.name for f in (storage.resolve(bucket) / 'many').iterdir()) == ['000000.png', '000001.png']
    png.save(f'{bucket}/one.png', images[0])
    Report('Größe').save(f'{bucket}/report.html')
    assert 'Größe' in (storage.resolve(bucket) / 'report.html').read_bytes().decode()

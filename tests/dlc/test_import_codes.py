"""The authors' released codes and latents, as a code store."""
import numpy as np
import pytest

from experiments.dlc.data.codestore import open_code_store
from experiments.import_codes import import_codes

pa = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')
L, V = 6, 9


def write(folder, sizes=(5, 0, 4), codes=None, latents=None):
    """Parquet files like theirs; returns all codes and latents [N, 4, 8, 8]."""
    rng, num = np.random.default_rng(0), sum(sizes)
    codes = rng.integers(0, V, (num, L)) if codes is None else codes
    latents = rng.normal(size=(num, 4, 8, 8)).astype(np.float32) if latents is None else latents
    (folder / 'data').mkdir(parents=True)
    start = 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        table = pa.table({'features': pa.array(latents[rows].tolist(), pa.list_(pa.list_(pa.list_(pa.float32())))),
                          'labels': pa.array([list(map(int, row)) for row in codes[rows]], pa.list_(pa.int64()))})
        parquet.write_table(table, folder / 'data' / f'train-{i:05d}.parquet', row_group_size=2)
        start += size
    return codes, latents


def test_rows_are_theirs_in_order_and_continue(tmp_path, monkeypatch):
    codes, latents = write(tmp_path / 'src')
    assert import_codes(tmp_path / 'src', tmp_path / 'out', V) == 9
    store = open_code_store(tmp_path / 'out', num_codes=L, vocab_size=V)
    np.testing.assert_array_equal(store.array('codes'), codes)
    np.testing.assert_array_equal(store.array('latents'), latents.transpose(0, 2, 3, 1).astype(np.float16))
    assert store.names[-1] == '0000008'
    assert store.meta['origin'] == 'image'  # for the recipe that their images are made by

    from experiments import import_codes as module
    monkeypatch.setattr(module, 'ROWS', 2)
    read, calls = module.read, []

    def interrupted(file, start):
        for part in read(file, start):
            calls.append(start)
            if len(calls) == 4:
                raise KeyboardInterrupt
            yield part
    with monkeypatch.context() as patch:
        patch.setattr(module, 'read', interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_codes(tmp_path / 'src', tmp_path / 'cut', V)
    import_codes(tmp_path / 'src', tmp_path / 'cut', V)
    for name in ('codes.npy', 'latents.npy', 'names.txt', 'meta.json'):
        assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'out' / name).read_bytes()


def test_what_does_not_fit_is_one_line(tmp_path):
    def fails(match, **how):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(folder, **how)
        with pytest.raises(ValueError, match=match) as error:
            import_codes(folder, folder / 'out', V)
        assert '\n' not in str(error.value)
    fails('outside vocab_size=9', codes=np.full((9, L), V))
    ragged = [[0] * L] * 8 + [[0] * (L - 1)]
    fails(r'rows of 5 to 6 numbers', codes=ragged)
    fails('not finite as float16', latents=np.full((9, 4, 8, 8), 1e9, np.float32))
    with pytest.raises(FileNotFoundError, match='no .parquet file there'):
        import_codes(tmp_path, tmp_path / 'out', V)
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'x.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(ValueError, match='cannot be read as parquet'):
        import_codes(tmp_path / 'bad', tmp_path / 'out', V)
    parquet.write_table(pa.table({'features': [[1.0]]}), tmp_path / 'bad' / 'x.parquet')
    with pytest.raises(ValueError, match="no 'labels'"):
        import_codes(tmp_path / 'bad', tmp_path / 'out', V)

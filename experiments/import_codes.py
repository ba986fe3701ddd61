"""Turns the authors' released codes and latents into a code store, to train DiT and SEDD without ImageNet.

    # a copy of the data set lavoies/DLC_512x256: parquet files with `features` [4, 32, 32] and `labels`, the code
    python -m experiments.import_codes --src=DLC_512x256/ --vocab_size=256 --out=imagenet_codes
    python -m experiments.train --config=configs/dlc/generator_imagenet.py:L512 --workdir=RUN \\
        --config.data.path=imagenet_codes

Latents are as `experiments.encode --vae` writes them: one posterior sample of sd-vae-ft-ema an image, scaled by
0.18215, stored here as float16 [32, 32, 4]. The rows say neither class nor name, so they are numbered. Needs pyarrow
(the extra `text`). Run again after an interruption, it continues.
"""
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.dlc.data import codestore_writer
from experiments.runtime import launch, storage

ROWS = 4096  # that are read together


def parquet_files(src: str | os.PathLike) -> list[pathlib.Path]:
    """The parquet files of a data set's folder, itself or under `data/`, in order.

    Raises:
        FileNotFoundError: there is none.
    """
    root = storage.local_copy(src)
    for folder in (root, root / 'data'):
        if files := sorted(folder.glob('*.parquet')) if folder.is_dir() else []:
            return files
    raise FileNotFoundError(f'--src={src}: no .parquet file there, nor in data/; give a copy of the data set '
                            'lavoies/DLC_512x256')


def counts(files: list[pathlib.Path]) -> list[int]:
    """Rows of each file.

    Raises:
        ImportError: no pyarrow.
        ValueError: no parquet file, or one without the columns.
    """
    parquet = _pyarrow(files[0])
    out = []
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                columns, rows = opened.schema_arrow.names, opened.metadata.num_rows
        except Exception as error:  # pyarrow's errors are of many types, and none names the file
            raise ValueError(f'{file}: cannot be read as parquet ({str(error).splitlines()[0]})') from None
        if missing := {'features', 'labels'} - set(columns):
            raise ValueError(f'{file}: has columns {columns} but no {sorted(missing)[0]!r}')
        out.append(rows)
    return out


def read(file: pathlib.Path, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes int [n, L] and latents float16 [n, H, W, C] of the rows of a file from `start` on.

    Raises:
        ValueError: damaged, or rows of different sizes.
    """
    parquet = _pyarrow(file)
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(ROWS, columns=['features', 'labels']):
                skipped = min(start, len(batch))
                start -= skipped
                batch = batch.slice(skipped)
                if len(batch):
                    batch.validate(full=True)
                    with np.errstate(over='ignore'):  # what float16 cannot hold is found by who stores it
                        latents = np.moveaxis(as_array(batch.column('features'), 3), 1, -1).astype(np.float16)
                    yield as_array(batch.column('labels'), 1), latents
    except Exception as error:
        raise ValueError(f'{file}: cannot be read ({str(error).splitlines()[0]})') from None


def as_array(column: Any, depth: int) -> np.ndarray:
    """A column of lists, `depth` of them inside each other and of one size each, as [n, ...].

    Raises:
        ValueError: rows of different sizes, or empty ones.
    """
    import pyarrow.compute
    shape = [len(column)]
    column = getattr(column, 'storage', column)
    for _ in range(depth):
        if column.null_count:
            raise ValueError('a row is empty')
        sizes = pyarrow.compute.min_max(pyarrow.compute.list_value_length(column)).as_py()
        if sizes['min'] != sizes['max'] or not sizes['min']:
            raise ValueError(f'rows of {sizes["min"]} to {sizes["max"]} numbers; all need one size')
        shape.append(sizes['min'])
        column = column.flatten()
    if column.null_count:
        raise ValueError('a number is missing')
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def _pyarrow(file: pathlib.Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file}: parquet needs pyarrow; pip install -e '.[text]'") from None
    return pyarrow.parquet


def import_codes(src: str | os.PathLike, out: str | os.PathLike, vocab_size: int) -> int:
    """Writes the store `out`; returns how many rows it has.

    Raises:
        ValueError, OSError: no such data, codes outside 0..vocab_size - 1, or another store at `out`.
    """
    files = parquet_files(src)
    rows = counts(files)
    if not sum(rows):
        raise ValueError(f'--src={src}: no rows in its {len(files)} files')
    first = next(file for file, count in zip(files, rows) if count)
    length = next(read(first, 0))[0].shape[1]
    meta = dict(num_codes=length, vocab_size=vocab_size, class_names=(), stored='latents', origin='image',
                files=[[file.name, count] for file, count in zip(files, rows)])
    with codestore_writer.writer(out, num=sum(rows), meta=meta) as store, \
            tqdm(total=sum(rows), initial=store.done, desc='import', unit='image', dynamic_ncols=True) as bar:
        before = 0
        for file, count in zip(files, rows):
            for codes, latents in read(file, max(store.done - before, 0)) if store.done < before + count else ():
                if not np.isfinite(latents).all():
                    raise ValueError(f'{file}: features that are not finite as float16, after row {store.done}')
                names = [f'{i:07d}' for i in range(store.done, store.done + len(codes))]
                store.append({'codes': codes, 'latents': latents}, names=names)
                bar.update(len(codes))
            before += count
    return sum(rows)


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--src', required=True, metavar='DIR', help='the folder of parquet files')
    p.add_argument('--vocab_size', required=True, type=int, metavar='V', help='values a code token may have')
    p.add_argument('--out', required=True, metavar='DIR', help='the code store')
    args, _ = launch.parse(p)
    if not 1 <= args.vocab_size <= 2 ** 31:
        raise ValueError(f'--vocab_size={args.vocab_size} must be at least 1')
    storage.check_writable(storage.resolve(args.out).parent, '--out')
    launch.initialize(args)
    if jax.process_count() > 1:
        raise ValueError('experiments.import_codes writes from one process; run it without --distributed')
    try:
        print(f'{import_codes(args.src, args.out, args.vocab_size)} codes and latents -> {args.out}')
    except ImportError as error:
        raise ValueError(str(error)) from None


if __name__ == '__main__':
    launch.main(main)

"""The code and latent loader against a per-item collate of Python lists.

The reference is how the original training reads its data: each item holds its latent and its code as nested Python
lists (rows of an arrow table), and every batch becomes arrays by walking them.
"""
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

from experiments.dlc.data.codestore import open_code_store
from experiments.dlc.data.codestore_writer import writer
from experiments.runtime.stream import ArrayBatches

ROWS, BATCH, LENGTH, VOCAB, LATENT = 512, 64, 512, 256, (32, 32, 4)


def seconds(work: Callable[[], object], count: int = 1) -> float:
    """Of one of `count` calls in a row."""
    started = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - started) / count


def compare(repeats: int = 10) -> dict[str, list[float]]:
    """Batches of 64 codes of 512 tokens with their 32 x 32 x 4 latents, ours and the reference in turn.

    Args:
        repeats: turns.

    Returns:
        Seconds a batch of each turn: `ours`, and `lists`, the reference, which builds tensors with `torch.tensor` where
        PyTorch is present and arrays with numpy where it is not.
    """
    try:
        import torch
        to_array = torch.tensor
    except ImportError:
        to_array = np.array
    rng = np.random.default_rng(0)
    codes = rng.integers(0, VOCAB, (ROWS, LENGTH))
    latents = rng.normal(size=(ROWS, *LATENT)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'codes'
        with writer(path, num=ROWS, meta=dict(num_codes=LENGTH, vocab_size=VOCAB)) as store:
            store.append({'codes': codes, 'latents': latents}, names=[str(i) for i in range(ROWS)])
        store = open_code_store(path, num_codes=LENGTH, vocab_size=VOCAB)
        ours = ArrayBatches({'x': store.array('latents'), 'cond': store.array('codes')}, BATCH, seed=0,
                            casts={'x': np.float32, 'cond': np.int32})
        # Channels first there: long inner lists, which torch walks faster than the short ones of our layout.
        items = [{'features': np.moveaxis(latents[i], -1, 0).tolist(), 'labels': codes[i].tolist()}
                 for i in range(2 * BATCH)]

        def reference():
            rows = [items[i] for i in rng.permutation(len(items))[:BATCH]]
            return to_array([row['features'] for row in rows]), to_array([row['labels'] for row in rows])

        next(ours), reference()
        turns = [(seconds(lambda: next(ours), 20), seconds(reference)) for _ in range(repeats)]
    ours, lists = map(list, zip(*turns))
    return {'ours': ours, 'lists': lists}

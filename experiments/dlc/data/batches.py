"""Endless batches of images with an exact position (`runtime.stream`): crops for the encoder, labelled ones for probes.

What comes next is a function of (seed, position), not of worker or thread counts.

grain brings the threads and worker processes. What an item is and in which order they come is decided here, so that
the state stays one integer and says nothing about workers. Functions that travel to workers are pickled by value
(cloudpickle) and use no jax.
"""
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dlc_jax.ssl.augment import MultiCrop
from dlc_jax.ssl.masking import BlockMasking, pack_masks
from experiments.dlc.data.images import ImageSource
from experiments.runtime import cores
from experiments.runtime.stream import WHOLE, Batch, EpochOrder, Share, Stream

# Streams of random numbers that must not coincide.
AUGMENT, MASK = 1, 2
ENDLESS = 2 ** 40  # batches
VECTORIZED_PIXELS = 32  # up to this side, a whole batch in numpy beats one PIL call a crop


# ---- Images in parallel --------------------------------------------------------------------------------------------

def read_parallel(source: ImageSource, index: Callable[[int], int], make: Callable[[int, Mapping[str, Any]], Batch],
                  finish: Callable[[Batch, int], Batch], rows: int, *, count: int = ENDLESS,
                  num_threads: int | None = None, num_workers: int = 0) -> Iterator[Batch]:
    """Batches i = 0 .. count - 1 of `rows` items each, made ahead of use.

    What was met on the way (unreadable images, notes) comes with the batch and is recorded in `source` here, whatever
    thread or process read it.

    Args:
        index: k -> which image of `source` item k is.
        make: (k, `source.fetch(index(k))`) -> arrays of one row.
        finish: (stacked rows, i) -> batch i.
    """
    import grain  # its import takes seconds; small data sets never need it
    from absl import flags

    def load(k: int) -> tuple[int, Batch, tuple]:
        item = source.fetch(index(k))
        return k, make(k, item), (item['skipped'], item['notes'], item['name'])

    def collate(items: list[tuple[int, Batch, tuple]]) -> dict:
        batch = {name: np.stack([row[name] for _, row, _ in items]) for name in items[0][1]}
        met = tuple(events for _, _, events in items if events[0] or events[1])
        return {'batch': finish(batch, items[0][0] // rows), 'met': met}

    # Of the cores that this process may use: eight processes of a node with 32 workers each would be 256.
    num_workers = min(num_workers, cores.usable())
    items = grain.MapDataset.range(count * rows).map(load)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain's worker pool reads absl flags, which this code base does not use
            flags.FLAGS.mark_as_parsed()
        # Elements are dealt out to the workers, so here the element must be a whole batch.
        batches = items.batch(rows, batch_fn=collate).to_iter_dataset(grain.ReadOptions(1, 1))
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=keep_off_accelerators)
    else:
        num_threads = num_threads or min(16, cores.usable())
        ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * rows, num_threads))
        batches = items.to_iter_dataset(ahead).batch(rows, batch_fn=collate)
    for made in batches:
        for events in made['met']:
            source.record(*events)
        yield made['batch']


def keep_off_accelerators(worker: int, num_workers: int) -> None:
    """grain imports jax in its workers; should anything there touch it, it must not claim the chips."""
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')


class ImageStream(Stream):
    """Transformed images of a source, read by grain.

    Args:
        transform: (rng, image) -> arrays of one row.
        finish: (batch, position of the global batch) -> batch.
    """

    def __init__(self, source: ImageSource, transform: Callable[[np.random.Generator, np.ndarray], Batch],
                 finish: Callable[[Batch, int], Batch], batch_size: int, *, seed: int, share: Share = WHOLE,
                 **parallel: int | None):
        super().__init__(batch_size, share)
        self._source, self._transform, self._finish, self._seed = source, transform, finish, seed
        self._order, self._parallel, self._batches = EpochOrder(len(source), seed), parallel, None

    def _open(self) -> Iterator[Batch]:
        source, transform, order, seed, finish = self._source, self._transform, self._order, self._seed, self._finish
        start, step, rows = self._position, self._batch_size, self._rows

        def position_of(k: int) -> int:
            """Global position of this process's item k: `rows` are its rows of each global batch."""
            batch_number, row_in_batch = divmod(k, len(rows))
            return start + batch_number * step + int(rows[row_in_batch])

        def index(k: int) -> int:
            return int(order(np.array([position_of(k)]))[0])

        def make(k: int, item: Mapping[str, Any]) -> Batch:
            arrays = transform(np.random.default_rng((seed, AUGMENT, position_of(k))), item['image'])
            return arrays | {'label': np.int32(item['label'])}
        return read_parallel(source, index, make, lambda batch, i: finish(batch, start + i * step), len(rows),
                             **self._parallel)

    def _draw(self) -> Batch:
        if self._batches is None:
            self._batches = self._open()
        return next(self._batches)

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self._batches = None


# ---- Self-supervised -----------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class GroupMasks:
    """Adds `masks`, `mask_indices` and `mask_weights` to a batch, drawn group by group from (seed, position, group)."""
    masking: BlockMasking
    seed: int
    groups: tuple[int, ...]  # this process's, of the whole batch
    group_size: int  # images

    def __call__(self, batch: Batch, position: int) -> Batch:
        crops = 2 * self.group_size
        masks = [self.masking(np.random.default_rng((self.seed, MASK, position, g)), crops) for g in self.groups]
        packed = [pack_masks(m, self.masking.max_masked(crops)) for m in masks]
        return {'global_crops': batch['global_crops'], 'local_crops': batch['local_crops'],
                'masks': np.concatenate(masks).reshape(-1, 2, self.masking.num_patches),
                'mask_indices': np.stack([indices for indices, _ in packed]),
                'mask_weights': np.stack([weights for _, weights in packed])}


class SmallMultiCrop(Stream):
    """`ssl_batches` of small images that are all in memory: the whole batch in a few numpy calls, no grain."""

    def __init__(self, images: np.ndarray, multicrop: MultiCrop, finish: GroupMasks, batch_size: int, *, seed: int,
                 share: Share):
        super().__init__(batch_size, share)
        self._images, self._multicrop, self._finish, self._seed = images, multicrop, finish, seed
        self._order = EpochOrder(len(images), seed)

    def _draw(self) -> Batch:
        # Drawn for the global batch, so that a row's crops do not depend on which process makes them.
        rng = np.random.default_rng((self._seed, AUGMENT, self._position))
        views = self._multicrop.sample(rng, self._batch_size, self._images.shape[1:3])
        mine = type(views)(*(x[self._rows] for x in views))
        whole, small = self._multicrop.apply_batch(self._images[self._order(self._positions())], mine)
        return self._finish({'global_crops': whole, 'local_crops': small}, self._position)


def ssl_batches(source: ImageSource, multicrop: MultiCrop, masking: BlockMasking, batch_size: int, *, groups: int,
                seed: int, share: Share = WHOLE, num_threads: int | None = None, num_workers: int = 0,
                vectorized: bool | None = None) -> Stream:
    """Batches for the encoder's objective.

    Args:
        batch_size: images over all processes.
        groups: parts of the batch that are masked on their own (the original: one a GPU); rows of a group are
            consecutive.
        num_threads: that read and distort images; None is one a core, at most 16.
        num_workers: processes in place of the threads. From about 16 cores on, threads wait for each other.
        vectorized: augment a whole batch in numpy. None: where images are in memory and at most 32 pixels wide.

    Returns:
        Stream of `global_crops` [B, 2, S, S, C] and `local_crops` [B, n, s, s, C] float32, `masks` [B, 2, N] bool,
        `mask_indices` [G, M] int32 into the group's flattened [B / G * 2 * N] patches, `mask_weights` [G, M] float32;
        B and G being this process's share.

    Raises:
        ValueError: batch, groups, processes and grid do not fit together.
    """
    if groups < 1 or batch_size % groups or groups % share.count:
        raise ValueError(f'groups={groups} must divide batch_size={batch_size} and be a multiple of the '
                         f'{share.count} parts that the mesh divides a batch into')
    if any(multicrop.global_size % side for side in masking.sides):
        raise ValueError(f'global_size={multicrop.global_size} cannot be divided into the {masking.sides} patches of '
                         'the masks')
    finish = GroupMasks(masking, seed, tuple(share.rows(groups).tolist()), batch_size // groups)
    common = dict(seed=seed, share=share)
    images = getattr(source, 'images', None)
    if vectorized is None:
        vectorized = images is not None and max(images.shape[1:3]) <= VECTORIZED_PIXELS
    if vectorized:
        if images is None:
            raise ValueError('vectorized=True needs a source in memory; set data.in_memory=True')
        return SmallMultiCrop(images, multicrop, finish, batch_size, **common)

    def crops(rng: np.random.Generator, image: np.ndarray) -> Batch:
        whole, small = multicrop(rng, image)
        return {'global_crops': whole, 'local_crops': small}
    return ImageStream(source, crops, finish, batch_size, num_threads=num_threads, num_workers=num_workers, **common)


# ---- Labelled images, and one pass over a data set -----------------------------------------------------------------

def named(arrays: Any) -> Batch:
    """What a transform returned, as a dict: a bare array is `image`."""
    return dict(arrays) if isinstance(arrays, Mapping) else {'image': arrays}


def image_batches(source: ImageSource, transform: Callable[[np.random.Generator, np.ndarray], Any], batch_size: int, *,
                  seed: int, share: Share = WHOLE, num_threads: int | None = None, num_workers: int = 0) -> Stream:
    """Endless `image` [B, ...] and `label` [B] int32, for pixel models and linear probes.

    Args:
        transform: (rng, image) -> array, or dict of arrays to use in place of `image`.
    """
    return ImageStream(source, lambda rng, image: named(transform(rng, image)), lambda batch, position: batch,
                       batch_size, seed=seed, share=share, num_threads=num_threads, num_workers=num_workers)


def eval_batches(source: ImageSource, transform: Callable[[np.ndarray], Any], batch_size: int, *,
                 part: range | None = None, num_threads: int | None = None, num_workers: int = 0) -> Iterator[Batch]:
    """One pass over `source` in order, or over a `part` of it.

    Args:
        transform: image -> array, or dict of arrays to use in place of `image`.
        batch_size: images at once.
        part: which images; None: all.

    Returns:
        Iterator of the transform's arrays [B, ...], `label` [B] int32, `index` [B] int64 into the source, and `mask`
        [B] bool: False on rows that only fill up the last batch, and on those of unreadable images, whose arrays are
        another's.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size} must be at least 1')
    part = range(len(source)) if part is None else part
    first, stop = part.start, part.stop

    def index(k: int) -> int:
        return min(first + k, stop - 1)

    def make(k: int, item: Mapping[str, Any]) -> Batch:
        return named(transform(item['image'])) | {'label': np.int32(item['label']),
                                                  'readable': np.bool_(item['index'] == index(k))}

    def finish(batch: Batch, i: int) -> Batch:
        position = first + i * batch_size + np.arange(batch_size)
        mask = (position < stop) & batch.pop('readable')
        return batch | {'index': np.minimum(position, stop - 1), 'mask': mask}
    return read_parallel(source, index, make, finish, batch_size, count=-(-len(part) // batch_size),
                         num_threads=num_threads, num_workers=num_workers)

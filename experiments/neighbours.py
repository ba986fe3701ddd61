"""Shows the training images that samples are nearest to, in the features of a network: are they new, or copies?

    python -m experiments.neighbours --samples=samples.npz --among=codes/train --dinov2=dinov2_vitl14/ --out=near.png
    python -m experiments.neighbours --samples=samples/ --among=codes/train --out=near.png      # in pixels

Each row of the picture is a sample and its --k nearest images, the nearest first. Beside it, near.json has for every
sample the distances and rows of its neighbours, and the median distance to the nearest one, of the samples and, with
--heldout, of images that no model has seen: samples much nearer than those are copies.
"""
import argparse
from typing import Any

import jax
import numpy as np

from dlc_jax.metrics import nearest
from experiments.dlc.commands import features
from experiments.evaluate import load_images, merged
from experiments.runtime import launch, png, shards, storage


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--samples', nargs='+', required=True, metavar='NPZ|DIR|STORE')
    p.add_argument('--among', required=True, metavar='NPZ|DIR|STORE', help='images to look for neighbours among')
    p.add_argument('--heldout', metavar='NPZ|DIR|STORE', help='images that no model has seen, to compare with')
    p.add_argument('--dinov2', metavar='DIR|RUN', help='DINOv2 weights, or an encoder: distances in its features '
                   '(default: in pixels)')
    p.add_argument('--k', type=int, default=5, help='neighbours of each sample (default 5)')
    p.add_argument('--num', type=int, default=16, help='samples in the picture, the first so many (default 16)')
    p.add_argument('--batch_size', type=int, default=64, help='images at once on a device (default 64)')
    p.add_argument('--out', required=True, metavar='FILE.png')
    args, _ = launch.parse(p)
    for name in ('k', 'num', 'batch_size'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)} must be at least 1')
    out = storage.resolve(args.out)
    if out.suffix != '.png':
        raise ValueError(f'--out={args.out}: end it in .png; the numbers go beside it')
    storage.check_writable(out.parent, '--out')
    launch.initialize(args)
    samples, among, heldout = opened(args)
    compute = features.encoder(args.dinov2, args.batch_size) if args.dinov2 else pixels
    of_among = compute(among)
    found = neighbours(compute(samples), of_among, args.k)
    numbers: dict[str, Any] = {'median_nearest': float(np.median(found['distances'][:, 0]))}
    if heldout is not None:
        numbers['median_nearest_heldout'] = float(np.median(neighbours(compute(heldout), of_among, 1)['distances']))
    if jax.process_index() == 0:
        shown = [image for sample, rows in zip(samples[:args.num], found['rows']) for image in (sample, *among[rows])]
        png.save(out, png.grid(np.stack(shown), args.k + 1))
        numbers |= {name: array.tolist() for name, array in found.items()}
        storage.write_json(out.with_suffix('.json'), numbers)
        print(', '.join(f'{name} {value:.4g}' for name, value in numbers.items() if isinstance(value, float))
              + f' -> {args.out}')
    shards.wait_for_all()


def opened(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The three sets of images.

    Raises:
        ValueError, OSError: a set that cannot be read, images of different sizes, or fewer than `--k` to find.
    """
    samples, among = merged(args.samples), load_images(args.among)
    heldout = load_images(args.heldout) if args.heldout else None
    for flag, images in (('--among', among), ('--heldout', heldout)):
        if images is not None and images.shape[1:] != samples.shape[1:]:
            raise ValueError(f'--samples are {samples.shape[1:]} but {flag} images {images.shape[1:]}; use one size')
    if args.k > len(among):
        raise ValueError(f'--k={args.k}: --among={args.among} holds {len(among)} images')
    return samples, among, heldout


def pixels(images: np.ndarray) -> np.ndarray:
    """Images as vectors whose distances are root mean squares over pixels, in grey levels."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    return flat / np.sqrt(flat.shape[1])


def neighbours(queries: np.ndarray, references: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """`rows` int [N, k] of the nearest references to each query, the nearest first, and their `distances` [N, k]."""
    rows, distances = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for part, squared in nearest.blocks(queries, references, 1024):
        some = np.argpartition(squared, k - 1, 1)[:, :k]
        order = np.argsort(np.take_along_axis(squared, some, 1), 1, kind='stable')
        rows[part] = np.take_along_axis(some, order, 1)
        distances[part] = np.sqrt(np.take_along_axis(squared, rows[part], 1))
    return {'rows': rows, 'distances': distances}


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOTHING_WRITTEN, status=None)

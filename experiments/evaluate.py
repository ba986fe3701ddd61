"""Measures trained models and sets of samples.

    # k-NN and linear probe on soft codes, bare codes and the embedding; how the codes use their vocabulary
    python -m experiments.evaluate --train=codes/train --heldout=codes/heldout
    # images against a reference, in a feature space of your choice
    python -m experiments.evaluate --samples=samples.npz --reference=codes/heldout --train=codes/train
    python -m experiments.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=DIR

Stores come from experiments.encode, samples.npz from experiments.sample. With --inception (the released FID weights) this
gives FID, sFID, Inception score, precision and recall as they are published; without, distances in the features of a
small classifier fitted to the --train images, comparable only among themselves.
"""
import argparse
import json

import numpy as np

from dlc_jax import convert
from dlc_jax.convert.files import load_state_dict
from dlc_jax.metrics import frechet, inception_features, inception_score
from experiments.dlc import codestore, evaluation
from experiments.dlc.judge import Judge
from experiments.runtime import launch, storage


def load_images(path: str) -> np.ndarray:
    """uint8 [N, H, W, C] from an .npz (`arr_0`, or `images`) or from a code store.

    Raises:
        ValueError, OSError: nothing of the kind is there.
    """
    place = storage.resolve(path)
    if not place.exists():
        raise FileNotFoundError(f'{path}: nothing there; give an .npz of images or a code store')
    if place.is_dir():
        return np.asarray(codestore.open_code_store(path).array('images'))
    try:
        with np.load(storage.local_copy(path), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ('arr_0', 'images') if name in arrays.files}
            held = arrays.files
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise OSError(f'{path}: truncated or no .npz ({error}); write it again') from None
    if not found:
        raise ValueError(f'{path}: holds {held}, but no images under arr_0 or images')
    images = next(iter(found.values()))
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f'{path}: images are {images.dtype} {images.shape}; expected uint8 [N, H, W, C]')
    return images


def inception_scores(weights: str, samples: np.ndarray, reference: np.ndarray, batch_size: int) -> dict[str, float]:
    """FID, sFID, IS, precision and recall in the released Inception's features (the ADM suite's protocol)."""
    module, params = convert.from_torch('inception', load_state_dict(storage.local_copy(weights)))

    ours, theirs = (inception_features.inception_features(module, params, [images], batch_size=batch_size)
                    for images in (samples, reference))
    scores = evaluation.compare(ours.pool, theirs.pool)
    mean, spread = inception_score.inception_score(ours.unbiased_logits)
    return {'fid': scores.pop('frechet'), 'inception_score': float(mean), 'inception_score_std': float(spread),
            'sfid': frechet.frechet_distance(frechet.statistics(ours.spatial), frechet.statistics(theirs.spatial)), **scores}


def check_flags(args: argparse.Namespace) -> None:
    """Raises a ValueError or OSError for flags that do not add up to a measurement."""
    if not (args.samples or args.heldout):
        raise ValueError('nothing to measure: give --samples and --reference, or --train and --heldout')
    if args.samples and not args.reference:
        raise ValueError('--samples needs --reference: real images to compare with')
    if args.samples and not (args.inception or args.train):
        raise ValueError('--samples needs a feature space: --inception=DIR, or --train=STORE to fit a small classifier')
    if args.heldout and not args.train:
        raise ValueError('--heldout needs --train: the store that probes are fitted to')
    if args.batch_size < 1:
        raise ValueError(f'--batch_size={args.batch_size} must be at least 1')
    if args.json:
        storage.check_writable(storage.resolve(args.json).parent, '--json')


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--samples', metavar='NPZ', help='images to judge')
    p.add_argument('--reference', metavar='NPZ|STORE', help='real images that no model has seen')
    p.add_argument('--train', metavar='STORE', help='code store of the training images')
    p.add_argument('--heldout', metavar='STORE', help='code store of the held-out images')
    p.add_argument('--inception', metavar='DIR', help='released FID Inception weights')
    p.add_argument('--batch_size', type=int, default=64)
    p.add_argument('--json', metavar='FILE', help='also write the numbers there')
    args, _ = launch.parse(p)
    check_flags(args)
    launch.initialize(args)
    # ---- Everything is opened before anything is measured ------------------------------------------------------------
    stores = {name: codestore.open_code_store(path)
              for name, path in (('train', args.train), ('heldout', args.heldout)) if path}
    sizes = {name: (store.num_codes, store.vocab_size) for name, store in stores.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f'--train holds codes of L x V = {sizes["train"]} but --heldout {sizes["heldout"]}; encode both '
                         'with one encoder')
    if args.samples:
        images = {'samples': load_images(args.samples), 'reference': load_images(args.reference)}
        if not args.inception:
            images['train'] = np.asarray(stores['train'].array('images'))
        for name, x in images.items():
            if x.shape[1:] != images['samples'].shape[1:]:
                raise ValueError(f'--samples are {images["samples"].shape[1:]} but --{name} images {x.shape[1:]}; use one '
                                 'size')

    out = {}
    if args.samples and args.inception:
        out['samples'] = inception_scores(args.inception, images['samples'], images['reference'], args.batch_size)
    elif args.samples:
        judge = Judge.fit(images['train'], np.asarray(stores['train'].array('labels')))
        out['samples'] = evaluation.sample_set(judge, images['samples'], images['reference'], images['train'])
    if args.heldout:
        sets = {name: {a: np.asarray(store.array(a)) for a in store.arrays} for name, store in stores.items()}
        vocab = stores['train'].vocab_size
        out['representation'] = evaluation.representation(sets['train'], sets['heldout'], int(sets['train']['labels'].max()) + 1, vocab)
        out['codes'] = {name: evaluation.code_usage(s['codes'], vocab) for name, s in sets.items()}
    text = json.dumps(out, indent=1)
    print(text)
    if args.json:
        with storage.write_whole(args.json) as file:
            file.write((text + '\n').encode())


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOTHING_WRITTEN, status=None)

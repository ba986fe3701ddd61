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
import json
import pathlib

import numpy as np

from dlc_jax import convert
from dlc_jax.convert.files import load_state_dict
from dlc_jax.metrics import frechet, inception_features, inception_score
from experiments.dlc import codestore, evaluation
from experiments.dlc.judge import Judge
from experiments.runtime import launch


def load_images(path: str) -> np.ndarray:
    """uint8 [N, H, W, C] from an .npz (`arr_0`, or `images`) or from a code store.

    Raises:
        ValueError, OSError: nothing of the kind is there.
    """
    if pathlib.Path(path).is_dir():
        return np.asarray(codestore.open_code_store(path).array('images'))
    try:
        with np.load(path) as arrays:
            for name in ('arr_0', 'images'):
                if name in arrays:
                    return arrays[name]
            raise ValueError(f'{path}: holds {arrays.files}, but no images under arr_0 or images')
    except (OSError, EOFError) as error:
        raise OSError(f'{path}: cannot be read ({error}); give an .npz of images or a code store') from error
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        raise OSError(f'{path}: not a whole .npz ({error}); write it again') from error


def inception_scores(weights: str, samples: np.ndarray, reference: np.ndarray, batch_size: int) -> dict[str, float]:
    """FID, sFID, IS, precision and recall in the released Inception's features (the ADM suite's protocol)."""
    module, params = convert.from_torch('inception', load_state_dict(weights))

    ours, theirs = (inception_features.inception_features(module, params, [images], batch_size=batch_size)
                    for images in (samples, reference))
    scores = evaluation.compare(ours.pool, theirs.pool)
    mean, spread = inception_score.inception_score(ours.unbiased_logits)
    return {'fid': scores.pop('frechet'), 'inception_score': float(mean), 'inception_score_std': float(spread),
            'sfid': frechet.frechet_distance(frechet.statistics(ours.spatial), frechet.statistics(theirs.spatial)), **scores}


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
    launch.initialize(args)
    out = {}
    if args.samples:
        if not args.reference:
            raise ValueError('--samples needs --reference: real images to compare with')
        samples, reference = load_images(args.samples), load_images(args.reference)
        if samples.shape[1:] != reference.shape[1:]:
            raise ValueError(f'--samples are {samples.shape[1:]} but --reference images {reference.shape[1:]}; use one size')
        if args.inception:
            out['samples'] = inception_scores(args.inception, samples, reference, args.batch_size)
        elif args.train:
            store = codestore.open_code_store(args.train)
            train = np.asarray(store.array('images'))
            judge = Judge.fit(train, np.asarray(store.array('labels')))
            out['samples'] = evaluation.sample_set(judge, samples, reference, train)
        else:
            raise ValueError('--samples needs a feature space: --inception=DIR, or --train=STORE to fit a small classifier')
    if args.heldout:
        if not args.train:
            raise ValueError('--heldout needs --train: the store that probes are fitted to')
        stores = {name: codestore.open_code_store(path) for name, path in (('train', args.train), ('heldout', args.heldout))}
        sets = {name: {a: np.asarray(store.array(a)) for a in store.arrays} for name, store in stores.items()}
        vocab = stores['train'].vocab_size
        out['representation'] = evaluation.representation(sets['train'], sets['heldout'], int(sets['train']['labels'].max()) + 1, vocab)
        out['codes'] = {name: evaluation.code_usage(s['codes'], vocab) for name, s in sets.items()}
    if not out:
        raise ValueError('nothing to measure: give --samples and --reference, or --train and --heldout')
    text = json.dumps(out, indent=1)
    print(text)
    if args.json:
        pathlib.Path(args.json).write_text(text + '\n')


if __name__ == '__main__':
    launch.main(main)

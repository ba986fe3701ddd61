"""Measures trained models and sets of samples.

    # k-NN and linear probe on soft codes, bare codes and the embedding; how the codes use their vocabulary
    python -m experiments.evaluate --train=codes/train --heldout=codes/heldout          (ImageNet: --probe=sgd)
    # images against a reference, in a feature space of your choice
    python -m experiments.evaluate --samples=samples.npz --reference=codes/heldout --train=codes/train
    python -m experiments.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE

Stores come from experiments.encode, samples.npz from experiments.sample. With --inception (the released FID weights) and
the ADM suite's reference file this gives FID, sFID, Inception score, precision and recall as they are published;
without --inception, distances in the features of a small classifier fitted to the --train images, comparable only among
themselves.
"""
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from dlc_jax import convert
from dlc_jax.convert.files import load_state_dict
from dlc_jax.metrics import frechet, inception_features, inception_score, prdc, probes, vendi
from dlc_jax.models.inception import InceptionOutput
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


def load_statistics(path: str) -> dict[str, frechet.Statistics]:
    """Means and covariances stored beside the images of an ADM reference file: `pool` (FID) and `spatial` (sFID), or {}.

    The 10 000 images there are for precision and recall; published FIDs are against these statistics, which are of the
    whole training set.
    """
    if pathlib.Path(path).is_dir():
        return {}
    with np.load(path) as arrays:
        return {name: frechet.Statistics(arrays[f'mu{end}'], arrays[f'sigma{end}'], 0)
                for name, end in (('pool', ''), ('spatial', '_s')) if f'mu{end}' in arrays and f'sigma{end}' in arrays}


def inception_scores(ours: InceptionOutput, theirs: InceptionOutput,
                     statistics: Mapping[str, frechet.Statistics]) -> dict[str, float]:
    """The ADM suite's scores, and the Vendi score, of samples with features `ours`.

    Args:
        theirs: features of reference images.
        statistics: of the reference, in place of those of `theirs`: `pool`, `spatial`, or none.
    """
    distance = lambda name: frechet.frechet_distance(
        frechet.statistics(getattr(ours, name)), statistics.get(name) or frechet.statistics(getattr(theirs, name)))
    mean, spread = inception_score.inception_score(ours.unbiased_logits)
    scores = prdc.prdc(theirs.pool, ours.pool, k=3)
    return {'fid': distance('pool'), 'sfid': distance('spatial'), 'inception_score': mean,
            'inception_score_std': spread, **scores, 'vendi': vendi.vendi_score(ours.pool)}


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--samples', metavar='NPZ', help='images to judge')
    p.add_argument('--reference', metavar='NPZ|STORE', help='real images that no model has seen')
    p.add_argument('--train', metavar='STORE', help='code store of the training images')
    p.add_argument('--heldout', metavar='STORE', help='code store of the held-out images')
    p.add_argument('--probe', choices=probes.METHODS, default='lbfgs',
                   help="linear probe: to its optimum, for small sets, or by DINOv2's recipe")
    p.add_argument('--inception', metavar='FILE', help='released FID Inception weights')
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
            raise ValueError(f'--samples are {samples.shape[1:]} but --reference images {reference.shape[1:]}; '
                             'use one size')
        if args.inception:
            module, params = convert.from_torch('inception', load_state_dict(args.inception))
            ours, theirs = (inception_features.inception_features(module, params, [images], batch_size=args.batch_size)
                            for images in (samples, reference))
            out['samples'] = inception_scores(ours, theirs, load_statistics(args.reference))
        elif args.train:
            store = codestore.open_code_store(args.train)
            train = np.asarray(store.array('images'))
            judge = Judge.fit(train, np.asarray(store.array('labels')))
            out['samples'] = evaluation.sample_set(judge, samples, reference, train)
        else:
            raise ValueError('--samples needs a feature space: --inception=FILE, or --train=STORE to fit a '
                             'small classifier')
    if args.heldout:
        if not args.train:
            raise ValueError('--heldout needs --train: the store that probes are fitted to')
        stores = {name: codestore.open_code_store(getattr(args, name)) for name in ('train', 'heldout')}
        # Not the images or latents: of ImageNet they do not fit into memory.
        sets = {name: {a: np.asarray(store.array(a)) for a in evaluation.REPRESENTATION if a in store.arrays}
                for name, store in stores.items()}
        num_classes, vocab_size = int(sets['train']['labels'].max()) + 1, stores['train'].vocab_size
        out['representation'] = evaluation.representation(sets['train'], sets['heldout'], num_classes, vocab_size,
                                                          probe=args.probe)
        out['codes'] = {name: evaluation.code_usage(s['codes'], vocab_size) for name, s in sets.items()}
    if not out:
        raise ValueError('nothing to measure: give --samples and --reference, or --train and --heldout')
    text = json.dumps(out, indent=1)
    print(text)
    if args.json:
        pathlib.Path(args.json).write_text(text + '\n')


if __name__ == '__main__':
    launch.main(main)

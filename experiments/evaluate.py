"""Measures trained models and sets of samples.

    # k-NN and linear probe on soft codes, bare codes and the embedding; how the codes use their vocabulary
    python -m experiments.evaluate --train=codes/train --heldout=codes/heldout          (ImageNet: --probe=sgd)
    # images against a reference, in a feature space of your choice
    python -m experiments.evaluate --samples=samples.npz --reference=codes/heldout --train=codes/train
    python -m experiments.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE

Stores come from experiments.encode, samples.npz from experiments.sample. With --inception (the released FID weights)
and the ADM suite's reference file this gives FID, sFID, Inception score, precision and recall as they are published;
without --inception, distances in the features of a small classifier fitted to the --train images, comparable only among
themselves.

Language models are measured by the same command with --policy: python -m experiments.evaluate --policy=RUN --help.
"""
import argparse
import json
import logging
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from dlc_jax import convert
from dlc_jax.metrics import frechet, inception_features, inception_score, prdc, probes, vendi
from dlc_jax.models.inception import InceptionOutput
from experiments.dlc import evaluation
from experiments.dlc.data import codestore, memory
from experiments.dlc.data.decode import FORMATS, SUFFIXES, Decoding, read_image
from experiments.dlc.data.image_files import list_images
from experiments.dlc.data.npz_images import npz_names, open_npz
from experiments.dlc.data.printable import printable
from experiments.dlc.judge import Judge
from experiments.runtime import launch, storage
from rlhf_jax.weights.files import load_state_dict

log = logging.getLogger(__name__)


def load_images(path: str) -> np.ndarray:
    """uint8 [N, H, W, C] from an .npz (`arr_0`, or `images`), a code store, or a folder of image files.

    Raises:
        ValueError, OSError: nothing of the kind is there, an image is unreadable or of another size than the others, or
            they do not fit into memory.
    """
    place = storage.resolve(path)
    if not place.exists():
        raise FileNotFoundError(f'{path}: nothing there; give an .npz of images, a folder of them or a code store')
    if place.is_dir():
        if (place / 'meta.json').exists() or codestore.partial_path(place).exists() or storage.is_remote(path):
            return np.asarray(codestore.open_code_store(path).array('images'))
        return load_folder(path)
    try:
        arrays = open_npz(storage.local_copy(path), ('arr_0', 'images'), field='')
    except OSError as error:
        raise OSError(f'{path}: truncated or no .npz ({error}); write it again') from None
    if not arrays:
        raise ValueError(f'{path}: holds {printable(str(npz_names(storage.local_copy(path))))}, but no images under '
                         'arr_0 or images')
    images = arrays.get('arr_0', arrays.get('images'))
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f'{path}: images are {images.dtype} {images.shape}; expected uint8 [N, H, W, C]')
    return images


def load_folder(path: str) -> np.ndarray:
    """uint8 [N, H, W, C] of the image files of a folder, as `experiments.sample` writes them; grey ones have C = 1.

    Raises:
        ValueError, OSError: an image is unreadable, of another size or of other channels than the first.
    """
    root = pathlib.Path(path).expanduser()
    files = list_images(root)
    if not files:
        raise FileNotFoundError(f'{path}: holds neither a code store nor images ({", ".join(SUFFIXES)})')
    read_image(root / files[0])  # an unreadable file is named
    with Image.open(root / files[0], formats=FORMATS) as first:
        channels = 1 if first.mode in ('1', 'L') else 3
        memory.check(len(files) * first.width * first.height * channels, f'{path}: {len(files)} images',
                     'measure fewer of them')
    images = []
    for file in files:
        images.append(read_image(root / file, Decoding(channels)))
        if images[-1].shape != images[0].shape:
            raise ValueError(f'{path}: {printable(file)} is {images[-1].shape} but {printable(files[0])} '
                             f'{images[0].shape}; all images must have one size')
    return np.stack(images)


def load_statistics(path: str) -> dict[str, frechet.Statistics]:
    """Means and covariances stored beside the images of an ADM reference file: `pool` (FID) and `spatial` (sFID), or
    {}.

    The 10 000 images there are for precision and recall; published FIDs are against these statistics, which are of the
    whole training set.
    """
    if storage.resolve(path).is_dir():
        return {}
    arrays = open_npz(storage.local_copy(path), ('mu', 'sigma', 'mu_s', 'sigma_s'), field='')
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


def class_count(store: codestore.CodeStore) -> int:
    """Classes that probes of `store` tell apart.

    Raises:
        ValueError: a label that is none of its classes, or larger than a store without names of classes can mean.
    """
    most = int(store.labels().max())
    if not store.meta.get('class_names') and most >= len(store):
        raise ValueError(f'{store.path}: labels of {len(store)} rows go up to {most}; number the classes from 0')
    return most + 1


def check_flags(args: argparse.Namespace) -> None:
    """Raises a ValueError or OSError for flags that do not add up to a measurement."""
    if not (args.samples or args.heldout):
        raise ValueError('nothing to measure: give --samples and --reference, or --train and --heldout')
    if args.samples and not args.reference:
        raise ValueError('--samples needs --reference: real images to compare with')
    if args.samples and not (args.inception or args.train):
        raise ValueError('--samples needs a feature space: --inception=FILE, or --train=STORE to fit a small '
                         'classifier')
    if args.heldout and not args.train:
        raise ValueError('--heldout needs --train: the store that probes are fitted to')
    if args.batch_size < 1:
        raise ValueError(f'--batch_size={args.batch_size} must be at least 1')
    if args.json:
        storage.check_writable(storage.resolve(args.json).parent, '--json')


def main() -> None:
    if launch.given('--policy'):
        from experiments import evaluate_policy
        return evaluate_policy.main()
    p = launch.parser(__doc__)
    p.add_argument('--samples', metavar='NPZ|DIR|STORE', help='images to judge, as experiments.sample writes them')
    p.add_argument('--reference', metavar='NPZ|DIR|STORE', help='real images that no model has seen')
    p.add_argument('--train', metavar='STORE', help='code store of the training images')
    p.add_argument('--heldout', metavar='STORE', help='code store of the held-out images')
    p.add_argument('--probe', choices=probes.METHODS, default='lbfgs',
                   help="linear probe: to its optimum, for small sets, or by DINOv2's recipe")
    p.add_argument('--inception', metavar='FILE', help='released FID Inception weights')
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
        raise ValueError(f'--train holds codes of L x V = {sizes["train"]} but --heldout {sizes["heldout"]}; '
                         'encode both with one encoder')
    codestore.check_one_encoder({f'--{name}': store for name, store in stores.items()})
    if args.heldout and stores['train'].meta.get('source') and \
            stores['train'].meta['source'] == stores['heldout'].meta.get('source'):
        log.warning('--train and --heldout hold the same images: their scores say nothing of images not seen before')
    num_classes = {name: class_count(store) for name, store in stores.items()} if args.heldout else {}
    if args.samples:
        images = {'samples': load_images(args.samples), 'reference': load_images(args.reference)}
        if not args.inception:
            images['train'] = np.asarray(stores['train'].array('images'))
        for name, x in images.items():
            if x.shape[1:] != images['samples'].shape[1:]:
                raise ValueError(f'--samples are {images["samples"].shape[1:]} but --{name} images {x.shape[1:]}; '
                                 'use one size')

    out = {}
    if args.samples and args.inception:
        module, params = convert.from_torch('inception', load_state_dict(storage.local_copy(args.inception)))
        ours, theirs = (
            inception_features.inception_features(module, params, [images[name]], batch_size=args.batch_size)
            for name in ('samples', 'reference'))
        out['samples'] = inception_scores(ours, theirs, load_statistics(args.reference))
    elif args.samples:
        judge = Judge.fit(images['train'], np.asarray(stores['train'].array('labels')))
        out['samples'] = evaluation.sample_set(judge, images['samples'], images['reference'], images['train'])
    if args.heldout:
        # Not the images or latents: of ImageNet they do not fit into memory.
        sets = {name: {a: np.asarray(store.array(a)) for a in evaluation.REPRESENTATION if a in store.arrays}
                for name, store in stores.items()}
        vocab_size = stores['train'].vocab_size
        out['representation'] = evaluation.representation(sets['train'], sets['heldout'], max(num_classes.values()),
                                                          vocab_size, probe=args.probe)
        out['codes'] = {name: evaluation.code_usage(s['codes'], vocab_size) for name, s in sets.items()}
    print(json.dumps(out, indent=1))
    if args.json:
        storage.write_json(args.json, out)


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOTHING_WRITTEN, status=None)

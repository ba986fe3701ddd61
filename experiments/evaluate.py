"""Measures trained models and sets of samples.

    # k-NN and linear probe on soft codes, bare codes and the embedding; how the codes use their vocabulary
    python -m experiments.evaluate --train=codes/train --heldout=codes/heldout          (ImageNet: --probe=sgd)
    # images against a reference, in a feature space of your choice
    python -m experiments.evaluate --samples=samples.npz --reference=codes/heldout --train=codes/train
    python -m experiments.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=FILE
    # sets that experiments.sample --step=all made: a line each with its step, and the hours of training until then
    python -m experiments.evaluate --samples='samples/{step}.npz' --step=all --run=RUN --reference=codes/heldout \\
        --train=codes/train --json=curve.jsonl

Stores come from experiments.encode, samples.npz from experiments.sample. With --inception (the released FID weights)
and the ADM suite's reference file this gives FID, sFID, Inception score, precision and recall as they are published;
--dinov2 gives distances in the features of DINOv2 or of an encoder (FD-DINOv2); without either, in those of a small
classifier fitted to the --train images, comparable only among themselves. Inception and Vendi scores need no
--reference. With --json=FILE what networks have seen, and the accuracies of probes, are in FILE.partial until FILE is
written: interrupted, the same command goes on from there.

Language models are measured by the same command with --policy: python -m experiments.evaluate --policy=RUN --help.
"""
import argparse
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dlc_jax.metrics import frechet, inception_score, prdc, probes, vendi
from dlc_jax.models.inception import InceptionOutput
from experiments.dlc import evaluation
from experiments.dlc.commands import features
from experiments.dlc.data import codestore, memory
from experiments.dlc.data import samples as samples_lib
from experiments.dlc.data.decode import DECODE_ERRORS, FORMATS, SUFFIXES, Decoding, read_image
from experiments.dlc.data.image_files import list_images
from experiments.dlc.data.npz_images import npz_names, open_npz
from experiments.dlc.data.printable import printable
from experiments.dlc.judge import Judge
from experiments.runtime import launch, shards, storage
from experiments.runtime import steps as steps_lib
from experiments.runtime.blocks import Blocks
from experiments.runtime.curve import Curve, settings_of

log = logging.getLogger(__name__)


def load_images(path: str) -> np.ndarray:
    """uint8 [N, H, W, C] from an .npz (`arr_0`, or `images`), a code store, or a folder of image files.

    Raises:
        ValueError, OSError: nothing of the kind is there, an image is unreadable or of another size than the others, or
            they do not fit into memory.
    """
    place = storage.resolve(path)
    if missing := samples_lib.describe_missing(path):  # all parts of it may be there all the same
        if not samples_lib.finish(path):
            raise FileNotFoundError(f'{path}: unfinished, {missing}; run the same python -m experiments.sample command '
                                    'again')
    if not place.exists() and not shards.begun(path):
        raise FileNotFoundError(f'{path}: nothing there; give an .npz of images, a folder of them or a code store')
    if shards.begun(path) or place.is_dir():
        if (shards.begun(path) or (place / 'meta.json').exists() or codestore.partial_path(place).exists()
                or storage.is_remote(path)):
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
    """uint8 [N, H, W, C] of the image files of a folder, as `experiments.sample` writes them; C = 1 where all are grey,
    else 3.

    Raises:
        ValueError, OSError: an image is unreadable or of another size than the first.
    """
    root = pathlib.Path(path).expanduser()
    files = list_images(root)
    if not files:
        raise FileNotFoundError(f'{path}: holds neither a code store nor images ({", ".join(SUFFIXES)})')
    height, width = read_image(root / files[0]).shape[:2]
    channels = 1 if all(is_grey(root / file) for file in files) else 3
    memory.check(len(files) * height * width * channels, f'{path}: {len(files)} images', 'measure fewer of them')
    images = []
    for file in files:
        images.append(read_image(root / file, Decoding(channels)))
        if images[-1].shape != images[0].shape:
            raise ValueError(f'{path}: {printable(file)} is {images[-1].shape} but {printable(files[0])} '
                             f'{images[0].shape}; all images must have one size')
    return np.stack(images)


def is_grey(path: pathlib.Path) -> bool:
    """Whether an image file holds levels of grey alone; its pixels are not read.

    Raises:
        OSError: it is unreadable.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.mode in ('1', 'L')
    except DECODE_ERRORS:
        read_image(path)  # the error of one line that names it
        raise


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


def inception_scores(ours: InceptionOutput, theirs: InceptionOutput | None,
                     statistics: Mapping[str, frechet.Statistics]) -> dict[str, float]:
    """The ADM suite's scores, and the Vendi score, of samples with features `ours`.

    Args:
        theirs: features of reference images; None: only the scores that need none.
        statistics: of the reference, in place of those of `theirs`: `pool`, `spatial`, or none.
    """
    distance = lambda name: frechet.frechet_distance(
        frechet.statistics(getattr(ours, name)), statistics.get(name) or frechet.statistics(getattr(theirs, name)))
    mean, spread = inception_score.inception_score(ours.unbiased_logits)
    alone = {'inception_score': mean, 'inception_score_std': spread, 'vendi': vendi.vendi_score(ours.pool)}
    if theirs is None:
        return alone
    return {'fid': distance('pool'), 'sfid': distance('spatial'), **prdc.prdc(theirs.pool, ours.pool, k=3)} | alone


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
    if args.samples and not args.reference and not (args.inception or args.dinov2):
        raise ValueError('--samples needs --reference: real images to compare with (the Vendi score needs none, but '
                         '--inception or --dinov2)')
    if args.samples and not (args.inception or args.dinov2 or args.train):
        raise ValueError('--samples needs a feature space: --inception=FILE, --dinov2=DIR, or --train=STORE to fit a '
                         'small classifier')
    if args.heldout and not args.train:
        raise ValueError('--heldout needs --train: the store that probes are fitted to')
    if args.batch_size < 1:
        raise ValueError(f'--batch_size={args.batch_size} must be at least 1')
    steps_lib.check(args.step)
    if args.step == 'all' and not args.json:
        raise ValueError('--step=all measures one checkpoint after another; say with --json=FILE where its rows go')
    if args.json:
        storage.check_writable(storage.resolve(args.json).parent, '--json')


def parser() -> argparse.ArgumentParser:
    p = launch.parser(__doc__)
    p.add_argument('--samples', nargs='+', metavar='NPZ|DIR|STORE', help='images to judge, as experiments.sample '
                   'writes them; of several sets all images together')
    p.add_argument('--reference', metavar='NPZ|DIR|STORE', help='real images that no model has seen')
    p.add_argument('--train', metavar='STORE', help='code store of the training images')
    p.add_argument('--heldout', metavar='STORE', help='code store of the held-out images')
    p.add_argument('--probe', choices=probes.METHODS, default='lbfgs',
                   help="linear probe: to its optimum, for small sets, or by DINOv2's recipe")
    p.add_argument('--inception', metavar='FILE', help='released FID Inception weights')
    p.add_argument('--dinov2', metavar='DIR|RUN', help='DINOv2 weights (FD-DINOv2), or any encoder, to compare in')
    p.add_argument('--batch_size', type=int, default=64, help='images at once on a device (default 64)')
    p.add_argument('--json', metavar='FILE', help='also write the numbers there; --step=all: a line a checkpoint')
    p.add_argument('--step', metavar='N|all|last', default='last', help='of --samples, --train and --heldout that have '
                   f'{steps_lib.PLACE} in their name: which of them (default: that of the largest step)')
    p.add_argument('--run', metavar='RUN', help='whose checkpoints these are: its hours of training are in the curve')
    return p


def main() -> None:
    if launch.given('--policy'):
        from experiments import evaluate_policy
        return evaluate_policy.main()
    args, _ = launch.parse(parser())
    check_flags(args)
    launch.initialize(args)
    places = (*(args.samples or ()), args.train, args.heldout)
    named = [place for place in places if place and steps_lib.PLACE in place]
    if args.step != 'last' and not named:
        raise ValueError(f'--step={args.step}: none of --samples, --train and --heldout has {steps_lib.PLACE} in its '
                         'name, where the step goes')
    steps = steps_lib.of_places(args.step, named) if named else [None]
    if args.step != 'all':
        out = evaluate(args, steps[0], {})
        if jax.process_index() == 0:
            print(json.dumps(out, indent=1))
            if args.json:
                storage.write_json(args.json, out)
                shards.partial(args.json).rmtree(missing_ok=True)
        shards.wait_for_all()
        return
    curve, once = Curve(args.json, settings_of(args), run=args.run), {}
    for step in curve.missing(steps):
        out = evaluate(args, step, once)
        if jax.process_index() == 0:
            print(json.dumps({'step': step} | out), flush=True)
            curve.add(step, out)
            (shards.partial(args.json) / of_step(step)).rmtree(missing_ok=True)
        shards.wait_for_all()
    if jax.process_index() == 0:
        shards.partial(args.json).rmtree(missing_ok=True)
        print(f'{len(steps)} checkpoints -> {args.json}')


def of_step(step: int | None) -> str:
    """The name of what networks see in the samples of `step`, where features are kept."""
    return 'samples' if step is None else f'samples-{step}'


def evaluate(args: argparse.Namespace, step: int | None, once: dict[str, Any]) -> dict[str, Any]:
    """What the flags ask for, of the places of `step` where names have it. In a job of several processes they share the
    network's work; the rest is done by process 0, and the others get {}.

    Args:
        once: keeps what is the same for every step: networks, and what they see in the reference.
    """
    # ---- Everything is opened before anything is measured ------------------------------------------------------------
    stores = {name: codestore.open_code_store(steps_lib.placed(path, step))
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
        images = {'samples': merged([steps_lib.placed(path, step) for path in args.samples])}
        if args.reference:
            images['reference'] = kept(once, 'reference', lambda: load_images(args.reference))
        if not (args.inception or args.dinov2):
            images['train'] = np.asarray(stores['train'].array('images'))
        for name, x in images.items():
            if x.shape[1:] != images['samples'].shape[1:]:
                raise ValueError(f'--samples are {images["samples"].shape[1:]} but --{name} images {x.shape[1:]}; '
                                 'use one size')

    out: dict[str, Any] = {}
    seen: dict[str, dict[str, Any]] = {}
    for name, opened in (('inception', features.inception), ('dinov2', features.encoder)):
        if args.samples and getattr(args, name):
            network = kept(once, name, lambda opened=opened, name=name: opened(getattr(args, name), args.batch_size))
            place = lambda of, name=name: os.fspath(shards.partial(args.json) / of / name) if args.json else ''
            seen[name] = {'samples': network(images['samples'], place(of_step(step)))}
            if args.reference:
                seen[name]['reference'] = kept(once, f'{name} of the reference', lambda network=network, place=place:
                                               network(images['reference'], place('reference')))
    if jax.process_index() != 0:
        return out
    if 'inception' in seen:
        out['samples'] = inception_scores(seen['inception']['samples'], seen['inception'].get('reference'),
                                          load_statistics(args.reference) if args.reference else {})
    if 'dinov2' in seen:
        ours, theirs = seen['dinov2']['samples'], seen['dinov2'].get('reference')
        out['dinov2'] = {} if theirs is None else evaluation.compare(ours, theirs)
        out['dinov2']['vendi'] = vendi.vendi_score(ours)
    if args.samples and not seen:
        judge = Judge.fit(images['train'], np.asarray(stores['train'].array('labels')))
        out['samples'] = evaluation.sample_set(judge, images['samples'], images['reference'], images['train'])
    if args.heldout:
        # Not the images or latents: of ImageNet they do not fit into memory.
        sets = {name: {a: np.asarray(store.array(a)) for a in evaluation.REPRESENTATION if a in store.arrays}
                for name, store in stores.items()}
        vocab_size, classes, probed = stores['train'].vocab_size, max(num_classes.values()), Blocks()
        if args.json:
            probed = Blocks.of(os.fspath(shards.partial(args.json)), 'probes', args.probe, classes, vocab_size,
                               *(part for arrays in sets.values() for name_and_rows in arrays.items()
                                 for part in name_and_rows))
        out['representation'] = evaluation.representation(sets['train'], sets['heldout'], classes, vocab_size,
                                                          probe=args.probe, get=probed.get)
        out['codes'] = {name: evaluation.code_usage(s['codes'], vocab_size) for name, s in sets.items()}
    return out


def kept(once: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    """`once[name]`, made the first time that it is asked for."""
    if name not in once:
        once[name] = make()
    return once[name]


def merged(paths: Sequence[str]) -> np.ndarray:
    """Images of all `paths` together.

    Raises:
        ValueError, OSError: see `load_images`; or sets of images of different sizes.
    """
    sets = {path: load_images(path) for path in paths}
    first = sets[paths[0]]
    for path, images in sets.items():
        if images.shape[1:] != first.shape[1:]:
            raise ValueError(f'--samples: {path} holds images of {images.shape[1:]}, {paths[0]} of {first.shape[1:]}; '
                             'use one size')
    if len(sets) < len(paths):
        raise ValueError('--samples: a set is named twice')
    return first if len(sets) == 1 else np.concatenate(list(sets.values()))


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOT_MEASURED, status=None)

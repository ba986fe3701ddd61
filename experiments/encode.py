"""Turns a data set into a code store: codes, embeddings, labels and the images (or latents) a generator learns to make.

    python -m experiments.encode --encoder=runs/digits/encoder --split=train --out=runs/digits/codes/train
    # for a generator of latents: by the released sd-vae-ft-ema (diffusers format), half of them mirrored
    python -m experiments.encode --encoder=RUN --vae=sd-vae-ft-ema/ --flip=0.5 --out=imagenet_codes

    # with the captions that text to image is trained on: a .txt beside each image, or a jsonl file
    python -m experiments.encode --encoder=RUN --data=folder --path=IMAGES --captions=txt --out=captioned_codes

    # four tasks of an array job; the last of them, or whoever reads the store, puts the parts together
    python -m experiments.encode --encoder=RUN --out=codes --shard=0/4

Run again after an interruption, it continues; on a finished store it returns at once. A --distributed job of any number
of processes writes the same bytes as one process does.
"""
import argparse
import hashlib
import logging
import os
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from dlc_jax.preprocess import center_crop
from experiments.dlc.data import captions as captions_lib
from experiments.dlc.data import codestore_shards, codestore_writer, sources
from experiments.dlc.data.batches import eval_batches
from experiments.dlc.data.decode import NOTES, OPTIONS
from experiments.dlc.data.image_files import LAYOUTS
from experiments.dlc.data.printable import printable
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import to_model_range
from experiments.dlc.latents import LatentDecoder
from experiments.dlc.weights import reading
from experiments.runtime import launch, modules, shards, storage
from experiments.runtime import steps as steps_lib
from experiments.runtime.digest import fingerprint
from experiments.runtime.prefetch import ahead

log = logging.getLogger(__name__)

NAMED = 10  # unreadable images that are named at the end


def encode(encoder: Encoder, source: sources.ImageSource, out: str | os.PathLike, *, image_size: int,
           vae: LatentDecoder | None = None, flip: float = 0.0, store_sem: bool = False, batch_size: int = 256,
           seed: int = 0, num_workers: int = 0, shard: shards.Shard | None = None) -> bool:
    """Writes the code store `out`, or this process's part of it; returns whether the whole store is there now.

    Args:
        encoder: its teacher reads each image unflipped, so that a code says nothing of left and right.
        source: images, labels and names; captions, where it has them, go into the store.
        image_size: side of the stored images, pixels (the ADM centre crop).
        vae: store one posterior sample of its latents, float16, instead of the images.
        flip: probability that the stored image or latent is mirrored (the paper: 0.5, once and for all).
        store_sem: also the soft codes [N, L, V] as float16: for probes on small sets.
        batch_size: images at once on a device.
        seed: of flips and posterior samples, which depend on the image's index alone.
        num_workers: processes that read and crop images; 0: threads of this one.
        shard: write this part alone; None: the whole, shared out among the processes of the job.

    Raises:
        ValueError, OSError: another store is there, the disk is full, or no image can be read.
    """
    m = encoder.config.model
    # All that decides what is written: another store is never taken for this one.
    meta = dict(num_codes=m.num_codes, vocab_size=m.vocab_size, class_names=tuple(source.class_names or ()),
                encoder=fingerprint(encoder.params), image_size=image_size,
                stored='images' if vae is None else 'latents', store_sem=store_sem, flip=flip, seed=seed,
                vae=None if vae is None else fingerprint(vae.params), **source.origin, source=source.digest())
    if source.captions is not None:
        digest = hashlib.sha256('\n'.join(source.captions[source.name(i)] for i in range(len(source))).encode())
        meta['captions'] = digest.hexdigest()[:16]
    unit = modules.Unit.of(batch_size, len(source))
    if codestore_shards.is_finished_for_all(out):
        codestore_writer.writer(out, num=len(source), meta=meta).check_finished()
        return True
    mine = shards.of_this_process(shard, out, len(source), unit.rows)
    for part in mine:
        rows = part.rows(len(source), unit.rows)
        with codestore_shards.part_writer(out, meta, part, rows) as store:
            encode_rows(encoder, source, store, rows, unit, image_size=image_size, vae=vae, flip=flip,
                        store_sem=store_sem, seed=seed, num_workers=num_workers)
    if source.skipped:
        first = ', '.join(printable(name) for name in list(source.skipped)[:NAMED])
        more = ', ...' if len(source.skipped) > NAMED else ''
        print(f'{len(source.skipped)} unreadable image(s) have no row in the store: {first}{more}')
    for kind, count in source.notes.items():
        print(f'{count} image(s) {NOTES[kind]}')
    return codestore_shards.merge_for_all(out)


def encode_rows(encoder: Encoder, source: sources.ImageSource, store: codestore_writer.writer, part: range,
                unit: modules.Unit, *, image_size: int, vae: LatentDecoder | None, flip: float, store_sem: bool,
                seed: int, num_workers: int) -> None:
    """Appends the images `part` of `source` that `store` does not have yet. While a batch is computed, the one before
    it is written and later ones are read."""
    wanted, transform = ('codes', 'embeddings') + ('sem',) * store_sem, encoder.transform

    def prepare(image):
        return {'input': transform(image), 'crop': center_crop(image, image_size)}

    def compute(batch: Mapping[str, np.ndarray]) -> tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]:
        real = batch['mask']
        encoded = encoder.encode(batch['input'], batch_size=unit.rows, outputs=wanted)
        rows = {name: encoded[name][real] for name in wanted} | {'labels': batch['label'][real]}
        if store_sem:
            rows['sem'] = rows['sem'].astype(np.float16)
        rngs = [np.random.default_rng((seed, index)) for index in batch['index']]
        mirrored = np.array([rng.random() < flip for rng in rngs])
        crops = np.where(mirrored[:, None, None, None], batch['crop'][:, :, ::-1], batch['crop'])
        if vae is None:
            rows['images'] = crops[real]
        else:
            mean, std = vae.posterior(to_model_range(crops), unit.rows)
            noise = np.stack([rng.standard_normal(vae.latent_shape(image_size), np.float32) for rng in rngs])
            rows['latents'] = (mean + std * noise)[real].astype(np.float16)
        return batch, rows

    batches = eval_batches(source, prepare, unit.rows * unit.devices, part=part[store.done:], num_workers=num_workers)
    with tqdm(total=len(part), initial=store.done, desc='encode', unit='image', dynamic_ncols=True,
              disable=jax.process_index() != 0) as bar:
        for batch, rows in ahead(compute, batches):
            items = min(len(batch['mask']), len(part) - store.done)  # the rest only fill up the last batch
            names = [source.name(i) for i in batch['index'][batch['mask']]]
            store.append(rows, names=names, captions=source.captions and [source.captions[name] for name in names],
                         left_out=items - len(names))
            bar.update(items)


def data_config(trained_on: ml_collections.ConfigDict, args: argparse.Namespace) -> ml_collections.ConfigDict:
    """The data set that the flags name, else that of the encoder.

    Raises:
        ValueError: a path without a data set that would read it.
    """
    data = trained_on.copy_and_resolve_references().unlock()
    if args.path and not args.data and data.name in ('digits', 'digit_pairs', 'fake'):
        raise ValueError(f'--path={args.path}: the encoder was trained on {data.name!r}, which reads no files; say '
                         'with --data=folder (or npz, or the name of a TFDS data set) how to read it')
    if args.data and args.data != data.name:
        data.path = ''  # that of another data set
    data.name, data.path = args.data or data.name, args.path or data.path
    for field in ('layout', *OPTIONS):
        if getattr(args, field) is not None:
            data[field] = getattr(args, field)
    # Each image is read once, and may be of any size: it keeps the name that captions know it by, and is cropped here.
    data.in_memory = False
    return data


def warn_of_held_back(data: ml_collections.ConfigDict, split: str, source: sources.ImageSource) -> None:
    """Logs how many images of the data set `split` leaves out, where the split was drawn here."""
    if split != 'train' or not source.held_back:
        return
    log.warning('--split=train: %d images; %d more are held back (data.heldout=%g), --split=heldout encodes them and '
                '--split=all encodes both', len(source), source.held_back, data.heldout)


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--encoder', '--sem', required=True, metavar='RUN|DIR', help='a work directory, or released weights')
    p.add_argument('--out', required=True, metavar='DIR')
    p.add_argument('--split', default='train', help="part of the data set: train (default), heldout, all, or one that "
                   'it names itself; a folder or npz without parts holds back data.heldout of each class from train')
    p.add_argument('--data', help='data set name, if not the one the encoder was trained on')
    p.add_argument('--path', help='its file or folder')
    p.add_argument('--layout', choices=LAYOUTS, help='whether the folders of a folder are classes or parts of the data '
                   'set (default: what they look like)')
    for option, choices in OPTIONS.items():
        p.add_argument(f'--{option}', choices=choices, help='of encoded images (default: as the encoder was trained)')
    p.add_argument('--captions', metavar='txt|FILE', help='of every image, to train text to image on: the .txt beside '
                   'it, or a jsonl file of {"file_name": ..., "caption": ...}')
    p.add_argument('--image_size', type=int, help='pixels (default: what the encoder reads; 256 with --vae)')
    p.add_argument('--vae', metavar='DIR', help='released autoencoder weights (directory or file): store latents')
    p.add_argument('--flip', type=float, default=0.0, help='probability that a stored image is mirrored (paper: 0.5)')
    p.add_argument('--store_sem', action='store_true', help='also store the soft codes, for probes on small sets')
    p.add_argument('--batch_size', type=int, default=256, help='images at once on a device (default 256)')
    p.add_argument('--num_workers', type=int, help='processes that read images (default: as the encoder was trained)')
    p.add_argument('--seed', type=int, default=0)
    steps_lib.add_flag(p, '--encoder')
    shards.add_flag(p)
    args, _ = launch.parse(p)
    shard = shards.parse(args)
    steps_lib.check(args.step, args.out)
    if args.batch_size < 1 or (args.image_size is not None and args.image_size < 1):
        raise ValueError('--batch_size and --image_size must be at least 1')
    if not 0 <= args.flip <= 1:
        raise ValueError(f'--flip={args.flip} is a probability; choose it between 0 and 1')
    if not 0 <= args.seed < 2 ** 32:
        raise ValueError(f'--seed={args.seed} must lie in 0..{2 ** 32 - 1}')
    if args.num_workers is not None and args.num_workers < 0:
        raise ValueError(f'--num_workers={args.num_workers} must not be negative; 0: threads')
    storage.check_writable(storage.resolve(args.out).parent, '--out')
    launch.initialize(args)
    if args.captions and args.captions != 'txt':
        captions_lib.read_jsonl(args.captions)  # a damaged file is found before weights are read
    for step in steps_lib.wanted(args.step, args.encoder, args.out):
        encode_at(args, step, shard)


def encode_at(args: argparse.Namespace, step: int | None, shard: shards.Shard | None) -> None:
    """Writes the store that the flags describe, by the encoder's checkpoint `step` (None: its newest)."""
    encoder, out = reading.load(Encoder, args.encoder, step=step), steps_lib.placed(args.out, step)
    data = data_config(encoder.config.data, args)
    vae = LatentDecoder.load(args.vae) if args.vae else None
    image_size = args.image_size or (256 if vae else data.global_size)
    if data.image_size < image_size:
        data.image_size = 0  # what the encoder reads may be smaller than what is stored; both crop what is there
    source = sources.image_source(data, args.split)
    warn_of_held_back(data, args.split, source)
    if args.captions:
        captions_lib.attach(source, args.captions)
    whole = encode(encoder, source, out, vae=vae, flip=args.flip, store_sem=args.store_sem,
                   image_size=image_size, batch_size=args.batch_size, seed=args.seed, shard=shard,
                   num_workers=data.num_workers if args.num_workers is None else args.num_workers)
    if jax.process_index() == 0:
        print(f'code store -> {out}' if whole else f'shard {args.shard} -> {shards.folder(out)}: '
              f'{codestore_shards.describe_missing(out)}')


if __name__ == '__main__':
    launch.main(main)

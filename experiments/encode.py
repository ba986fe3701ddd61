"""Turns a data set into a code store: codes, embeddings, labels and the images (or latents) a generator learns to make.

    python -m experiments.encode --encoder=runs/digits/encoder --split=train --out=runs/digits/codes/train

Run again after an interruption, it continues; on a finished store it returns at once.
"""
import hashlib
import os
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dlc_jax.ssl import augment
from experiments.dlc import codestore, sources
from experiments.dlc.encoder import Encoder
from experiments.dlc.latents import LatentDecoder
from experiments.runtime import launch, storage


def encode(encoder: Encoder, source: sources.ImageSource, out: str | os.PathLike, *, image_size: int,
           vae: LatentDecoder | None = None, flip: float = 0.0, store_sem: bool = False, batch_size: int = 256,
           seed: int = 0) -> None:
    """Writes the code store `out`.

    Args:
        encoder: its teacher reads each image unflipped, so that a code says nothing of left and right.
        source: images, labels and names.
        image_size: side of the stored images, pixels (the ADM centre crop).
        vae: store one posterior sample of its latents instead of the images.
        flip: probability that the stored image or latent is mirrored (the paper: 0.5, once and for all).
        store_sem: also the soft codes [N, L, V] as float16: for probes on small sets.
        batch_size: images at once.
        seed: of flips and posterior samples, which depend on the image's index alone.
    """
    m = encoder.config.model
    # A store that was begun with another encoder or other settings is not continued: all this is compared.
    meta = dict(num_codes=m.num_codes, vocab_size=m.vocab_size, class_names=tuple(source.class_names or ()),
                image_size=image_size, flip=flip, seed=seed, encoder=fingerprint(encoder.params))
    with codestore.writer(out, num=len(source), meta=meta) as store, \
            tqdm(total=len(source), initial=store.done, desc='encode', unit='image', dynamic_ncols=True) as bar:
        for start in range(store.done, len(source), batch_size):
            items = [source[i] for i in range(start, min(start + batch_size, len(source)))]
            raw = [item['image'] for item in items]
            inputs = np.stack([encoder.preprocess(image) for image in raw])
            pad = batch_size - len(inputs) if len(source) > batch_size else 0  # one shape, one compilation
            encoded = encoder.encode(np.pad(inputs, ((0, pad),) + ((0, 0),) * 3), batch_size=batch_size)
            crops = np.stack([augment.center_crop(image, image_size) for image in raw])
            mirrored = np.array([np.random.default_rng((seed, start + i)).random() < flip for i in range(len(raw))])
            crops[mirrored] = crops[mirrored, :, ::-1]
            rows = {'codes': encoded['codes'][:len(raw)], 'embeddings': encoded['embeddings'][:len(raw)],
                    'labels': np.array([item['label'] for item in items], np.int32)}
            if store_sem:
                rows['sem'] = encoded['sem'][:len(raw)].astype(np.float16)
            if vae is None:
                rows['images'] = crops
            else:
                rows['latents'] = vae.encode(crops.astype(np.float32) / 127.5 - 1,
                                             jax.random.fold_in(jax.random.key(seed), start)).astype(np.float16)
            store.append(rows, names=[item['name'] for item in items])
            bar.update(len(raw))
    if source.skipped:
        print(f'{len(source.skipped)} unreadable image(s), each with the next good one in its place: '
              f'{", ".join(source.skipped)}')


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


def main() -> None:
    p = launch.parser(__doc__)
    p.add_argument('--encoder', '--sem', required=True, metavar='RUN')
    p.add_argument('--out', required=True, metavar='DIR')
    p.add_argument('--split', default='train')
    p.add_argument('--data', help='data set name, if not the one the encoder was trained on')
    p.add_argument('--path', help='its file or folder')
    p.add_argument('--image_size', type=int, help='pixels (default: what the encoder reads; 256 with --vae)')
    p.add_argument('--vae', metavar='DIR', help='released autoencoder weights: store latents')
    p.add_argument('--flip', type=float, default=0.0, help='probability that a stored image is mirrored (paper: 0.5)')
    p.add_argument('--store_sem', action='store_true', help='also store the soft codes, for probes on small sets')
    p.add_argument('--batch_size', type=int, default=256)
    p.add_argument('--seed', type=int, default=0)
    args, _ = launch.parse(p)
    if args.batch_size < 1 or (args.image_size is not None and args.image_size < 1):
        raise ValueError('--batch_size and --image_size must be at least 1')
    if not 0 <= args.flip <= 1:
        raise ValueError(f'--flip={args.flip} is a probability; choose it between 0 and 1')
    storage.check_writable(storage.resolve(args.out).parent, '--out')
    launch.initialize(args)
    encoder = Encoder.load(args.encoder)
    data = encoder.config.data.copy_and_resolve_references()
    data.name, data.path = args.data or data.name, args.path or data.path
    vae = LatentDecoder.load(args.vae) if args.vae else None
    encode(encoder, sources.image_source(data, args.split), args.out, vae=vae, flip=args.flip, store_sem=args.store_sem,
           image_size=args.image_size or (256 if vae else encoder.config.data.global_size), batch_size=args.batch_size,
           seed=args.seed)
    print(f'code store -> {args.out}')


if __name__ == '__main__':
    launch.main(main)

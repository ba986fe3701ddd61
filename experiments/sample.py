"""Makes images with trained models, and texts: python -m experiments.sample --policy=RUN --help.

    # code first, pixels second
    python -m experiments.sample --unconditional --code_model=RUN --generator=RUN --num=64 --out=grid.png
    # embedding first, pixels second
    python -m experiments.sample --unconditional --embedding_model=RUN --generator=RUN --num=64 --out=grid.png
    # from the codes of real images, and from several images' codes at once
    python -m experiments.sample --from_images a.png b.png --encoder=RUN --generator=RUN --out=out_dir/
    python -m experiments.sample --compose a.png b.png --encoder=RUN --generator=RUN --num=16 --out=samples.npz
    # the paper's 50 000 images from a generator of latents, decoded by the released sd-vae-ft-ema (diffusers format)
    python -m experiments.sample --unconditional --code_model=RUN --generator=RUN --vae=sd-vae-ft-ema/ --num=50000 \\
        --guidance=1.4 --out=samples.npz
    # the paper's released weights, as they were downloaded, sampled as their authors do
    python -m experiments.sample --unconditional --sedd=DLC_SEDD_L512/ --dit=DLC_DiT_L512/ --vae=sd-vae-ft-ema/ \\
        --out=grid.png
    python -m experiments.sample --compose a.png b.png --sem=SEM_dinov2_L512/ --dit=DLC_DiT_L512/ \\
        --vae=sd-vae-ft-ema/ --out=mix.png
    # codes once, images of them under several guidance scales; each command goes on where it was interrupted
    python -m experiments.sample --unconditional --code_model=RUN --num=50000 --save_codes=codes/
    python -m experiments.sample --codes=codes/ --generator=RUN --vae=sd-vae-ft-ema/ --guidance=1.8 --out=samples.npz
    # from text: a code by LLaDA, then the image; K images of each text
    python -m experiments.sample --text "a red fox in the snow" --text "a lighthouse at night" --per_text=4 \\
        --llada=DLC_LLADA_L512/ --dit=DLC_DiT_L512/ --vae=sd-vae-ft-ema/ --out=grid.png

RUN is the --workdir of a training run, or what experiments.convert wrote, or a folder of released weights. --out
decides the form: one .png grid, an .npz of uint8 [N, H, W, C] under `arr_0` (what FID evaluators read), or a directory
of numbered files, each with its text beside it where there is one. Until all samples are there they lie in OUT.partial.
A --distributed job shares the work, as the tasks of an array do with --shard=i/n; all write the same bytes.
"""
import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dlc_jax.diffusion.gaussian import to_uint8
from experiments.dlc.commands import sample_flags
from experiments.dlc.commands.conditions import Conditions, conditions_of
from experiments.dlc.data import codestore, codestore_shards, codestore_writer, samples
from experiments.dlc.generator import Generator, sample_shape
from experiments.dlc.latents import LatentDecoder
from experiments.dlc.weights import reading
from experiments.runtime import launch, modules, shards, storage
from experiments.runtime import steps as steps_lib
from experiments.runtime.digest import fingerprint
from experiments.runtime.prefetch import ahead


def main() -> None:
    if launch.given('--policy'):
        from experiments import sample_policy
        return sample_policy.main()
    args, _ = launch.parse(sample_flags.parser(__doc__))
    sample_flags.check_flags(args)
    texts, shard = sample_flags.read_texts(args), shards.parse(args)
    for place, check in ((args.out, samples.check_out), (args.save_codes, check_store)):
        if place:
            check(place)
    launch.initialize(args)
    run = args.generator or args.code_model or args.text_model
    for step in steps_lib.wanted(args.step, run, args.out, args.save_codes) if run else [None]:
        sample(args, texts, shard, step)


def check_store(path: str) -> None:
    """Raises an OSError unless a code store can be written at `path`."""
    storage.check_writable(storage.resolve(path).parent, '--save_codes')


def sample(args: argparse.Namespace, texts: Sequence[str], shard: shards.Shard | None, step: int | None) -> None:
    """Makes the samples, or codes, that the flags describe, by the checkpoint `step` (None: the newest) of the
    generator; where codes alone are wanted, of the model that draws them."""
    out, save_codes = (place and steps_lib.placed(place, step) for place in (args.out, args.save_codes))
    generator, vae = open_generator(args, len(texts), out, step) if out else (None, None)
    code_key, image_key = jax.random.split(jax.random.key(args.seed))
    conditions = conditions_of(args, generator, texts, code_key, step)
    if save_codes and conditions.codes is None:
        raise ValueError('--save_codes: the samples are not made of codes; leave it out')
    unit, codes = modules.Unit.of(args.batch_size, conditions.num), save_codes or samples.growing(out, 'codes')
    if save_codes or conditions.draw:
        whole = save(conditions, codes, shard, unit, args.seed)
        if not out:
            missing = '' if whole else codestore_shards.describe_missing(codes)
            return report(conditions.num, 'codes', codes, args.shard, missing)
    sampler, place = sampler_of(args, generator, conditions), samples.growing(out, 'images')
    meta = with_captions(dict(
        num_samples=conditions.num, seed=args.seed, generator=fingerprint(generator.params),
        vae=vae and fingerprint(vae.params), **conditions.made, columns=args.columns or args.per_text or 0,
        sampler_of_images=dict(modules.with_sampler(generator.config, sampler).sampler)), conditions.texts)
    for part in shards.of_this_process(shard, place, conditions.num, unit.rows):
        rows = part.rows(conditions.num, unit.rows)
        cond = conditions.rows
        if cond is not None:
            cond = cond[rows.start:rows.stop]
        elif conditions.draw:
            cond = stored_codes(codes, part, rows)

        def draw(some: range, cond: np.ndarray | None = cond, first: int = rows.start) -> np.ndarray:
            of_some = None if cond is None else typed(cond[some.start - first:some.stop - first])
            x = generator.sample(image_key, of_some, conditions.num, part=some, batch_size=args.batch_size, **sampler)
            return vae.decode(x, unit.rows) if vae else to_bytes(x)
        with codestore_shards.part_writer(place, meta, part, rows) as store:
            append(store, rows, unit, conditions.texts, 'images', draw)
    whole = shards.finish(lambda: samples.finish(out))
    report(conditions.num, 'samples', out, args.shard, '' if whole else samples.describe_missing(out))


def open_generator(args: argparse.Namespace, num_texts: int, out: str,
                   step: int | None) -> tuple[Generator, LatentDecoder | None]:
    """The generator, and the autoencoder of one that makes latents, whose samples go to `out`.

    Raises:
        ValueError, OSError: models that are not there or do not fit each other or the flags, or no room.
    """
    generator = reading.load(Generator, args.generator, step=step)
    sample_flags.check_sampler(args, generator.config)
    vae = LatentDecoder.load(args.vae) if args.vae else None
    if (generator.config.data.target == 'latents') != bool(args.vae):
        raise ValueError('this generator makes latents: give the autoencoder weights with --vae=DIR'
                         if not args.vae else 'this generator makes pixels: leave --vae out')
    samples.check_room(out, args.num or num_texts * (args.per_text or 1), image_shape(generator, vae))
    if args.shard and samples.is_whole(out) and not samples.describe_missing(out):
        raise ValueError(f'--shard={args.shard}: --out={out} is there already, whole; delete it to sample anew')
    return generator, vae


def report(num: int, what: str, place: str, shard: str | None, missing: str) -> None:
    """Prints, in the first process, what was made."""
    if jax.process_index() == 0:
        print(f'shard {shard} of {place}: {missing}' if missing else f'{num} {what} -> {place}')


# ---- Codes and images, part by part ----------------------------------------------------------------------------------

def save(conditions: Conditions, place: str, shard: shards.Shard | None, unit: modules.Unit, seed: int) -> bool:
    """Writes the codes of `conditions` as a code store, or this process's part of it; returns whether it is whole."""
    (length, vocab_size), draw = conditions.codes, conditions.draw or (
        lambda part: np.asarray(conditions.rows[part.start:part.stop]))
    meta = with_captions(dict(num_codes=length, vocab_size=vocab_size, num_samples=conditions.num, seed=seed,
                              origin=conditions.origin, **conditions.made), conditions.texts)
    if codestore_shards.is_finished_for_all(place):
        codestore_writer.writer(place, num=conditions.num, meta=meta).check_finished()
        return True
    for part in shards.of_this_process(shard, place, conditions.num, unit.rows):
        rows = part.rows(conditions.num, unit.rows)
        with codestore_shards.part_writer(place, meta, part, rows) as store:
            append(store, rows, unit, conditions.texts, 'codes', draw)
    return codestore_shards.merge_for_all(place)


def with_captions(meta: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    return dict(meta) | ({'captions': True} if texts else {})


def append(store: codestore_writer.writer, rows: range, unit: modules.Unit, texts: Sequence[str], what: str,
           draw: Any) -> None:
    """Appends what `draw` makes of the `rows` that are missing, a batch after the other: while one is computed the one
    before it is written."""
    todo, size = rows[store.done:], unit.rows * unit.devices
    batches = [todo[i:i + size] for i in range(0, len(todo), size)]
    with tqdm(total=len(rows), initial=store.done, desc=what, unit='sample', dynamic_ncols=True,
              disable=jax.process_index() != 0) as bar:
        for part, made in ahead(lambda some: (some, draw(some)), batches):
            captions = None
            if texts:  # of images they are kept to the letter, for the files beside them
                captions = [texts[i] if what == 'codes' else samples.as_line(texts[i]) for i in part]
            store.append({what: made}, names=[f'{i:06d}' for i in part], captions=captions)
            bar.update(len(part))


def stored_codes(place: str, part: shards.Shard, rows: range) -> np.ndarray:
    """The codes of `rows`, of the store `place` or, while that is not whole, of this part of it."""
    if part.count > 1 and not codestore_shards.is_finished(place):
        try:
            return np.array(codestore.open_rows(shards.place(place, part)).array('codes'))
        except FileNotFoundError:  # another task has just put the parts together
            pass
    return np.array(codestore.open_code_store(place).array('codes')[rows.start:rows.stop])


def typed(cond: np.ndarray) -> np.ndarray:
    """Conditions as the generator takes them: codes and classes int32, embeddings float32."""
    return np.asarray(cond, np.int32 if cond.dtype.kind in 'iu' else np.float32)


# ---- Images ----------------------------------------------------------------------------------------------------------

def sampler_of(args: argparse.Namespace, generator: Generator, conditions: Conditions) -> dict[str, Any]:
    """Overrides of the generator's sampler: those that released models were published with for this use, and those that
    the flags give."""
    given = dict(name=args.sampler, ddim_eta=args.ddim_eta, num_steps=args.steps, guidance=args.guidance,
                 guidance_channels=args.guidance_channels,
                 guidance_interval=tuple(args.guidance_interval) if args.guidance_interval else None)
    drawn = args.unconditional or conditions.origin == 'drawn'
    by_class = generator.config.model.condition == 'class'  # those of --classes, or the labels of a store
    use = 'classes' if by_class else 'unconditional' if drawn else 'images'  # or texts
    recipe = generator.config.get('recipes', {}).get(use, {})
    return dict(recipe) | {name: value for name, value in given.items() if value is not None}


def image_shape(generator: Generator, vae: LatentDecoder | None) -> tuple[int, int, int]:
    height, width, channels = sample_shape(generator.config)
    return (height * vae.module.stride, width * vae.module.stride, 3) if vae else (height, width, channels)


def to_bytes(x: np.ndarray, block: int = 4096) -> np.ndarray:
    """Images in model range -> uint8, `block` at a time on the device."""
    return np.concatenate([np.asarray(to_uint8(x[i:i + block])) for i in range(0, len(x), block)])


if __name__ == '__main__':
    launch.main(main)

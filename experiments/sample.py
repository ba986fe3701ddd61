"""Makes images with trained models, and texts: python -m experiments.sample --policy=RUN --help.

    # code first, pixels second
    python -m experiments.sample --unconditional --code_model=RUN --generator=RUN --num=64 --out=grid.png
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
    # from text: a code by LLaDA, then the image; K images of each text
    python -m experiments.sample --text "a red fox in the snow" --text "a lighthouse at night" --per_text=4 \\
        --llada=DLC_LLADA_L512/ --dit=DLC_DiT_L512/ --vae=sd-vae-ft-ema/ --out=grid.png

RUN is the --workdir of a training run, or what experiments.convert wrote, or a folder of released weights. --out
decides the form: one .png grid, an .npz of uint8 [N, H, W, C] under `arr_0` (what FID evaluators read), or a directory
of numbered files, each with its text beside it where there is one.
"""
import argparse
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from dlc_jax import codes as codes_lib
from dlc_jax.diffusion.gaussian import to_uint8
from dlc_jax.diffusion.remasking import REMASKING
from experiments.dlc.code_model import CodeModel
from experiments.dlc.data import memory
from experiments.dlc.data.decode import SUFFIXES, Decoding, read_image
from experiments.dlc.data.image_files import is_junk
from experiments.dlc.data.printable import printable
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import Generator
from experiments.dlc.latents import LatentDecoder
from experiments.dlc.text_to_code import TextToCode
from experiments.dlc.weights import reading
from experiments.runtime import launch, png, storage
from experiments.runtime.progress import bar

log = logging.getLogger(__name__)

SAMPLE = re.compile(r'\d{6,}\.(png|txt)')  # names of files in a directory of samples


def check_out(out: str | os.PathLike) -> None:
    """Raises a ValueError or OSError unless samples can be written to `out`."""
    path = storage.resolve(out)
    if path.suffix not in ('', '.png', '.npz'):
        raise ValueError(f'--out={out}: end it in .png (grid), .npz (array) or / (a directory of files)')
    if path.suffix and path.is_dir():
        raise ValueError(f'--out={out} is a directory; give the name of a file')
    if not path.suffix and path.is_dir():
        others = sorted(file.name for file in path.iterdir() if not SAMPLE.fullmatch(file.name)
                        and file.suffix.lower() in (*SUFFIXES, '.txt') and not is_junk(file.name))
        if others:
            raise ValueError(f'--out={out} holds other pictures or texts, such as {printable(others[0])}; give a '
                             'directory of its own')
    storage.check_writable(path.parent if path.suffix else path, '--out')


def write(images: np.ndarray, out: str | os.PathLike, columns: int = 0, texts: Sequence[str] = ()) -> None:
    """uint8 [N, H, W, C] to a .png grid, an .npz or, for any other name, a directory of files, with `texts` beside
    them; the samples of an earlier run there are replaced, all of them."""
    out = storage.resolve(out)
    if out.suffix == '.npz':
        with storage.write_whole(out) as file:
            np.savez(file, arr_0=images)
    elif out.suffix == '.png':
        png.save(out, png.grid(images, columns or int(np.ceil(np.sqrt(len(images))))))
    else:
        out.mkdir(parents=True, exist_ok=True)
        earlier = [file for file in out.iterdir() if SAMPLE.fullmatch(file.name)]
        for file in earlier:
            file.unlink()
        if earlier:
            log.warning('%s: replaced %d files of an earlier run', out, len(earlier))
        for i, image in enumerate(images):
            png.save(out / f'{i:06d}.png', image)
        for i, text in enumerate(texts):
            with storage.write_whole(out / f'{i:06d}.txt') as file:
                file.write(f'{text}\n'.encode())


def check_codes(generator: Generator, num_codes: int, vocab_size: int, of: str) -> None:
    """Raises a ValueError unless the generator takes the codes that `of` makes."""
    m = generator.config.model
    if m.condition != 'code':
        raise ValueError(f'the generator is conditioned on {m.condition!r}, not on codes; train one with '
                         'model.condition=code')
    if (m.num_codes, m.vocab_size) != (num_codes, vocab_size):
        raise ValueError(f'{of} makes codes of {num_codes} x {vocab_size} but the generator takes '
                         f'{m.num_codes} x {m.vocab_size}; use models trained on the same code store')


def read_condition(generator: Generator, encoder: Encoder, images: list[np.ndarray], num: int, *, compose: bool,
                   key: jax.Array, method: str, temperature: float) -> np.ndarray:
    """Conditions [num, ...] made of uint8 `images` of any size: theirs in turn, or compositions of all of them.

    A generator on continuous embeddings gets those; composed, it is their mean, the paper's baseline (arXiv 2507.12318
    §5.2), which has no draws: its samples differ by their noise alone.

    Raises:
        ValueError: the generator takes neither the encoder's codes nor its embeddings.
    """
    if generator.config.model.condition == 'embedding':
        rows = encoder.encode_images(images, outputs=('embeddings',))['embeddings']
        if rows.shape[1] != generator.config.model.embedding_dim:
            raise ValueError(f'the encoder makes embeddings of {rows.shape[1]} numbers but the generator takes '
                             f'{generator.config.model.embedding_dim}')
        rows = rows.mean(0, keepdims=True) if compose else rows
        return np.resize(rows, (num, rows.shape[1]))
    check_codes(generator, encoder.config.model.num_codes, encoder.config.model.vocab_size, '--encoder')
    if compose:
        sems = encoder.encode_images(images, temperature=temperature, outputs=('sem',))['sem']
        return np.asarray(codes_lib.compose(key, sems, num, method=method))
    return np.resize(encoder.encode_images(images, outputs=('codes',))['codes'], (num, encoder.config.model.num_codes))


def text_codes(args: argparse.Namespace, generator: Generator, key: jax.Array) -> np.ndarray:
    """Codes [texts x K, L] of the texts, K of each, that the generator takes.

    Raises:
        FileNotFoundError, ValueError: no text model there, one of other codes, or texts and settings it cannot take.
    """
    texts, m = read_texts(args), generator.config.model
    if m.condition != 'code':
        raise ValueError(f'--text: the generator is conditioned on {m.condition!r}, not on codes')
    model = reading.load(TextToCode, args.text_model, num_codes=m.num_codes)
    check_codes(generator, model.config.model.num_codes, model.config.model.vocab_size, args.text_model)
    count, sampler = args.per_text or 1, {field: getattr(args, flag) for flag, field in TEXT_SAMPLER.items()}
    model.checked(texts, **sampler)
    return model.sample(key, texts, num_per_prompt=count, batch_size=args.batch_size,
                        progress=bar('codes', len(texts) * count), **sampler)


def to_bytes(x: np.ndarray, block: int = 4096) -> np.ndarray:
    """Images in model range -> uint8, `block` at a time on the device."""
    return np.concatenate([np.asarray(to_uint8(x[i:i + block])) for i in range(0, len(x), block)])


def parser() -> argparse.ArgumentParser:
    p = launch.parser(__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--unconditional', action='store_true',
                      help='codes from --code_model (or none, for a generator without a condition)')
    what.add_argument('--from_images', nargs='+', metavar='IMAGE', help='codes (or embeddings) of these images')
    what.add_argument('--compose', nargs='+', metavar='IMAGE', help='codes composed of those of two or more images')
    what.add_argument('--classes', nargs='+', type=int, metavar='CLASS',
                      help='class indices, for a class-conditional generator')
    what.add_argument('--text', action='append', metavar='TEXT', help='what to show, in words; may be repeated')
    what.add_argument('--text_file', metavar='FILE', help='texts, one a line')
    p.add_argument('--generator', '--dit', required=True, metavar='RUN')
    p.add_argument('--code_model', '--sedd', metavar='RUN')
    p.add_argument('--encoder', '--sem', metavar='RUN')
    p.add_argument('--text_model', '--llada', metavar='RUN')
    p.add_argument('--vae', metavar='DIR',
                   help='released autoencoder weights (directory or file), for generators of latents')
    p.add_argument('--out', required=True, help='x.png: grid; x.npz: array; x/: files')
    p.add_argument('--num', type=int, help='samples in all (default 16; --from_images: one an image)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--batch_size', type=int, default=256)
    p.add_argument('--columns', type=int, default=0, help='of the grid')
    pixels = p.add_argument_group('image sampler (default: as the generator\'s config says)')
    pixels.add_argument('--guidance', type=float, help='classifier-free guidance scale; 1: off')
    pixels.add_argument('--guidance_channels', type=int, help='guide only the first so many channels; 0: all')
    pixels.add_argument('--guidance_interval', type=float, nargs=2, metavar=('LOW', 'HIGH'),
                        help='guide only in this share of the noise levels')
    pixels.add_argument('--steps', type=int, help='network calls, out of 1000')
    pixels.add_argument('--sampler', choices=('ddpm', 'ddim'))
    pixels.add_argument('--ddim_eta', type=float, help='0: deterministic given the first noise; 1: as noisy as ddpm')
    text = p.add_argument_group('text sampler (default: as the text model\'s config says)')
    text.add_argument('--per_text', type=int, metavar='K', help='images of each text (default 1)')
    text.add_argument('--text_steps', type=int, help='network calls; at most one a token')
    text.add_argument('--text_temperature', type=float, help='0: the likeliest token')
    text.add_argument('--remasking', choices=REMASKING, help='which tokens a step keeps: likely ones, or any')
    text.add_argument('--block_length', type=int, help='tokens; fill the code block by block; 0: all at once')
    text.add_argument('--text_guidance', type=float, metavar='W', help='away from codes without a text; 0: off')
    code = p.add_argument_group('code sampler (default: as the code model\'s config says)')
    code.add_argument('--code_sampler', choices=('analytic', 'euler', 'remasking', 'first_hitting'))
    code.add_argument('--code_steps', type=int)
    code.add_argument('--eta', type=float, help='remasking rate')
    code.add_argument('--window', type=float, nargs=2, metavar=('LOW', 'HIGH'), help='remask between these times')
    composition = p.add_argument_group('composition')
    composition.add_argument('--composition', choices=('average', 'positions'), default='average',
                             help='average the soft codes and draw each position, or take each position from one image')
    composition.add_argument('--temperature', type=float, default=0.001,
                             help='of the soft codes; low: one source or the other')
    return p


# Flag -> field of a text model's sampler.
TEXT_SAMPLER = {'text_steps': 'steps', 'text_temperature': 'temperature', 'remasking': 'remasking',
                'block_length': 'block_length', 'text_guidance': 'guidance'}


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts that --text or --text_file gives, [] where there is neither.

    Raises:
        FileNotFoundError, ValueError: no such file, no text in it, or an empty one.
    """
    if args.text_file is None:
        texts = args.text or []
    else:
        file = storage.resolve(args.text_file)
        if not file.is_file():
            raise FileNotFoundError(f'--text_file={args.text_file}: no such file')
        try:
            text = file.read_bytes().decode('utf-8-sig')  # without a byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f'--text_file={args.text_file}: not UTF-8 text (byte {error.start})') from None
        # Other separators of lines that Python knows, such as U+2028, belong to a text.
        texts = [line.strip() for line in text.split('\n') if line.strip()]
        if not texts:
            raise ValueError(f'--text_file={args.text_file}: no text in it')
    if not all(text.strip() for text in texts):
        raise ValueError('--text: empty; say what the image should show')
    return texts


def check_flags(args: argparse.Namespace) -> None:
    """Raises a ValueError for what is wrong whatever the models turn out to be."""
    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ValueError(f'--{name}={value}: must be a number')
    if not 0 <= args.seed < 2 ** 32:
        raise ValueError(f'--seed={args.seed} must lie in 0..{2 ** 32 - 1}')
    if args.text or args.text_file:
        if not args.text_model:
            raise ValueError('give the model that writes the codes of texts with --text_model=RUN or --llada=DIR')
        if args.num is not None:
            raise ValueError(f'--num={args.num}: with texts it is --per_text that says how many images, of each')
    else:
        for name in ('per_text', *TEXT_SAMPLER):
            if getattr(args, name) is not None:
                raise ValueError(f'--{name}: only with --text or --text_file')
    for name in ('num', 'batch_size', 'code_steps', 'per_text', 'text_steps'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)} must be at least 1')
    for name in ('columns', 'guidance_channels', 'block_length', 'text_temperature'):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f'--{name}={getattr(args, name)} must not be negative')
    for name in ('guidance_interval', 'window'):
        low, high = getattr(args, name) or (0, 1)
        if not 0 <= low <= high <= 1:
            raise ValueError(f'--{name}={low} {high}: need 0 <= LOW <= HIGH <= 1')
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise ValueError(f'--eta={args.eta} is a probability; choose it between 0 and 1')
    if args.ddim_eta is not None and not 0 <= args.ddim_eta <= 1:
        raise ValueError(f'--ddim_eta={args.ddim_eta} must lie between 0 and 1')
    if args.temperature <= 0:
        raise ValueError(f'--temperature={args.temperature} must be positive')
    if args.compose and len(args.compose) < 2:
        raise ValueError('--compose needs two images or more; for the codes of one image there is --from_images')
    if (args.compose or args.from_images) and not args.encoder:
        raise ValueError('give the encoder that reads the images with --encoder=RUN')


def check_sampler(args: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError unless the generator of `config` can be sampled as the flags say."""
    guided = [name for name in ('guidance', 'guidance_channels', 'guidance_interval')
              if getattr(args, name) is not None]
    if config.model.condition == 'none' and guided:
        raise ValueError(f'--{guided[0]}: this generator is unconditional, there is nothing to guide; leave the '
                         'flag out')
    if args.steps is not None and not 2 <= args.steps <= config.diffusion.num_timesteps:
        raise ValueError(f'--steps={args.steps} must lie in 2..{config.diffusion.num_timesteps}')
    if (args.guidance_channels or 0) > config.model.channels:
        raise ValueError(f'--guidance_channels={args.guidance_channels}: the generator has {config.model.channels}')


def check_memory(num: int, config: ml_collections.ConfigDict, vae: LatentDecoder | None) -> None:
    """Raises a ValueError where `num` samples would not fit into memory: they are written all together."""
    numbers = config.model.input_size ** 2 * config.model.channels * 4  # bytes of a sample as float32
    pixels = (config.model.input_size * vae.module.stride) ** 2 * 3 if vae else numbers // 4
    memory.check(num * (numbers + pixels), f'{num} samples', 'make fewer at once, with another --seed each time')


def main() -> None:
    if launch.given('--policy'):
        from experiments import sample_policy
        return sample_policy.main()
    args, _ = launch.parse(parser())
    check_flags(args)
    texts = read_texts(args)
    check_out(args.out)
    launch.initialize(args)
    generator = reading.load(Generator, args.generator)
    check_sampler(args, generator.config)
    vae = LatentDecoder.load(args.vae) if args.vae else None
    if (generator.config.data.target == 'latents') != bool(args.vae):
        raise ValueError('this generator makes latents: give the autoencoder weights with --vae=DIR'
                         if not args.vae else 'this generator makes pixels: leave --vae out')
    check_memory(args.num or len(texts) * (args.per_text or 1), generator.config, vae)
    code_key, image_key = jax.random.split(jax.random.key(args.seed))
    num, cond = args.num or 16, None

    # ---- Codes -------------------------------------------------------------------------------------------------------
    if args.classes:
        if generator.config.model.condition != 'class':
            raise ValueError(f'--classes: the generator is conditioned on {generator.config.model.condition!r}')
        bad = [c for c in args.classes if not 0 <= c < generator.config.model.num_classes]
        if bad:
            raise ValueError(f'--classes: {bad[0]} is outside 0..{generator.config.model.num_classes - 1}')
        num = args.num or len(args.classes)
        cond = np.resize(np.asarray(args.classes, np.int32), num)
    elif texts:
        texts = [text for text in texts for _ in range(args.per_text or 1)]
        num, cond = len(texts), text_codes(args, generator, code_key)
    elif args.unconditional and generator.config.model.condition != 'none':
        if instead := {'class': '--classes', 'embedding': '--from_images'}.get(generator.config.model.condition):
            raise ValueError(f'--unconditional: this generator is conditioned on {generator.config.model.condition!r}, '
                             f'which no code model makes; use {instead}')
        if not args.code_model:
            raise ValueError('--unconditional needs --code_model=RUN: this generator is conditioned on codes')
        code_model = reading.load(CodeModel, args.code_model)
        check_codes(generator, code_model.config.model.num_codes, code_model.config.model.vocab_size, args.code_model)
        cond = code_model.sample(code_key, num, batch_size=args.batch_size, progress=bar('codes', num),
                                 name=args.code_sampler, num_steps=args.code_steps, eta=args.eta,
                                 window=tuple(args.window) if args.window else None)
    elif args.from_images or args.compose:
        paths = args.from_images or args.compose
        encoder = reading.load(Encoder, args.encoder)
        num = args.num or (len(paths) if args.from_images else 16)
        images = [read_image(path, Decoding.of(encoder.config.data)) for path in paths]
        cond = read_condition(generator, encoder, images, num, compose=bool(args.compose), key=code_key,
                              method=args.composition, temperature=args.temperature)

    # ---- Pixels ------------------------------------------------------------------------------------------------------
    sampler = dict(name=args.sampler, ddim_eta=args.ddim_eta, num_steps=args.steps, guidance=args.guidance,
                   guidance_channels=args.guidance_channels,
                   guidance_interval=tuple(args.guidance_interval) if args.guidance_interval else None)
    # Released models have settings of their own for each use.
    use = 'unconditional' if args.unconditional else 'classes' if args.classes else 'images'  # or texts
    recipe = generator.config.get('recipes', {}).get(use, {})
    x = generator.sample(image_key, cond, num, batch_size=args.batch_size, progress=bar('images', num),
                         **dict(recipe) | {name: value for name, value in sampler.items() if value is not None})
    images = vae.decode(x, bar('pixels', num)) if vae else to_bytes(x)
    if jax.process_index() == 0:
        try:
            write(images, args.out, args.columns or args.per_text or 0, texts)  # a row a text
        except OSError as error:  # a full disk must not cost the samples
            spare = pathlib.Path(tempfile.mkdtemp()) / 'samples.npz'
            np.savez(spare, arr_0=images)
            raise OSError(f'--out={args.out}: {error.strerror or error}; the samples are in {spare} instead, make '
                          'room and move them') from error
        print(f'{num} samples -> {args.out}')


if __name__ == '__main__':
    launch.main(main, stopped=launch.NOTHING_WRITTEN, status=None)

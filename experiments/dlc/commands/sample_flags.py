"""Flags of `experiments.sample` for images, and what is wrong with them whatever the models turn out to be."""
import argparse
import math

import ml_collections

from dlc_jax.diffusion.remasking import REMASKING
from experiments.dlc.data.decode import OPTIONS
from experiments.runtime import launch, shards, steps, storage

# Flag -> field of a text model's sampler.
TEXT_SAMPLER = {'text_steps': 'steps', 'text_temperature': 'temperature', 'remasking': 'remasking',
                'block_length': 'block_length', 'text_guidance': 'guidance'}


def parser(description: str) -> argparse.ArgumentParser:
    p = launch.parser(description)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument('--unconditional', action='store_true',
                      help='codes from --code_model or embeddings from --embedding_model; nothing, for a generator '
                      'without a condition')
    what.add_argument('--from_images', nargs='+', metavar='IMAGE', help='codes (or embeddings) of these images')
    what.add_argument('--compose', nargs='+', metavar='IMAGE', help='codes composed of those of two or more images')
    what.add_argument('--classes', nargs='+', type=int, metavar='CLASS',
                      help='class indices, for a class-conditional generator')
    what.add_argument('--codes', metavar='DIR|STORE', help='codes that --save_codes or experiments.encode wrote (of '
                      'other generators, the embeddings or labels there), the first --num of them')
    what.add_argument('--text', action='append', metavar='TEXT', help='what to show, in words; may be repeated')
    what.add_argument('--text_file', metavar='FILE', help='texts, one a line')
    p.add_argument('--generator', '--dit', metavar='RUN')
    p.add_argument('--code_model', '--sedd', metavar='RUN')
    p.add_argument('--embedding_model', metavar='RUN', help='draws the embeddings of a generator that takes these')
    p.add_argument('--encoder', '--sem', metavar='RUN')
    for option, choices in OPTIONS.items():
        p.add_argument(f'--{option}', choices=choices, help='of --from_images and --compose (default: as the encoder '
                       'was trained)')
    p.add_argument('--text_model', '--llada', metavar='RUN')
    p.add_argument('--vae', metavar='DIR',
                   help='released autoencoder weights (directory or file), for generators of latents')
    p.add_argument('--out', help='x.png: grid; x.npz: array; x/: files')
    p.add_argument('--save_codes', metavar='DIR', help='keep the codes, as a code store for --codes; without '
                   '--generator and --out nothing else is made')
    p.add_argument('--num', type=int, help='samples in all (default 16; --from_images: one an image; --codes: all)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--batch_size', type=int, default=256, help='samples at once on a device (default 256)')
    steps.add_flag(p, '--generator')
    shards.add_flag(p)
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
    embedding = p.add_argument_group('embedding sampler (default: as the embedding model\'s config says)')
    embedding.add_argument('--embedding_steps', type=int, help='network calls')
    composition = p.add_argument_group('composition')
    composition.add_argument('--composition', choices=('average', 'positions'), default='average',
                             help='average the soft codes and draw each position, or take each position from one image')
    composition.add_argument('--temperature', type=float, default=0.001,
                             help='of the soft codes; low: one source or the other')
    return p


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
    if not args.out and not args.save_codes:
        raise ValueError('--out is missing: where should the samples go?')
    if bool(args.out) != bool(args.generator):
        raise ValueError('--out needs --generator=RUN, the model that makes the images' if args.out else
                         '--generator makes images: say with --out where they go')
    steps.check(args.step, args.out)
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
    for option in OPTIONS:
        if getattr(args, option) and not (args.from_images or args.compose):
            raise ValueError(f'--{option}: only with --from_images or --compose, whose images are read so')
    if args.embedding_model and not args.unconditional:
        raise ValueError(f'--embedding_model={args.embedding_model}: only with --unconditional, whose embeddings it '
                         'draws')
    if args.embedding_steps is not None and not args.embedding_model:
        raise ValueError(f'--embedding_steps={args.embedding_steps}: only with --embedding_model')
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

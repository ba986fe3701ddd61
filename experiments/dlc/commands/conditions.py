"""What a set of samples is conditioned on: codes or embeddings that a model draws, or given rows of codes, classes or
embeddings."""
import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from dlc_jax import codes as codes_lib
from experiments.dlc.code_model import CodeModel
from experiments.dlc.commands.sample_flags import TEXT_SAMPLER
from experiments.dlc.data.codestore import open_code_store
from experiments.dlc.data.decode import OPTIONS, Decoding, read_images
from experiments.dlc.embedding_model import EmbeddingModel
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import CONDITION_ARRAY, Generator
from experiments.dlc.text_to_code import TextToCode
from experiments.dlc.weights import reading
from experiments.runtime import modules, steps
from experiments.runtime.digest import fingerprint

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditions of `num` samples.

    Attributes:
        made: JSON values that decide them: two sets with the same ones have the same conditions.
        rows: [num, ...]; None where there are none, or where `draw` makes them.
        draw: rows of the set -> their codes int32 [n, L].
        codes: L and V of codes; None for conditions of another kind.
        texts: one a sample, where the samples show texts.
        origin: of codes or embeddings: 'drawn' by a model, of an 'image' or of a 'text'; '' where there are none. It
            is kept with saved codes: released generators have a recipe of their own for drawn ones.
    """
    num: int
    made: Mapping[str, Any]
    rows: np.ndarray | None = None
    draw: Callable[[range], np.ndarray] | None = None
    codes: tuple[int, int] | None = None
    texts: Sequence[str] = ()
    origin: str = ''


def conditions_of(args: argparse.Namespace, generator: Generator | None, texts: Sequence[str], key: jax.Array,
                  step: int | None) -> Conditions:
    """What the flags say.

    Args:
        generator: that takes them; None: codes alone are wanted.
        texts: of --text or --text_file.
        key: of what is drawn.
        step: of the code or text model, where codes alone are wanted; else its newest one is taken.

    Raises:
        FileNotFoundError, ValueError: conditions that the generator does not take, or models that are not there.
    """
    condition = generator.config.model.condition if generator else 'code'
    step = None if generator else step
    if args.classes:
        return _classes(args, generator, condition)
    if texts:
        return _texts(args, generator, texts, key, step)
    if args.codes:
        return _stored(args, generator, condition)
    if args.from_images or args.compose:
        return _images(args, generator, condition, key)
    if args.embedding_model and condition != 'embedding':
        raise ValueError(f'--embedding_model={args.embedding_model}: ' + (
            f'the generator is conditioned on {condition!r}, not on embeddings' if generator else
            'embeddings are no codes; give --generator and --out'))
    if condition == 'none':
        return Conditions(args.num or 16, {})
    if condition == 'class':
        raise ValueError("--unconditional: this generator is conditioned on 'class', which no model draws; use "
                         '--classes')
    if condition == 'embedding':
        return _drawn_embeddings(args, generator, key)
    if not args.code_model:
        raise ValueError('--unconditional needs --code_model=RUN: ' + (
            'this generator is conditioned on codes' if generator else 'it is what draws the codes'))
    model = open_model(CodeModel, args.code_model, step)
    m = model.config.model
    check_codes(generator, m.num_codes, m.vocab_size, args.code_model)
    num, sampler = args.num or 16, dict(name=args.code_sampler, num_steps=args.code_steps, eta=args.eta,
                                        window=tuple(args.window) if args.window else None)
    made = dict(code_model=fingerprint(model.params), sampler=dict(modules.with_sampler(model.config, sampler).sampler))
    return Conditions(num, made, codes=(m.num_codes, m.vocab_size), origin='drawn', draw=lambda part: model.sample(
        key, num, part=part, batch_size=args.batch_size, **sampler))


def open_model(cls: type[T], path: str, step: int | None = None, **settings: Any) -> T:
    """See `reading.load`; where `step` is None all processes of a job take the newest that the first of them finds."""
    return reading.load(cls, path, step=steps.agreed_newest(path) if step is None else step, **settings)


def _drawn_embeddings(args: argparse.Namespace, generator: Generator, key: jax.Array) -> Conditions:
    """Embeddings that --embedding_model draws, all of them in every process: they take little beside the images."""
    if not args.embedding_model:
        raise ValueError('--unconditional needs --embedding_model=RUN: this generator is conditioned on embeddings; or '
                         'use --from_images')
    model = EmbeddingModel.load(args.embedding_model, step=steps.agreed_newest(args.embedding_model))
    num = args.num or 16
    check_embeddings(generator, model.config.model.embedding_dim, f'--embedding_model={args.embedding_model}')
    most = model.config.diffusion.num_timesteps
    if args.embedding_steps is not None and not 2 <= args.embedding_steps <= most:
        raise ValueError(f'--embedding_steps={args.embedding_steps} must lie in 2..{most}')
    sampler = dict(num_steps=args.embedding_steps)
    made = dict(embedding_model=fingerprint(model.params),
                sampler=dict(modules.with_sampler(model.config, sampler).sampler))
    return Conditions(num, made, model.sample(key, num, batch_size=args.batch_size, **sampler), origin='drawn')


def check_embeddings(generator: Generator, size: int, of: str) -> None:
    """Raises a ValueError unless the generator takes embeddings of `size` numbers, which `of` makes."""
    if size != generator.config.model.embedding_dim:
        raise ValueError(f'{of}: embeddings of {size} numbers, but the generator takes '
                         f'{generator.config.model.embedding_dim}; use models trained on the same code store')


def check_codes(generator: Generator | None, num_codes: int, vocab_size: int, of: str) -> None:
    """Raises a ValueError unless the generator, where there is one, takes the codes that `of` makes."""
    if generator is None:
        return
    m = generator.config.model
    if m.condition != 'code':
        raise ValueError(f'the generator is conditioned on {m.condition!r}, not on codes; train one with '
                         'model.condition=code')
    if (m.num_codes, m.vocab_size) != (num_codes, vocab_size):
        raise ValueError(f'{of} makes codes of {num_codes} x {vocab_size} but the generator takes '
                         f'{m.num_codes} x {m.vocab_size}; use models trained on the same code store')


def _classes(args: argparse.Namespace, generator: Generator | None, condition: str) -> Conditions:
    if generator is None or condition != 'class':
        raise ValueError(f'--classes: the generator is conditioned on {condition!r}' if generator else
                         '--classes: a class has no code to save; give --generator and --out')
    bad = [c for c in args.classes if not 0 <= c < generator.config.model.num_classes]
    if bad:
        raise ValueError(f'--classes: {bad[0]} is outside 0..{generator.config.model.num_classes - 1}')
    num = args.num or len(args.classes)
    return Conditions(num, dict(classes=args.classes), np.resize(np.asarray(args.classes, np.int32), num))


def _texts(args: argparse.Namespace, generator: Generator | None, texts: Sequence[str], key: jax.Array,
           step: int | None) -> Conditions:
    if generator is not None and generator.config.model.condition != 'code':
        raise ValueError(f'--text: the generator is conditioned on {generator.config.model.condition!r}, not on codes')
    if generator is None and reading.is_released(args.text_model):
        raise ValueError(f'--text_model={args.text_model}: released weights do not say how long their codes are; give '
                         'the --generator that takes them, and --out')
    settings = dict(num_codes=generator.config.model.num_codes) if generator else {}
    model = open_model(TextToCode, args.text_model, step, **settings)
    m = model.config.model
    check_codes(generator, m.num_codes, m.vocab_size, args.text_model)
    count, sampler = args.per_text or 1, {field: getattr(args, flag) for flag, field in TEXT_SAMPLER.items()}
    model.checked(texts, **sampler)
    made = dict(text_model=fingerprint(model.params), texts=hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:16],
                per_text=count, sampler=dict(modules.with_sampler(model.config, sampler).sampler))
    return Conditions(len(texts) * count, made, codes=(m.num_codes, m.vocab_size), origin='text',
                      texts=[text for text in texts for _ in range(count)], draw=lambda part: model.sample(
                          key, texts, num_per_prompt=count, part=part, batch_size=args.batch_size, **sampler))


def _stored(args: argparse.Namespace, generator: Generator | None, condition: str) -> Conditions:
    """Rows of a store: what --save_codes wrote, or experiments.encode."""
    if generator is None:
        raise ValueError('--codes: these are saved already; give --generator and --out to make images of them')
    if condition == 'none':
        raise ValueError('--codes: this generator is unconditional; use --unconditional')
    store, m = open_code_store(args.codes), generator.config.model
    if condition == 'code':
        check_codes(generator, store.num_codes, store.vocab_size, f'--codes={args.codes}')
    num = args.num or len(store)
    if num > len(store):
        raise ValueError(f'--num={num}: --codes={args.codes} holds {len(store)}')
    rows = store.labels(m.num_classes) if condition == 'class' else store.array(CONDITION_ARRAY[condition])
    if condition == 'embedding':
        check_embeddings(generator, rows.shape[1], f'--codes={args.codes}')
    codes = (store.num_codes, store.vocab_size) if condition == 'code' else None
    # A store that does not say: of an encoder, or else what --save_codes wrote before it kept the origin.
    origin = store.meta.get('origin') or ('image' if 'encoder' in store.meta else 'drawn')
    return Conditions(num, dict(rows=fingerprint(rows[:num])), rows[:num], codes=codes, origin=origin)


def _images(args: argparse.Namespace, generator: Generator | None, condition: str, key: jax.Array) -> Conditions:
    """Codes (or embeddings) of --from_images in turn, or composed of all images of --compose."""
    paths = args.from_images or args.compose
    encoder = open_model(Encoder, args.encoder)
    num = args.num or (len(paths) if args.from_images else 16)
    given = {option: getattr(args, option) for option in OPTIONS if getattr(args, option) is not None}
    images = read_images(paths, Decoding.of(dict(encoder.config.data) | given))
    m, codes = encoder.config.model, None
    if condition == 'embedding':
        rows = embeddings(generator, encoder, images, num, compose=bool(args.compose))
    else:
        check_codes(generator, m.num_codes, m.vocab_size, '--encoder')
        codes = (m.num_codes, m.vocab_size)
        if args.compose:
            sems = encoder.encode_images(images, temperature=args.temperature, outputs=('sem',))['sem']
            rows = np.asarray(codes_lib.compose(key, sems, num, method=args.composition))
        else:
            rows = np.resize(encoder.encode_images(images, outputs=('codes',))['codes'], (num, m.num_codes))
    return Conditions(num, dict(rows=fingerprint(rows)), rows, codes=codes, origin='image')


def embeddings(generator: Generator, encoder: Encoder, images: list[np.ndarray], num: int, *,
               compose: bool) -> np.ndarray:
    """Embeddings [num, D] of uint8 `images` of any size: theirs in turn, or composed, their mean, which is the paper's
    baseline (arXiv 2507.12318 §5.2) and has no draws: its samples differ by their noise alone.

    Raises:
        ValueError: the generator takes embeddings of another size.
    """
    rows = encoder.encode_images(images, outputs=('embeddings',))['embeddings']
    check_embeddings(generator, rows.shape[1], '--encoder')
    rows = rows.mean(0, keepdims=True) if compose else rows
    return np.resize(rows, (num, rows.shape[1]))

"""Text to image on pairs of handwritten digits, from raw images to a report
(`python -m experiments.quickstart --which=text`).

Trains the encoder on single digits, encodes pictures of two, trains a generator on their codes and a small LLaDA on
captions and codes, then asks for every pair of digits in every phrasing, and lets a classifier that knows real digits
only say what the pictures show. A fifth of the pairs of digits was in no training set. Interrupt it anywhere and run it
again: it continues and ends with the same numbers.
"""
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from dlc_jax import codes as codes_lib
from dlc_jax.diffusion.gaussian import to_uint8
from experiments.dlc import evaluation
from experiments.dlc.data import codestore, codestore_writer, digit_pairs
from experiments.dlc.data.digit_pairs import DigitPairs
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import Generator
from experiments.dlc.judge import Judge
from experiments.dlc.parts import PartsEncoder
from experiments.dlc.text_to_code import TextToCode
from experiments.runtime import report, stages, storage
from experiments.runtime.digest import fingerprint
from experiments.runtime.metrics import curve
from experiments.runtime.progress import bar
from experiments.runtime.statistics import mean_and_spread
from experiments.train import train

HEADINGS = {'both': 'both digits right', 'upper': 'upper digit', 'lower': 'lower digit'}
UPPER, LOWER = np.divmod(np.arange(100), 10)
UNSEEN = digit_pairs.is_unseen(UPPER, LOWER)
PROMPTS = tuple((label, digit_pairs.caption(*divmod(label, 10), phrase))
                for label in range(100) for phrase in range(len(digit_pairs.PHRASES)))


def write_codes(encoder: Encoder, pairs: DigitPairs, path: pathlib.Path, batch_size: int) -> None:
    """The code store of `pairs`: the code of a picture is that of its upper digit, then that of its lower one."""
    model = encoder.config.model
    with codestore_writer.writer(path, num=len(pairs), meta=dict(
            num_codes=2 * model.num_codes, vocab_size=model.vocab_size, class_names=pairs.class_names, captions=True,
            encoder=fingerprint(encoder.params))) as store:
        if store.done < len(pairs):
            codes = PartsEncoder(encoder, digit_pairs.REGIONS).encode_images(
                list(pairs.images), outputs=('codes',), batch_size=batch_size)['codes']
            names = [pairs.name(i) for i in range(len(pairs))]
            store.append({'codes': codes[store.done:], 'images': pairs.images[store.done:],
                          'labels': pairs.labels[store.done:]}, names=names[store.done:],
                         captions=[pairs.captions[name] for name in names[store.done:]])


def sample_sets(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                stores: dict[str, codestore.CodeStore]) -> dict[str, list[dict[str, np.ndarray]]]:
    """One draw a seed: `text`, codes and images of all `PROMPTS`; `heldout`, images from the codes of real ones, of the
    pairs that were trained on and of those that were not."""
    text_model = functools.cache(lambda: TextToCode.load(workdir / 'text_to_code'))  # one object: compiled once
    generator = functools.cache(lambda: Generator.load(workdir / 'generator'))
    sets = {'text': [], 'heldout': [], 'unseen': []}
    for seed in config.sample_seeds:
        code_key, image_key = jax.random.split(jax.random.key(seed))
        for name, draws in sets.items():
            def make():
                if name == 'text':
                    codes = text_model().sample(
                        code_key, [text for _, text in PROMPTS], batch_size=config.sample_batch,
                        progress=bar(f'5/6 codes, seed {seed}', len(PROMPTS)))
                else:
                    codes = np.asarray(stores[name].array('codes')).astype(np.int32)
                x = generator().sample(
                    image_key, codes, len(codes), batch_size=config.sample_batch,
                    progress=bar(f'5/6 images, {name}, seed {seed}', len(codes)))
                return {'codes': codes, 'images': np.asarray(to_uint8(x))}
            draws.append(stages.once(workdir / 'samples' / f'{name}_{seed}.npz', make))
    return sets


def shares(upper: np.ndarray, lower: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How often the digits [N] that were recognised are those of `labels`: both, the upper one, the lower one."""
    right = upper == labels // 10, lower == labels % 10
    return {'both': float((right[0] & right[1]).mean()), 'upper': float(right[0].mean()),
            'lower': float(right[1].mean())}


def measure(config: ml_collections.ConfigDict, stores: dict[str, codestore.CodeStore],
            sets: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Everything in `metrics.json`."""
    from sklearn.linear_model import LogisticRegression
    arrays = {split: {name: np.asarray(store.array(name)) for name in ('images', 'codes', 'labels')}
              for split, store in stores.items()}
    train_set, vocab = arrays['train'], stores['train'].vocab_size
    data = config.encoder.data
    judge = Judge.fit(*digit_pairs.single_digits('train', heldout=data.heldout, seed=data.split_seed))
    one_hot = lambda codes: codes_lib.one_hot(codes, vocab).reshape(len(codes), -1)
    probes = [LogisticRegression(C=0.1, max_iter=200).fit(one_hot(train_set['codes']), of(train_set['labels']))
              for of in (lambda labels: labels // 10, lambda labels: labels % 10)]
    seen_in = lambda images: tuple(judge.predict(half) for half in digit_pairs.halves(images))
    read_from = lambda codes: tuple(probe.predict(one_hot(codes)) for probe in probes)

    labels = np.array([label for label, _ in PROMPTS])
    rows = {}
    for kind, split, asked in (('seen', 'heldout', ~UNSEEN[labels]), ('unseen', 'unseen', UNSEEN[labels])):
        real = arrays[split]
        rows |= {
            f'text to image, {kind} pairs': mean_and_spread(
                [shares(*seen_in(draw['images'][asked]), labels[asked]) for draw in sets['text']]),
            f'text to code, {kind} pairs': mean_and_spread(
                [shares(*read_from(draw['codes'][asked]), labels[asked]) for draw in sets['text']]),
            f'codes of held-out images, {kind} pairs': shares(*read_from(real['codes']), real['labels']),
            f'images from codes of held-out images, {kind} pairs': mean_and_spread(
                [shares(*seen_in(draw['images']), real['labels']) for draw in sets[split]]),
            f'held-out images, {kind} pairs': shares(*seen_in(real['images']), real['labels'])}
    rows['chance'] = {'both': 0.01, 'upper': 0.1, 'lower': 0.1}
    return {'methods': rows, 'codes': evaluation.code_usage(train_set['codes'], vocab)}


def write_report(config: ml_collections.ConfigDict, workdir: pathlib.Path, metrics: dict[str, Any],
                 seconds: dict[str, float], stores: dict[str, codestore.CodeStore],
                 sets: dict[str, list[dict[str, np.ndarray]]]) -> None:
    page = report.Report('Text to image on pairs of handwritten digits',
                         'Every number on this page was measured in this run. ± is the standard deviation over '
                         f'{len(config.sample_seeds)} sample sets.')
    page.heading('Does the image show what the text says?')
    page.table(report.rows_with_spread(metrics['methods'], HEADINGS))
    page.text(f'Unseen pairs: {int(UNSEEN.sum())} of the 100 pairs of digits were in no training set, though each of '
              f'their digits was, in that place. All 100 pairs are asked for in {len(digit_pairs.PHRASES)} phrasings. '
              'Images are judged by a classifier of real training digits, half by half: its accuracy on held-out '
              'images is what can be reached. Codes are judged by a linear probe of the codes of training images.')
    page.heading('Samples')
    for kind, asked in (('seen', np.flatnonzero(~UNSEEN)[::9]), ('unseen', np.flatnonzero(UNSEEN)[::3])):
        for label in asked:
            rows = [i for i, (which, _) in enumerate(PROMPTS) if which == label]
            page.images(np.concatenate([draw['images'][rows] for draw in sets['text']]), 12,
                        f'{PROMPTS[rows[0]][1]} ({kind} pair)', scale=3)
    page.images(np.asarray(stores['heldout'].array('images'))[:48], 24, 'held-out images', scale=3)
    page.heading('Training')
    page.lines({'encoder': curve(workdir / 'encoder', 'loss')}, 'encoder loss')
    page.lines({'generator': curve(workdir / 'generator', 'mse')}, 'generator, error of the predicted noise',
               log_y=True)
    page.lines({'training': curve(workdir / 'text_to_code', 'loss'),
                'held out': curve(workdir / 'text_to_code', 'heldout_loss')}, 'text to code, nats a token')
    page.table([metrics['codes']])
    page.table([{'stage': name, 'seconds': value} for name, value in seconds.items()])
    page.save(workdir / 'report.html')


def train_models(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                 clock: stages.Clock) -> dict[str, codestore.CodeStore]:
    """Trains what `workdir` does not hold yet: encoder, codes, generator, text to code. Returns the stores of codes."""
    config = config.copy_and_resolve_references().unlock()

    # ---- 1, 2: encoder, codes ----------------------------------------------------------------------------------------
    clock.stage('encoder', lambda: train(config.encoder, workdir / 'encoder', name='1/6 encoder'))

    def encode():
        encoder, data = Encoder.load(workdir / 'encoder'), config.encoder.data
        for split, num in config.num_images.items():
            write_codes(encoder, DigitPairs(split, num, heldout=data.heldout, seed=data.split_seed),
                        workdir / 'codes' / split, config.sample_batch)
    clock.stage('codes', encode)

    # ---- 3, 4: generator, text to code -------------------------------------------------------------------------------
    config.generator.data.path = config.text_to_code.data.path = str(workdir / 'codes' / 'train')
    config.text_to_code.data.heldout = str(workdir / 'codes' / 'heldout')
    clock.stage('generator', lambda: train(config.generator, workdir / 'generator', name='3/6 generator'))
    clock.stage('text to code', lambda: train(config.text_to_code, workdir / 'text_to_code', name='4/6 text to code'))
    return {split: codestore.open_code_store(workdir / 'codes' / split) for split in config.num_images}


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs every stage that `workdir` does not hold yet and returns what `metrics.json` says."""
    workdir = stages.claim(config, workdir)
    clock = stages.Clock(workdir / 'seconds.json')
    stores = train_models(config, workdir, clock)

    # ---- 5, 6: samples, numbers, page --------------------------------------------------------------------------------
    sets = clock.stage('samples', lambda: sample_sets(config, workdir, stores))
    metrics = clock.stage('evaluation', lambda: measure(config, stores, sets))
    storage.write_json(workdir / 'metrics.json', metrics)
    clock.stage('report', lambda: write_report(config, workdir, metrics, clock.seconds, stores, sets))
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The table as text."""
    return '\n'.join(f'{name:52s} both digits {row["both"]:.3f}   upper {row["upper"]:.3f}   lower {row["lower"]:.3f}'
                     for name, row in metrics['methods'].items())

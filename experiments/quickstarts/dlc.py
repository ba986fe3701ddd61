"""Discrete Latent Codes on small pictures, from raw images to a report (`python -m experiments.quickstart`).

Trains the encoder, encodes the data set, trains generators on codes, on nothing and on the continuous embedding, trains
the models that draw codes and embeddings, samples, composes, evaluates. Which generators are compared is what
`config.generators` holds. Interrupt it anywhere and run it again: it continues and ends with the same numbers.
"""
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from dlc_jax import codes as codes_lib
from dlc_jax.diffusion.gaussian import to_uint8
from experiments import encode as encode_lib
from experiments.dlc import evaluation
from experiments.dlc.code_model import CodeModel
from experiments.dlc.convolutional_judge import ConvolutionalJudge
from experiments.dlc.data import codestore, digit_pairs, sources
from experiments.dlc.data.images import ArrayImages, ImageSource
from experiments.dlc.embedding_model import EmbeddingModel
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import Generator
from experiments.dlc.grids import DIGITS, EMOJI, grid_of
from experiments.dlc.judge import Judge, PictureJudge
from experiments.dlc.nearest_judge import NearestJudge
from experiments.dlc.parts import PartsEncoder
from experiments.quickstarts import compositions
from experiments.runtime import report, stages, storage
from experiments.runtime.metrics import curve
from experiments.runtime.progress import bar
from experiments.runtime.statistics import mean_and_spread
from experiments.train import train

# Row of the table of methods -> (generator, what its codes come from).
METHODS = {
    'unconditional': ('none', None),
    'code, then image': ('code', 'code_model'),
    'embedding, then image': ('embedding', 'embedding_model'),
    'codes of held-out images': ('code', 'heldout'),
    'embeddings of held-out images': ('embedding', 'heldout'),
}

JUDGES = ('perceptron', 'convolutional', 'nearest')
ENCODED = ('whole', 'halves')

PATHS = {'npz': '.npz', 'emoji': 'folder'}  # name of a source -> what its path is
LEAST_IMAGES = 20  # neighbours that `evaluation.representation` asks for

# Column of a table in metrics.json -> its heading on the page, where they differ by more than underscores.
HEADINGS = {'frechet': 'Fréchet distance', 'knn': '20 nearest neighbours', 'linear': 'linear probe'}


def methods_of(config: ml_collections.ConfigDict) -> dict[str, tuple[str, str | None]]:
    """Those of `METHODS` whose generator the config has."""
    return {method: row for method, row in METHODS.items() if row[0] in config.generators}


class Models:
    """The trained models of a work directory, each loaded once, so that all draws share its compiled sampler."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self._config, self._workdir = config, workdir

    @functools.cached_property
    def encoder(self) -> Encoder | PartsEncoder:
        encoder = Encoder.load(self._workdir / 'encoder')
        return PartsEncoder(encoder, digit_pairs.REGIONS) if self._config.encoded == 'halves' else encoder

    @functools.cached_property
    def code_model(self) -> CodeModel:
        return CodeModel.load(self._workdir / 'code_model')

    @functools.cached_property
    def embedding_model(self) -> EmbeddingModel:
        return EmbeddingModel.load(self._workdir / 'embedding_model')

    @functools.cache
    def generator(self, condition: str) -> Generator:
        return Generator.load(self._workdir / f'generator_{condition}')


def sample_sets(config: ml_collections.ConfigDict, workdir: pathlib.Path, models: Models,
                heldout: codestore.CodeStore) -> dict[str, list[dict[str, np.ndarray]]]:
    """Draws of every method, one a seed: `images` uint8 [N, H, W, C], as many as there are held-out images, and the
    `codes` [N, L] of the code model where they are made from these."""
    sets = {}
    for method in methods_of(config):
        file_name = method.replace(', ', '_').replace(' ', '_')
        sets[method] = [
            stages.once(workdir / 'samples' / f'{file_name}_{seed}.npz',
                        functools.partial(draw_samples, config, models, heldout, method, seed))
            for seed in config.sample_seeds]
    return sets


def draw_samples(config: ml_collections.ConfigDict, models: Models, heldout: codestore.CodeStore, method: str,
                 seed: int) -> dict[str, np.ndarray]:
    """One draw of `method`; see `sample_sets`."""
    condition, origin = METHODS[method]
    code_key, image_key = jax.random.split(jax.random.key(seed))
    num, drawn, cond = len(heldout), {}, None
    if origin == 'code_model':
        cond = drawn['codes'] = models.code_model.sample(code_key, num, batch_size=config.sample_batch,
                                                         progress=bar('codes', num))
    elif origin == 'embedding_model':
        cond = models.embedding_model.sample(code_key, num, batch_size=config.sample_batch)
    elif origin == 'heldout':
        cond = heldout.array('codes' if condition == 'code' else 'embeddings')
    x = models.generator(condition).sample(image_key, cond, num, batch_size=config.sample_batch,
                                           progress=bar(f'{method}, seed {seed}', num))
    return drawn | {'images': np.asarray(to_uint8(x))}


def picture_source(config: ml_collections.ConfigDict, split: str, **changes: Any) -> ImageSource:
    """The pictures of `split` that are to be encoded; `changes`: other values of fields of `config.encoder.data`."""
    data = dict(config.encoder.data, **changes)
    if config.encoded == 'halves':  # the encoder reads one digit, half as wide as a picture of two
        data.update(name='digit_pairs', image_size=digit_pairs.SIDE)
    return sources.image_source(data, split)


def fit_judge(config: ml_collections.ConfigDict, train_set: dict[str, np.ndarray],
              heldout: dict[str, np.ndarray]) -> evaluation.AnyJudge:
    """The classifier that `config.judge` names, trained on pixels. Of pairs of digits, a perceptron that reads digit by
    digit, trained on those that the training images are made of; `nearest` names the nearest real picture."""
    data, grid, images, labels = config.encoder.data, grid_of(config), train_set['images'], train_set['labels']
    if grid is DIGITS:
        digits = digit_pairs.single_digits('train', heldout=data.heldout, seed=data.split_seed)
        return PictureJudge(Judge.fit(*digits), images.shape[1:], digit_pairs.REGIONS)
    if config.judge == 'nearest':
        return NearestJudge.of(grid, *(np.concatenate([s[name] for s in (train_set, heldout)])
                                       for name in ('images', 'labels')))
    if config.judge == 'convolutional':
        return ConvolutionalJudge.fit(images, labels, flip=data.flip > 0)
    return Judge.fit(images, labels)


def measure(config: ml_collections.ConfigDict, stores: dict[str, codestore.CodeStore],
            sets: dict[str, list[dict[str, np.ndarray]]], composed: compositions.Draws) -> dict[str, Any]:
    """Everything in `metrics.json`."""
    train_set, heldout = (
        {name: np.asarray(store.array(name)) for name in ('images', 'labels', 'codes', 'embeddings', 'sem')}
        for store in (stores['train'], stores['heldout']))
    vocab = config.encoder.model.vocab_size
    judge = fit_judge(config, train_set, heldout)
    kinds = EMOJI.values if grid_of(config) is EMOJI else 1  # no held-out label was trained on: probes ask for figures
    opinion = judge.predict(heldout['images'])

    methods = {}
    for method, draws in tqdm(sets.items(), desc='6/7 evaluation', unit='method', dynamic_ncols=True):
        rows = []
        for draw in draws:
            row = evaluation.sample_set(judge, draw['images'], heldout['images'], train_set['images'])
            if METHODS[method][1] == 'heldout':  # the image its code came from has a class: is it kept?
                row['same_class'] = float((judge.predict(draw['images']) == heldout['labels']).mean())
            rows.append(row)
        methods[method] = mean_and_spread(rows)
    rng = np.random.default_rng(0)
    of_train, of_heldout = judge.features(train_set['images']), judge.features(heldout['images'])
    floors = [evaluation.compare(of_train[rng.permutation(len(of_train))[:len(of_heldout)]], of_heldout)
              for _ in config.sample_seeds]
    methods['real training images'] = mean_and_spread(floors) | {'nearest_train': None, 'nearest_train_std': None}

    drawn = [draw['codes'] for draw in sets['code, then image']]
    nearest_code = lambda codes: float(np.median(codes_lib.nearest_hamming(codes, train_set['codes'])))
    return {
        'methods': methods,
        'judge_accuracy': float((opinion == heldout['labels']).mean()),
        'heldout_nearest_train': evaluation.sample_set(
            judge, heldout['images'], heldout['images'], train_set['images'])['nearest_train'],
        'representation': evaluation.representation(
            *(s | {'labels': s['labels'] // kinds} for s in (train_set, heldout)),
            len(stores['train'].meta['class_names']) // kinds, vocab),
        'codes': {
            'training images': evaluation.code_usage(train_set['codes'], vocab) | {'nearest_train_code': None},
            'held-out images': evaluation.code_usage(heldout['codes'], vocab) | {
                'nearest_train_code': nearest_code(heldout['codes'])},
            'code model': mean_and_spread([
                evaluation.code_usage(codes, vocab) | {'nearest_train_code': nearest_code(codes)}
                for codes in drawn]),
        },
        'composition': compositions.measure(config, judge, composed, stores),
    }


def write_report(config: ml_collections.ConfigDict, workdir: pathlib.Path, metrics: dict[str, Any],
                 seconds: dict[str, float], stores: dict[str, codestore.CodeStore],
                 sets: dict[str, list[dict[str, np.ndarray]]], composed: compositions.Draws) -> None:
    page = report.Report(f'Discrete Latent Codes on {config.pictures}',
                         'Every number on this page was measured in this run. ± is the standard deviation over '
                         f'{len(config.sample_seeds)} sample sets.')
    images = np.asarray(stores['heldout'].array('images'))
    page.heading('Methods')
    page.table(report.rows_with_spread(metrics['methods'], HEADINGS))
    space = ('the largest principal components of the real images, of which there is one a class. ' if
             grid_of(config) is EMOJI else
             f'the last hidden layer of a separate pixel classifier ({metrics["judge_accuracy"]:.1%} correct on '
             'held-out images) that none of the generators or the encoder was trained in. ')
    page.text(f'Fréchet distance, precision, recall, density and coverage against {len(images)} held-out images, in '
              f'{space}'
              'Nearest train: median distance of a sample to its closest training image, in grey levels; '
              f'held-out images are at {metrics["heldout_nearest_train"]:.3g}, so a value far below that means copies. '
              'Same class: how often the judge gives a sample the label of the image its code came from.')
    page.heading('Samples')
    scale = max(24 // images.shape[1], 1)
    shown = np.random.default_rng(0).permutation(len(images))[:64]  # they may come sorted by class
    for method, draws in sets.items():
        page.images(draws[0]['images'][shown], 16, method, scale=scale)
    page.images(images[shown], 16, 'the held-out images themselves', scale=scale)

    compositions.write(page, config, report.rows_with_spread(metrics['composition'], HEADINGS), composed[0],
                       stores, scale=scale)

    page.heading('Codes and representation')
    page.table(report.rows_with_spread(metrics['codes'], HEADINGS))
    page.text(f'{config.encoder.model.num_codes} positions of {config.encoder.model.vocab_size} values. '
              'Perplexity: mean and least over positions; dead entries: share of values never used; '
              'nearest train code: median number of positions that differ from the closest training code.')
    page.table(report.rows_with_spread(metrics['representation'], HEADINGS))
    page.text('Accuracy on held-out images of a 20-nearest-neighbour classifier and of a linear probe.')

    page.heading('Training')
    page.lines({'encoder': curve(workdir / 'encoder', 'loss')}, 'encoder loss')
    page.lines({'perplexity of the mean soft code': curve(workdir / 'encoder', 'sem_usage')},
               'code usage while training')
    page.lines({c: curve(workdir / f'generator_{c}', 'mse') for c in config.generators},
               'generator, error of the predicted noise', log_y=True)
    page.lines({'code model': curve(workdir / 'code_model', 'nats_per_token')}, 'code model, bound on nats a token')
    page.table([{'stage': name, 'seconds': value} for name, value in seconds.items()])
    page.save(workdir / 'report.html')


def check(config: ml_collections.ConfigDict) -> None:
    """Looks at the data set and at what the stages expect of it, before the first of them is trained.

    Raises:
        ValueError, OSError: one line that names the field and the fix.
    """
    if 'code' not in config.generators:
        raise ValueError("generators: must have 'code', the generator that is compared with the others")
    for field, choices in (('judge', JUDGES), ('encoded', ENCODED)):
        if config[field] not in choices:
            raise ValueError(f'{field}={config[field]!r} is not one of {choices}')
    grid = grid_of(config)
    judge = grid.judge if grid else 'perceptron' if config.judge == 'nearest' else config.judge
    if config.judge != judge:
        raise ValueError(f'judge={config.judge!r} cannot read {config.pictures}; set --config.judge={judge}')
    for condition, generator in config.generators.items():
        size, patch_size = generator.model.input_size, generator.model.patch_size
        if size % patch_size:
            raise ValueError(f'generators.{condition}.model.patch_size={patch_size} does not divide images of {size} '
                             'pixels (encoder.data.image_size)')
    data = config.encoder.data
    if data.name in PATHS and not data.path:
        raise ValueError(f'encoder.data.path is missing: give the {PATHS[data.name]} of {config.pictures}, '
                         '--config.encoder.data.path=PATH')
    for split in ('train', 'heldout'):
        source = picture_source(config, split, channels=0, in_memory=False)
        if isinstance(source, ArrayImages) and source.images.shape[-1] != data.channels:
            raise ValueError(f'encoder.data.path={data.path}: images have {source.images.shape[-1]} channels but '
                             f'encoder.data.channels={data.channels}; set it, or choose the config of these pictures')
        if len(source) < LEAST_IMAGES:
            raise ValueError(f'encoder.data: {len(source)} images in split {split!r}; give at least {LEAST_IMAGES}')
        labels = getattr(source, 'labels', None)
        if source.num_classes < 2 or labels is not None and len(np.unique(labels)) < 2:
            raise ValueError(f'encoder.data: one class alone in split {split!r}; what is drawn is judged by its class, '
                             'so give labels')


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Runs every stage that `workdir` does not hold yet and returns what `metrics.json` says."""
    check(config)
    workdir = stages.claim(config, workdir)
    clock = stages.Clock(workdir / 'seconds.json')
    config = config.copy_and_resolve_references()

    # ---- 1, 2: encoder, codes ----------------------------------------------------------------------------------------
    clock.stage('encoder', lambda: train(config.encoder, workdir / 'encoder', name='1/7 encoder'))

    models = Models(config, workdir)

    def encode():
        for split in ('train', 'heldout'):
            encode_lib.encode(models.encoder, picture_source(config, split), workdir / 'codes' / split,
                              store_sem=True, image_size=config.generators.code.model.input_size)
    clock.stage('codes', encode)
    stores = {split: codestore.open_code_store(workdir / 'codes' / split) for split in ('train', 'heldout')}

    # ---- 3, 4: generators, code model, embedding model ---------------------------------------------------------------
    for condition, generator in config.generators.items():
        generator.data.path = str(workdir / 'codes' / 'train')
        clock.stage(f'generator, {condition}', lambda: train(
            generator, workdir / f'generator_{condition}', name=f'3/7 generator, condition {condition}'))
    config.code_model.data.path = str(workdir / 'codes' / 'train')
    clock.stage('code model', lambda: train(config.code_model, workdir / 'code_model', name='4/7 code model'))
    if 'embedding' in config.generators:
        config.embedding_model.data.path = str(workdir / 'codes' / 'train')
        clock.stage('embedding model', lambda: train(config.embedding_model, workdir / 'embedding_model',
                                                     name='4/7 embedding model'))

    # ---- 5, 6, 7: samples, numbers, page -----------------------------------------------------------------------------
    sets = clock.stage('samples', lambda: sample_sets(config, workdir, models, stores['heldout']))
    composed = clock.stage('compositions', lambda: compositions.draw(
        config, workdir, lambda: models.encoder, models.generator, stores))
    metrics = clock.stage('evaluation', lambda: measure(config, stores, sets, composed))
    storage.write_json(workdir / 'metrics.json', metrics)
    clock.stage('report', lambda: write_report(
        config, workdir, metrics, clock.seconds, stores, sets, composed))
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The table of methods as text."""
    return '\n'.join(f'{name:32s} Fréchet distance {row["frechet"]:8.3f}   precision {row["precision"]:.3f}   '
                     f'recall {row["recall"]:.3f}' for name, row in metrics['methods'].items())

"""Images composed of two held-out ones, by their codes and by their embeddings (`experiments.quickstarts.dlc`).

Of single pictures a composition is something between two classes. Of pairs of digits it can show both sources: a digit
of each. There the two sources are chosen so that a pair of digits with one from each is in no training set.
"""
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dlc_jax import codes as codes_lib
from dlc_jax.diffusion.gaussian import to_uint8
from experiments.dlc import evaluation
from experiments.dlc.data import codestore, digit_pairs
from experiments.dlc.encoder import Encoder
from experiments.dlc.generator import Generator
from experiments.dlc.judge import PictureJudge
from experiments.dlc.parts import PartsEncoder, belonging
from experiments.runtime import stages
from experiments.runtime.progress import bar
from experiments.runtime.statistics import mean_and_spread

Stores = Mapping[str, codestore.CodeStore]
Draws = list[dict[str, np.ndarray]]

# Way of composing -> (generator, what it does to the two sources).
WAYS = {
    'average': ('code', 'codes drawn from the averaged soft codes'),
    'positions': ('code', 'each position of the code from either source'),
    'embedding': ('embedding', 'averaged continuous embeddings'),
}
WAYS_OF_PAIRS = WAYS | {
    'parts': ('code', 'positions that speak of the upper digit from the first source, the others from the second'),
    'embedding parts': ('embedding', 'the same with coordinates of the embedding'),
    'code of both': ('code', 'the code of the two digits put into one picture'),
    'embedding of both': ('embedding', 'the embedding of the two digits put into one picture'),
}
REAL = 'the digits put into one picture'  # row of the table


def of_pairs(config: ml_collections.ConfigDict) -> bool:
    """Whether the pictures are pairs of digits."""
    return config.encoded == 'halves' or config.encoder.data.name == 'digit_pairs'


def ways(config: ml_collections.ConfigDict) -> dict[str, tuple[str, str]]:
    """Those of `WAYS`, or of pairs of digits `WAYS_OF_PAIRS`, whose generator the config has."""
    known = WAYS_OF_PAIRS if of_pairs(config) else WAYS
    return {way: row for way, row in known.items() if row[0] in config.generators}


def draw(config: ml_collections.ConfigDict, workdir: pathlib.Path, encoder: Callable[[], Encoder | PartsEncoder],
         generator: Callable[[str], Generator], stores: Stores) -> Draws:
    """Compositions of pairs of held-out images of different classes, by all `ways`; one draw a seed, sources too.

    Args:
        encoder: called for the trained encoder.
        generator: called for the trained generator of a condition.
        stores: `train` and `heldout`, with soft codes.

    Returns:
        For each seed `sources` [P, 2], indices into the held-out set, and for each way uint8 [P, S, H, W, C].
    """
    return [stages.once(workdir / 'samples' / f'compositions_{seed}.npz',
                        functools.partial(_draw, config, encoder, generator, stores, seed))
            for seed in config.sample_seeds]


def _draw(config: ml_collections.ConfigDict, encoder: Callable[[], Encoder | PartsEncoder],
          generator: Callable[[str], Generator], stores: Stores, seed: int) -> dict[str, np.ndarray]:
    num_pairs, num_samples = config.composition.pairs, config.composition.samples
    labels = np.asarray(stores['heldout'].array('labels'))
    choose = digit_pairs.crossed if of_pairs(config) else pairs_of_classes
    sources = choose(labels, num_pairs, seed=seed)
    code_key, image_key = jax.random.split(jax.random.key(seed))
    conditions = code_conditions(config, encoder(), code_key, stores, sources)
    if 'embedding' in config.generators:
        conditions |= embedding_conditions(config, encoder(), stores, sources)
    out = {'sources': sources}
    for way, rows in conditions.items():
        x = generator(ways(config)[way][0]).sample(image_key, rows, len(rows), batch_size=config.sample_batch,
                                                   progress=bar(f'composed, {way}, seed {seed}', len(rows)))
        out[way] = np.asarray(to_uint8(x)).reshape(num_pairs, num_samples, *x.shape[1:])
    return out


def code_conditions(config: ml_collections.ConfigDict, encoder: Encoder | PartsEncoder, key: jax.Array, stores: Stores,
                    sources: np.ndarray) -> dict[str, np.ndarray]:
    """Codes int32 [P * S, L] of every way that composes codes, for `sources` [P, 2]."""
    num_samples, images = config.composition.samples, np.asarray(stores['heldout'].array('images'))
    sems = encoder.encode_images(list(images[sources.ravel()]), temperature=config.composition.temperature,
                                 outputs=('sem',))['sem']
    sems = sems.reshape(*sources.shape, *sems.shape[1:])

    def composed(method: str, weights: np.ndarray | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(codes_lib.compose(
            jax.random.fold_in(key, i), of_pair, num_samples, method=method, weights=weights))
            for i, of_pair in enumerate(sems)])
    out = {method: composed(method) for method in codes_lib.COMPOSITIONS}
    if of_pairs(config):
        tokens = codes_lib.one_hot(np.asarray(stores['train'].array('codes')), config.encoder.model.vocab_size)
        out['parts'] = composed('positions', digits_that_explain(tokens, stores).astype(np.float64))
        both = encoder.encode_images(list(put_together(images, sources)), outputs=('codes',))['codes']
        out['code of both'] = np.repeat(both, num_samples, axis=0)
    return out


def embedding_conditions(config: ml_collections.ConfigDict, encoder: Encoder | PartsEncoder, stores: Stores,
                         sources: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings float32 [P * S, D] of every way that composes embeddings, for `sources` [P, 2]."""
    embeddings = np.asarray(stores['heldout'].array('embeddings'))[sources]
    out = {'embedding': embeddings.mean(1)}
    if of_pairs(config):
        upper, _ = digits_that_explain(np.asarray(stores['train'].array('embeddings'))[..., None], stores)
        out['embedding parts'] = np.where(upper, embeddings[:, 0], embeddings[:, 1])
        pictures = put_together(np.asarray(stores['heldout'].array('images')), sources)
        out['embedding of both'] = encoder.encode_images(list(pictures), outputs=('embeddings',))['embeddings']
    return {way: np.repeat(rows, config.composition.samples, axis=0) for way, rows in out.items()}


def digits_that_explain(features: np.ndarray, stores: Stores) -> np.ndarray:
    """bool [2, P]: whether the upper digit or the lower one explains more of each place of the training images'
    `features` [N, P, F]."""
    labels = np.asarray(stores['train'].array('labels'))
    return belonging(features, np.stack(np.divmod(labels, 10), 1))


def put_together(images: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Pictures [P, H, W, C] of the upper digit of the first of `sources` [P, 2] and the lower digit of the second."""
    return digit_pairs.cross(images[sources[:, 0]], images[sources[:, 1]])


def pairs_of_classes(labels: np.ndarray, num: int, *, seed: int = 0) -> np.ndarray:
    """int [num, 2]: pairs of rows with different labels, the same ones for the same seed."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < num:
        a, b = rng.integers(len(labels), size=2)
        if labels[a] != labels[b]:
            pairs.append((a, b))
    return np.array(pairs)


def measure(config: ml_collections.ConfigDict, judge: evaluation.AnyJudge, draws: Draws,
            heldout: Mapping[str, np.ndarray], train_images: np.ndarray) -> dict[str, dict[str, float]]:
    """The table of compositions: a row a way, and of pairs of digits `REAL`, what the judge can reach.

    Args:
        draws: of `draw`.
        heldout: `images`, `labels`.
    """
    seen = evaluation.composition_of_parts if isinstance(judge, PictureJudge) else evaluation.composition

    def row(images: np.ndarray, sources: np.ndarray) -> dict[str, float]:
        first, second = heldout['labels'][sources].repeat(len(images) // len(sources), 0).T
        return seen(judge, images, first, second, train_images)
    rows = {way: mean_and_spread([row(drawn[way].reshape(-1, *drawn[way].shape[2:]), drawn['sources'])
                                  for drawn in draws]) for way in ways(config)}
    if of_pairs(config):
        rows[REAL] = mean_and_spread([row(put_together(heldout['images'], drawn['sources']), drawn['sources'])
                                      for drawn in draws])
    return rows


def write(page: Any, config: ml_collections.ConfigDict, rows: list[dict[str, object]], drawn: dict[str, np.ndarray],
          images: np.ndarray, *, scale: int) -> None:
    """The page's section on compositions: pictures of one draw, beside their sources, and the table `rows`."""
    page.heading('Compositions')
    count = min(12, config.composition.pairs)
    for way, (_, caption) in ways(config).items():
        shown = np.concatenate([images[drawn['sources'][:count]], drawn[way][:count]], axis=1)
        page.images(shown.reshape(-1, *shown.shape[2:]), shown.shape[1], f'two sources, then {caption}', scale=scale)
    page.table(rows)
    if of_pairs(config):
        page.text('Share of composed images on which a separate classifier of single digits reads both digits of the '
                  'first source, of the second, of either; crossed: the upper digit of the first and the lower one of '
                  'the second; both: that, or the other way round. No such pair of digits was in the training set. ')
    else:
        page.text('Share of composed images whose most likely class, to the separate classifier, is that of the first '
                  'source, of the second, of either; both: its two most likely classes are the two sources.')
    page.text('Nearest train: as above; nearest features: the same distance in the last hidden layer of the '
              'classifier.')

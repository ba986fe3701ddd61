"""Images composed of two held-out ones, by their codes and by their embeddings (`experiments.quickstarts.dlc`).

Of single pictures a composition is something between two classes. Of pictures that show two attributes, a `grids.Grid`,
it can show both sources: an attribute of each. There the sources are chosen so that this combination is in no training
set.
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
from experiments.dlc.grids import DIGITS, grid_of
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
WAYS_OF_GRIDS = WAYS | {
    'parts': ('code', 'positions that speak of the {first} from the first source, the others from the second'),
    'embedding parts': ('embedding', 'the same with coordinates of the embedding'),
    'code of both': ('code', 'the code of a real picture of what is asked for'),
    'embedding of both': ('embedding', 'the embedding of a real picture of what is asked for'),
}
REAL = 'real pictures of what is asked for'  # row of the table


def ways(config: ml_collections.ConfigDict) -> dict[str, tuple[str, str]]:
    """Those of `WAYS`, or of a grid `WAYS_OF_GRIDS`, whose generator the config has."""
    grid = grid_of(config)
    known = {way: (generator, words.format(first=grid.first)) for way, (generator, words) in WAYS_OF_GRIDS.items()
             } if grid else WAYS
    return {way: row for way, row in known.items() if row[0] in config.generators}


def of_sources(config: ml_collections.ConfigDict, stores: Stores, array: str) -> np.ndarray:
    """An array of the pictures that are composed: held-out ones, or of a grid those of its split."""
    grid = grid_of(config)
    return np.asarray(stores[grid.sources if grid else 'heldout'].array(array))


def draw(config: ml_collections.ConfigDict, workdir: pathlib.Path, encoder: Callable[[], Encoder | PartsEncoder],
         generator: Callable[[str], Generator], stores: Stores) -> Draws:
    """Compositions of pairs of images of different classes, by all `ways`; one draw a seed, sources too.

    Args:
        encoder: called for the trained encoder.
        generator: called for the trained generator of a condition.
        stores: `train` and `heldout`, with soft codes.

    Returns:
        For each seed `sources` [P, 2], indices into `of_sources`, and for each way uint8 [P, S, H, W, C].
    """
    return [stages.once(workdir / 'samples' / f'compositions_{seed}.npz',
                        functools.partial(_draw, config, encoder, generator, stores, seed))
            for seed in config.sample_seeds]


def _draw(config: ml_collections.ConfigDict, encoder: Callable[[], Encoder | PartsEncoder],
          generator: Callable[[str], Generator], stores: Stores, seed: int) -> dict[str, np.ndarray]:
    num_pairs, num_samples = config.composition.pairs, config.composition.samples
    grid = grid_of(config)
    sources = (grid.crossed if grid else pairs_of_classes)(of_sources(config, stores, 'labels'), num_pairs, seed=seed)
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
    num_samples, images = config.composition.samples, of_sources(config, stores, 'images')
    sems = encoder.encode_images(list(images[sources.ravel()]), temperature=config.composition.temperature,
                                 outputs=('sem',))['sem']
    sems = sems.reshape(*sources.shape, *sems.shape[1:])

    def composed(method: str, weights: np.ndarray | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(codes_lib.compose(
            jax.random.fold_in(key, i), of_pair, num_samples, method=method, weights=weights))
            for i, of_pair in enumerate(sems)])
    out = {method: composed(method) for method in codes_lib.COMPOSITIONS}
    if grid_of(config):
        tokens = codes_lib.one_hot(np.asarray(stores['train'].array('codes')), config.encoder.model.vocab_size)
        out['parts'] = composed('positions', what_explains(config, tokens, stores).astype(np.float64))
        both = encoder.encode_images(list(asked_for(config, stores, sources)), outputs=('codes',))['codes']
        out['code of both'] = np.repeat(both, num_samples, axis=0)
    return out


def embedding_conditions(config: ml_collections.ConfigDict, encoder: Encoder | PartsEncoder, stores: Stores,
                         sources: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings float32 [P * S, D] of every way that composes embeddings, for `sources` [P, 2]."""
    embeddings = of_sources(config, stores, 'embeddings')[sources]
    out = {'embedding': embeddings.mean(1)}
    if grid_of(config):
        first, _ = what_explains(config, np.asarray(stores['train'].array('embeddings'))[..., None], stores)
        out['embedding parts'] = np.where(first, embeddings[:, 0], embeddings[:, 1])
        pictures = asked_for(config, stores, sources)
        out['embedding of both'] = encoder.encode_images(list(pictures), outputs=('embeddings',))['embeddings']
    return {way: np.repeat(rows, config.composition.samples, axis=0) for way, rows in out.items()}


def what_explains(config: ml_collections.ConfigDict, features: np.ndarray, stores: Stores) -> np.ndarray:
    """bool [2, P]: whether the first attribute or the second one explains more of each place of the training images'
    `features` [N, P, F]."""
    return belonging(features, grid_of(config).attributes(stores['train'].array('labels')))


def asked_for(config: ml_collections.ConfigDict, stores: Stores, sources: np.ndarray) -> np.ndarray:
    """Real pictures [P, H, W, C] of the first attribute of the first of `sources` [P, 2] and the second of the second:
    two digits put together, or one of the held-out pictures.

    Raises:
        ValueError: that picture is not among them.
    """
    grid, images = grid_of(config), of_sources(config, stores, 'images')
    if grid is DIGITS:
        return digit_pairs.cross(images[sources[:, 0]], images[sources[:, 1]])
    shown = grid.attributes(of_sources(config, stores, 'labels'))
    wanted = grid.label(shown[sources[:, 0], 0], shown[sources[:, 1], 1])
    row_of = {label: row for row, label in enumerate(np.asarray(stores['heldout'].array('labels')).tolist())}
    if missing := sorted({*wanted.tolist()} - row_of.keys()):
        raise ValueError(f"encoder.data.path={config.encoder.data.path}: the held-out picture of "
                         f"{stores['heldout'].meta['class_names'][missing[0]]!r} could not be read; fetch it again")
    return np.asarray(stores['heldout'].array('images'))[[row_of[label] for label in wanted.tolist()]]


def pairs_of_classes(labels: np.ndarray, num: int, *, seed: int = 0) -> np.ndarray:
    """int [num, 2]: pairs of rows with different labels, the same ones for the same seed."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < num:
        a, b = rng.integers(len(labels), size=2)
        if labels[a] != labels[b]:
            pairs.append((a, b))
    return np.array(pairs)


def measure(config: ml_collections.ConfigDict, judge: evaluation.AnyJudge, draws: Draws,
            stores: Stores) -> dict[str, dict[str, float]]:
    """The table of compositions: a row a way, and of a grid `REAL`, what the judge can reach.

    Args:
        draws: of `draw`.
    """
    grid = grid_of(config)
    seen = evaluation.composition_of_attributes if grid else evaluation.composition
    labels, train_images = of_sources(config, stores, 'labels'), np.asarray(stores['train'].array('images'))

    def row(images: np.ndarray, sources: np.ndarray) -> dict[str, float]:
        first, second = labels[sources].repeat(len(images) // len(sources), 0).T
        return seen(judge, images, first, second, train_images)
    rows = {way: mean_and_spread([row(drawn[way].reshape(-1, *drawn[way].shape[2:]), drawn['sources'])
                                  for drawn in draws]) for way in ways(config)}
    if grid:
        rows[REAL] = mean_and_spread([row(asked_for(config, stores, drawn['sources']), drawn['sources'])
                                      for drawn in draws])
    return rows


def write(page: Any, config: ml_collections.ConfigDict, rows: list[dict[str, object]], drawn: dict[str, np.ndarray],
          stores: Stores, *, scale: int) -> None:
    """The page's section on compositions: pictures of one draw, beside their sources, and the table `rows`."""
    page.heading('Compositions')
    images = of_sources(config, stores, 'images')
    count, grid = min(12, config.composition.pairs), grid_of(config)
    for way, (_, caption) in ways(config).items():
        shown = np.concatenate([images[drawn['sources'][:count]], drawn[way][:count]], axis=1)
        page.images(shown.reshape(-1, *shown.shape[2:]), shown.shape[1], f'two sources, then {caption}', scale=scale)
    page.table(rows)
    if grid:
        page.text(f'Share of composed images that show, to the judge, the {grid.first} and the {grid.second} of the '
                  f'first source, of the second, of either; of first: the {grid.first} of the first; of second: the '
                  f'{grid.second} of the second; crossed: both of these; both: that, or the other way round. No such '
                  'combination was in the training set. ')
    else:
        page.text('Share of composed images whose most likely class, to the separate classifier, is that of the first '
                  'source, of the second, of either; both: its two most likely classes are the two sources.')
    page.text('Nearest train: as above; nearest features: the same distance in the features of the judge.')

"""A ranker of images by captions, with which the game measures what the speaker's English says (arXiv 2003.12694).

It has a vocabulary, text and image features of its own; the speaker's words are read by that vocabulary.
"""
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.translation import agent as agents
from experiments.rlhf.translation import data as data_lib
from experiments.rlhf.translation import images as images_lib
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, placement, runs
from experiments.runtime.evaluation import Evaluation, full_batches
from experiments.runtime.experiment import Experiment
from experiments.runtime.training import training
from rlhf_jax.losses import ranking
from rlhf_jax.models import image_ranker
from rlhf_jax.tasks import translation

LANGUAGES = ('en',)


def make_model(config: ml_collections.ConfigDict) -> image_ranker.ImageRanker:
    """The vocabulary has `vocabulary.size` rows, so that a model is built without its text."""
    return modules.build_dataclass(image_ranker.ImageRanker, 'model',
                                   dict(config.model) | {'vocab_size': config.vocabulary.size})


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    """The experiment that trains a ranker.

    Raises:
        ValueError: settings that cannot work.
    """
    if config.accumulate != 1:
        raise ValueError(f'accumulate={config.accumulate}: the rivals of an image are those of its whole batch; set it '
                         'to 1')
    if config.loss.margin < 0:
        raise ValueError(f'loss.margin={config.loss.margin} must not be negative')
    model, unit, split = make_model(config), mesh_lib.batch_shards(mesh), config.data.train

    def loss(params, state, batch, rng):
        tokens, lengths = translation.source(batch['en'], batch['en_length'])
        rngs = {'dropout': rng} if config.model.dropout else None
        scores = model.apply({'params': params}, tokens, lengths, batch['image'], train=rngs is not None, rngs=rngs)
        return ranking.hardest_negatives(scores, margin=config.loss.margin)

    def init_params(key):
        tokens, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
        return model.init(key, tokens, lengths, jnp.zeros((1, model.features)))['params']

    trained = training(config, mesh, init_params, loss, averaged=False)

    init, warm_start = agents.carrying_vocabulary(config, LANGUAGES, trained.init)

    def features(split: str) -> np.ndarray:
        return images_lib.features(images_lib.folder_of(config), split, images_lib.captions_of(config, split),
                                   model.features)

    def check():
        for name in (split, *((config.data.valid,) if config.evaluation.every else ())):
            features(name)

    def open_batches():
        corpus = data_lib.open_corpus(config, split, LANGUAGES)
        return data_lib.LengthBatches(corpus, data_lib.batch_shapes(config, unit), seed=config.seed,
                                      share=placement.share_of(mesh), beside={'image': features(split)})

    def hooks(writer):
        return [HeldOut(config, model, features(config.data.valid), writer)] if config.evaluation.every else []

    spec = agents.batch_spec(config, LANGUAGES, unit)
    spec['image'] = jax.ShapeDtypeStruct((spec['en'].shape[0], model.features), jnp.float32)
    return Experiment(init, loss, trained.step, image_ranker.PARTITION_RULES, spec, open_batches, check=check,
                      warm_start=warm_start, hooks=hooks)


class Ranking:
    """How well sentences find their images under a ranker; compiled once.

    Args:
        config: of the run that trained it.
        model: its module.
        features: of the images, float32 [N, F].
    """

    def __init__(self, config: ml_collections.ConfigDict, model: image_ranker.ImageRanker, features: np.ndarray):
        self._vocabulary = data_lib.vocabularies(config, LANGUAGES)['en']
        self._longest, self._rows, self._features = config.data.lengths[-1], config.evaluation.rows, features
        self._sentences = jax.jit(lambda params, tokens, lengths: model.apply(
            {'params': params}, *translation.source(tokens, lengths), method='sentences'))
        self._images = jax.jit(lambda params, features: model.apply({'params': params}, features, method='images'))

    def __call__(self, params: Any, sentences: Sequence[str]) -> dict[str, float]:
        """See `images.measures`.

        Args:
            sentences: of the first images, in their order: words separated by spaces, perhaps none. Longer ones than
                the ranker was trained on are cut.
        """
        tokens, lengths = data_lib.encoded(self._vocabulary, sentences, self._longest)
        of_sentences, of_images = [], []
        for chosen, real in full_batches(len(sentences), self._rows):
            of_sentences.append(np.asarray(self._sentences(params, tokens[chosen], lengths[chosen]))[:real])
            of_images.append(np.asarray(self._images(params, self._features[chosen]))[:real])
        return images_lib.measures(images_lib.ranks(np.concatenate(of_sentences), np.concatenate(of_images)))


class HeldOut(Evaluation):
    """How well people's captions of `data.valid` find their images, every `evaluation.every` steps: what is to be
    expected of a speaker at best."""

    def __init__(self, config: ml_collections.ConfigDict, model: image_ranker.ImageRanker, features: np.ndarray,
                 writer: Any):
        super().__init__(config.evaluation.every, None, writer)
        corpus = data_lib.open_corpus(config, config.data.valid, LANGUAGES, most=config.evaluation.sentences)
        self._ranking, self._sentences = Ranking(config, model, features), corpus.words['en']

    def measure(self, state: Any) -> dict[str, float]:
        return self._ranking(state.params, self._sentences)


def load(workdir: str | os.PathLike, captions: Sequence[str], split: str, images: str, made_up: bool,
         ) -> tuple[Ranking, Any]:
    """The ranking of a split's images under the run in `workdir`, and its newest parameters, to be given to it.

    Args:
        captions: all English lines of the split.
        images: folder of its features; '': that of the run.
        made_up: whether it is a split of the generated corpus.

    Raises:
        FileNotFoundError, ValueError: no such run there, no checkpoint yet, its text has changed since, or features
            that do not fit.
    """
    config = runs.read_config(workdir, 'translation_ranker')
    folder = images or images_lib.folder_of(config)
    if bool(folder) == made_up:
        raise ValueError(f'evaluation.ranker={workdir}: ' + (
            'the images of the generated corpus (data.path=\'\') are made up, and it has seen others; give a ranker of '
            'that corpus' if made_up else
            'it has seen the made-up images of the generated corpus; give a ranker of image features'))
    state = agents.load_state(workdir, config, build)
    agents.check_vocabulary(str(workdir), state.extra['vocabulary'], config, LANGUAGES)
    model = make_model(config)
    return Ranking(config, model, images_lib.features(folder, split, captions, model.features)), state.params

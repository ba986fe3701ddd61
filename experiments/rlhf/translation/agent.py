"""An agent of the translation game, pretrained on pairs: French to English (the speaker) or English to German.

Cross entropy over the tokens of the target, whatever the padding (arXiv 2003.12694 §5; the published code averaged over
padding too).
"""
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.translation import data as data_lib
from experiments.rlhf.translation import evaluation
from experiments.runtime import config_files, modules, placement, runs
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from experiments.runtime.training import training
from rlhf_jax import masked, responses
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models import seq2seq
from rlhf_jax.tasks import translation

Array = jax.Array
PAIRS = {'speaker': ('fr', 'en'), 'listener': ('en', 'de')}


def make_agent(config: ml_collections.ConfigDict) -> seq2seq.Seq2Seq:
    """All vocabularies have `vocabulary.size` rows, so that a model is built without its text."""
    sizes = dict(source_vocab=config.vocabulary.size, target_vocab=config.vocabulary.size)
    return modules.build_dataclass(seq2seq.Seq2Seq, 'model', dict(config.model) | sizes)


def init_params(model: seq2seq.Seq2Seq, key: Array) -> Any:
    blank = jnp.zeros((1, 3), jnp.int32)
    return model.init(key, blank, blank == 0, blank)['params']


def source(batch: dict[str, Array], language: str) -> tuple[Array, Array]:
    """What an encoder reads of a batch and which of it counts: int [N, T - 1], bool [N, T - 1]."""
    tokens, lengths = translation.source(batch[language], batch[f'{language}_length'])
    return tokens, responses.mask(lengths, tokens.shape[-1])


def target_logprobs(model: seq2seq.Seq2Seq, params: Any, read: tuple[Array, Array], batch: dict[str, Array],
                    language: str, dropout: Array | None = None) -> tuple[Array, Array]:
    """Teacher-forced log-probabilities of a batch's `language`, and which of them count: 2 x [N, T - 1].

    Args:
        read: source and its mask.
        dropout: key; None: off.
    """
    tokens = batch[language]
    _, targets, mask = translation.target(tokens, batch[f'{language}_length'])
    rngs = None if dropout is None else {'dropout': dropout}
    logits, _ = model.apply({'params': params}, *read, tokens, train=dropout is not None, rngs=rngs)
    return token_logprobs(logits, targets), mask


def cross_entropy(logprobs: Array, mask: Array) -> Array:
    """Mean over the tokens that count, in nats."""
    return -masked.mean(logprobs, mask)


def batch_spec(config: ml_collections.ConfigDict, languages: tuple[str, ...], unit: int) -> dict:
    """The largest of a run's batches; a step compiles anew for each of `data.lengths`."""
    rows, length = data_lib.batch_shapes(config, unit)[-1]
    spec = {language: jax.ShapeDtypeStruct((rows, length), jnp.int32) for language in languages}
    return spec | {f'{language}_length': jax.ShapeDtypeStruct((rows,), jnp.int32) for language in languages}


def whole_batches(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for microbatches."""
    if config.accumulate != 1:
        raise ValueError(f'accumulate={config.accumulate}: losses are means over the tokens of a batch, and its '
                         'microbatches have more and fewer of them; set it to 1')


def open_batches(config: ml_collections.ConfigDict, languages: tuple[str, ...], unit: int,
                 share: placement.Share = placement.WHOLE) -> data_lib.LengthBatches:
    corpus = data_lib.open_corpus(config, config.data.train, languages)
    return data_lib.LengthBatches(corpus, data_lib.batch_shapes(config, unit), seed=config.seed, share=share)


def checksums(config: ml_collections.ConfigDict, languages: tuple[str, ...]) -> Array:
    """uint32, of the vocabulary of each language: a run carries them, for its weights mean nothing without."""
    made = data_lib.vocabularies(config, languages)
    return jnp.array([made[language].checksum for language in languages], jnp.uint32)


def carrying_vocabulary(config: ml_collections.ConfigDict, languages: tuple[str, ...],
                        init: Callable[[Array], TrainState]) -> tuple[Callable[[Array], TrainState],
                                                                      Callable[[TrainState], TrainState]]:
    """`init` of a state that carries the `checksums` of a run, as zeros, and the warm start that writes them: only that
    one reads the text."""
    def blank(key: Array) -> TrainState:
        return init(key).replace(extra={'vocabulary': jnp.zeros(len(languages), jnp.uint32)})

    def warm_start(state: TrainState) -> TrainState:
        return state.replace(extra={'vocabulary': checksums(config, languages)})
    return blank, warm_start


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    whole_batches(config)
    languages = tuple(config.languages)
    if languages not in PAIRS.values():
        raise ValueError(f'languages={languages} is not one of {tuple(PAIRS.values())}')
    model, (first, second) = make_agent(config), languages
    unit = mesh_lib.batch_shards(mesh)

    def loss(params, state, batch, rng):
        logprobs, mask = target_logprobs(model, params, source(batch, first), batch, second,
                                         rng if config.model.dropout else None)
        value = cross_entropy(logprobs, mask)
        return value, jax.lax.stop_gradient({'perplexity': jnp.exp(value), 'tokens': mask.sum(dtype=jnp.float32)})

    trained = training(config, mesh, lambda key: init_params(model, key), loss, averaged=False)

    init, warm_start = carrying_vocabulary(config, languages, trained.init)

    def hooks(writer):
        return evaluation.hooks(config, writer, lambda: evaluation.AgentEvaluation(config, model))

    return Experiment(init, loss, trained.step, seq2seq.PARTITION_RULES, batch_spec(config, languages, unit),
                      lambda: open_batches(config, languages, unit, placement.share_of(mesh)),
                      check=lambda: evaluation.check(config, languages), warm_start=warm_start, hooks=hooks)


def load(workdir: str | os.PathLike, name: str, config: ml_collections.ConfigDict) -> Any:
    """Newest weights of a pretrained agent, to play as `name` ('speaker' or 'listener') in a game of `config`.

    Raises:
        ValueError: `workdir` holds no such agent, one of other languages, size or vocabulary, or no checkpoint yet.
    """
    ran = config_files.read(workdir)
    if ran.get('experiment') != 'translation_agent' or tuple(ran.languages) != PAIRS[name]:
        what = f'{ran.get("experiment")} {" to ".join(ran.get("languages", ()))}'.strip()
        raise ValueError(f'{name}={workdir}: holds a run of {what}; give one of translation_agent '
                         f'{" to ".join(PAIRS[name])}')
    for field in ('model.width', 'vocabulary.size'):
        group, key = field.split('.')
        if ran[group][key] != config[group][key]:
            raise ValueError(f'{name}={workdir}: was trained with {field}={ran[group][key]}, not {config[group][key]}')
    state = load_state(workdir, ran, build)
    check_vocabulary(f'{name}={workdir}', state.extra['vocabulary'], config, PAIRS[name])
    return state.params


def load_state(workdir: str | os.PathLike, config: ml_collections.ConfigDict, build_experiment: Any,
               step: int | None = None) -> TrainState:
    """The newest checkpoint of a run of `config`, or that of `step`, on the first device.

    Raises:
        ValueError: there is none yet, or not that one.
    """
    like = jax.eval_shape(runs.on_one_device(config, build_experiment).init, jax.random.key(0))
    return runs.restore(workdir, like, step=step)


def check_vocabulary(name: str, saved: Array, config: ml_collections.ConfigDict, languages: tuple[str, ...]) -> None:
    """Raises a ValueError if the run `name` has learnt other vocabularies than `config` makes of its text."""
    now = np.asarray(checksums(config, languages))
    for language, a, b in zip(languages, np.asarray(saved), now):
        if a != b:
            raise ValueError(f'{name}: was trained on another {language} vocabulary than `vocabulary` and `data` of '
                             'this config make; give both the same vocabulary.paths and settings')

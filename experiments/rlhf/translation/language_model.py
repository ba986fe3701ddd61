"""A language model of English captions, by which the fluency of the speaker's English is measured (arXiv 2003.12694).

It has a vocabulary and text of its own; the speaker's words are read by that vocabulary.
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
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import modules, placement, runs
from experiments.runtime.evaluation import Evaluation, full_batches
from experiments.runtime.experiment import Experiment
from experiments.runtime.training import training
from rlhf_jax import masked
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models import lstm
from rlhf_jax.tasks import translation

Array = jax.Array
LANGUAGES = ('en',)


def make_model(config: ml_collections.ConfigDict) -> lstm.LSTMLanguageModel:
    """The vocabulary has `vocabulary.size` rows, so that a model is built without its text."""
    return modules.build_dataclass(lstm.LSTMLanguageModel, 'model',
                                   dict(config.model) | {'vocab_size': config.vocabulary.size})


def logprobs_of(model: lstm.LSTMLanguageModel, params: Any, tokens: Array, lengths: Array,
                dropout: Array | None = None) -> tuple[Array, Array]:
    """Log-probabilities of the tokens after BOS, and which of them count, EOS included: 2 x [N, T - 1].

    Args:
        tokens, lengths: int32 [N, T], BOS first; [N], BOS and EOS counted.
        dropout: key; None: off.
    """
    _, targets, mask = translation.target(tokens, lengths)
    rngs = None if dropout is None else {'dropout': dropout}
    logits = model.apply({'params': params}, tokens, train=dropout is not None, rngs=rngs)
    return token_logprobs(logits, targets), mask


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Experiment:
    agents.whole_batches(config)
    model, unit = make_model(config), mesh_lib.batch_shards(mesh)

    def loss(params, state, batch, rng):
        logprobs, mask = logprobs_of(model, params, batch['en'], batch['en_length'],
                                     rng if config.model.dropout else None)
        value = agents.cross_entropy(logprobs, mask)
        return value, jax.lax.stop_gradient({'perplexity': jnp.exp(value), 'tokens': mask.sum(dtype=jnp.float32)})

    def init_params(key):
        return model.init(key, jnp.zeros((1, 3), jnp.int32))['params']

    trained = training(config, mesh, init_params, loss, averaged=False)

    init, warm_start = agents.carrying_vocabulary(config, LANGUAGES, trained.init)

    def hooks(writer):
        return [HeldOut(config, model, writer)] if config.evaluation.every else []

    return Experiment(init, loss, trained.step, lstm.PARTITION_RULES, agents.batch_spec(config, LANGUAGES, unit),
                      lambda: agents.open_batches(config, LANGUAGES, unit, placement.share_of(mesh)),
                      warm_start=warm_start, hooks=hooks)


class Fluency:
    """Sentences -> mean nats a token, EOS counted, under a language model; compiled once.

    Args:
        config: of the run that trained it.
        model: its module.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: lstm.LSTMLanguageModel):
        self._vocabulary = data_lib.vocabularies(config, LANGUAGES)['en']
        self._longest, self._rows = config.data.lengths[-1], config.evaluation.rows

        def totals(params, tokens, lengths):
            logprobs, mask = logprobs_of(model, params, tokens, lengths)
            return masked.total(-logprobs, mask, -1), mask.sum(-1)
        self._run = jax.jit(totals)

    def __call__(self, params: Any, sentences: Sequence[str]) -> float:
        """`sentences`: words separated by spaces, perhaps none. Longer ones than the model was trained on are cut."""
        tokens, lengths = data_lib.encoded(self._vocabulary, sentences, self._longest)
        nll, count = 0.0, 0
        for chosen, real in full_batches(len(sentences), self._rows):
            of_rows, tokens_of_rows = self._run(params, tokens[chosen], lengths[chosen])
            nll += float(np.asarray(of_rows)[:real].sum())
            count += int(np.asarray(tokens_of_rows)[:real].sum())
        return nll / count


class HeldOut(Evaluation):
    """Mean nats a token of `data.valid`, `nll_en`, every `evaluation.every` steps."""

    def __init__(self, config: ml_collections.ConfigDict, model: lstm.LSTMLanguageModel, writer: Any):
        super().__init__(config.evaluation.every, None, writer)
        corpus = data_lib.open_corpus(config, config.data.valid, LANGUAGES, most=config.evaluation.sentences)
        self._fluency, self._sentences = Fluency(config, model), corpus.words['en']

    def measure(self, state: Any) -> dict[str, float]:
        return {'nll_en': self._fluency(state.params, self._sentences)}


def load(workdir: str | os.PathLike) -> tuple[Fluency, Any]:
    """The fluency under the run in `workdir`, and its newest parameters, to be given to it.

    Raises:
        ValueError: no such run there, no checkpoint yet, or its text has changed since.
    """
    config = runs.read_config(workdir, 'translation_language_model')
    state = agents.load_state(workdir, config, build)
    agents.check_vocabulary(str(workdir), state.extra['vocabulary'], config, LANGUAGES)
    return Fluency(config, make_model(config)), state.params

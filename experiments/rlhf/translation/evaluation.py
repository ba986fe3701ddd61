"""Greedy translation of a held-out split and its BLEU: of the German, the task; of the English, the drift.

`reward_de` is what the game rewards, the mean log-likelihood of people's German in nats a token, after greedy English;
`fluency_en`, where `evaluation.language_model` names one, is the mean of nats a token of the English under it;
`image_...`, where `evaluation.ranker` names one, say how well the English finds the images of the text (`images.py`).
`bleu_*` is `bleu.legacy` on tokenized, lower-cased text, as the game has been reported; `sacrebleu_*`, where sacrebleu
is installed, is lower-cased BLEU of words joined by spaces against the text as it was written.
"""
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.rlhf.translation import data as data_lib
from experiments.runtime.evaluation import Evaluation, full_batches
from experiments.runtime.state import TrainState
from rlhf_jax import masked, responses
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models.seq2seq import Seq2Seq
from rlhf_jax.tasks import bleu, translation

Array = jax.Array


class _Scores:
    """Translates `data.valid`, or another split, with parameters it is called with; compiled once.

    Args:
        config: of an agent or a game.
        model: of every agent.
        languages: source first; one more for each agent in turn.
        split: None: `data.valid`.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: Seq2Seq, languages: Sequence[str],
                 split: str | None = None):
        self.languages = tuple(languages)
        self.corpus = data_lib.open_corpus(config, split or config.data.valid, self.languages,
                                           most=config.evaluation.sentences)
        self._vocabularies = data_lib.vocabularies(config, self.languages)
        self._rows, self._model, self._message = config.evaluation.rows, model, config.message
        self._fluency = open_fluency(config, self.languages)
        self._ranking = open_ranking(config, self.languages, split)
        self._run = jax.jit(self._translate)

    def _agents(self, params: Any) -> list[Any]:
        """Parameters of the agents in turn."""
        raise NotImplementedError

    def _translate(self, params: Any, batch: dict[str, Array]) -> dict[str, Array]:
        """What each agent says, and how likely people's sentence is under the first, and of two under the second, which
        reads what the first has said: [N, ...]."""
        first = self.languages[0]
        tokens, lengths = translation.source(batch[first], batch[f'{first}_length'])
        read = tokens, responses.mask(lengths, tokens.shape[-1])
        translated = {}
        for agent, language in zip(self._agents(params), self.languages[1:]):
            logits, _ = self._model.apply({'params': agent}, *read, batch[language])
            _, wanted, mask = translation.target(batch[language], batch[f'{language}_length'])
            picked = token_logprobs(logits, wanted)
            if translated:
                translated['reward'] = translation.reward(picked, mask)
            else:
                translated |= {'nll': masked.total(-picked, mask, -1), 'count': mask.sum(-1)}
            message = self._model.apply({'params': agent}, *read, max_length=self._message.max_length,
                                        min_length=self._message.min_length, method='send')
            translated[language], read = message.tokens, (message.tokens, message.mask)
        return translated

    def translate(self, params: Any) -> dict[str, Any]:
        """{language: [sentence]}, words separated by spaces; `nll` and `count` [N] of the first agent's target; of two
        agents, `reward` [N]."""
        count = len(self.corpus.plain[self.languages[0]])
        batch = {language: self.corpus.tokens[language] for language in self.languages}
        batch |= {f'{language}_length': self.corpus.lengths[language] for language in self.languages}
        parts = []
        for rows, _ in full_batches(count, self._rows):
            parts.append(jax.tree.map(np.asarray, self._run(params, {name: x[rows] for name, x in batch.items()})))
        whole = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        return {name: [self._vocabularies[name].decode(row) for row in x.tolist()] if name in self._vocabularies else x
                for name, x in whole.items()}

    def __call__(self, params: Any, *, sacrebleu: bool = False) -> dict[str, float]:
        """Scores by name: `bleu_X` of every language X that is translated to; `nll_Y`, in nats a token of what people
        wrote, under the first agent; of two agents `reward_de`; `fluency_en` where a language model is named,
        `image_...` where a ranker is; with `sacrebleu`, also `sacrebleu_X` where it is installed."""
        translated = self.translate(params)
        scores = {}
        for language in self.languages[1:]:
            scores[f'bleu_{language}'] = bleu.legacy(translated[language], self.corpus.words[language]).score
            if sacrebleu:
                try:
                    score, self.signature = bleu.sacrebleu(translated[language], self.corpus.plain[language],
                                                           lowercase=True)
                    scores[f'sacrebleu_{language}'] = score
                except ImportError:
                    pass
        if self._fluency:
            measure, weights = self._fluency
            scores['fluency_en'] = measure(weights, translated['en'])
        if self._ranking:
            measure, weights = self._ranking
            scores |= measure(weights, translated['en'])
        scores[f'nll_{self.languages[1]}'] = float(translated['nll'].sum() / translated['count'].sum())
        if 'reward' in translated:
            scores['reward_de'] = float(translated['reward'].mean())
        return scores

    signature = ''  # of sacrebleu


def open_fluency(config: ml_collections.ConfigDict, languages: Sequence[str]) -> Any:
    """Measure and weights of `evaluation.language_model`, or None where it names none.

    Raises:
        ValueError: it is of no use to agents of these `languages`, or no such run.
    """
    workdir = _reader_of_english(config, 'language_model', languages)
    if not workdir:
        return None
    from experiments.rlhf.translation import language_model  # deferred: it is trained as the agents are
    return language_model.load(workdir)


def open_ranking(config: ml_collections.ConfigDict, languages: Sequence[str], split: str | None = None) -> Any:
    """Measure and weights of `evaluation.ranker` on the images of `split` (None: `data.valid`), or None where it names
    none.

    Raises:
        FileNotFoundError, ValueError: it is of no use to agents of these `languages`, no such run, or images that do
            not fit.
    """
    workdir, folder = _reader_of_english(config, 'ranker', languages), config.evaluation.get('images', '')
    if folder and not workdir:
        raise ValueError(f'evaluation.images={folder}: features are for a ranker; name one in evaluation.ranker, or '
                         'leave it empty')
    if not workdir:
        return None
    from experiments.rlhf.translation import images, ranker  # deferred: it is trained as the agents are
    split = split or config.data.valid
    return ranker.load(workdir, images.captions_of(config, split), split, folder, made_up=not config.data.path)


def _reader_of_english(config: ml_collections.ConfigDict, name: str, languages: Sequence[str]) -> str:
    """The work directory that `evaluation.name` gives, or ''.

    Raises:
        ValueError: agents of these `languages` write no English.
    """
    workdir = config.evaluation.get(name, '')
    if workdir and 'en' not in languages[1:]:
        raise ValueError(f'evaluation.{name}={workdir}: it reads English, and {" to ".join(languages)} writes none; '
                         'leave it empty')
    return workdir


def check(config: ml_collections.ConfigDict, languages: Sequence[str]) -> None:
    """Raises a ValueError or OSError where `evaluation` names what is of no use."""
    open_fluency(config, languages)
    open_ranking(config, languages)


class AgentEvaluation(_Scores):
    """Scores of one agent; called with its parameters."""

    def __init__(self, config: ml_collections.ConfigDict, model: Seq2Seq, split: str | None = None):
        super().__init__(config, model, config.languages, split)

    def _agents(self, params):
        return [params]


class GameEvaluation(_Scores):
    """Scores of both agents, one after the other; called with {'speaker': ..., 'listener': ...}."""

    def __init__(self, config: ml_collections.ConfigDict, model: Seq2Seq, split: str | None = None):
        super().__init__(config, model, translation.FIELDS, split)

    def _agents(self, params):
        return [params['speaker'], params['listener']]


class Hook(Evaluation):
    """The scores of a run's parameters, every so many steps."""

    def __init__(self, scores: _Scores, every: int, writer: Any):
        super().__init__(every, None, writer)
        self._scores = scores

    def measure(self, state: TrainState) -> dict[str, float]:
        return self._scores(state.params)


def hooks(config: ml_collections.ConfigDict, writer: Any, open_scores: Callable[[], _Scores]) -> list[Hook]:
    """The evaluation of a run as its hook, or none where `evaluation.every` is 0."""
    return [Hook(open_scores(), config.evaluation.every, writer)] if config.evaluation.every else []

"""Parallel text of the translation game: files, vocabularies, and batches of a few fixed shapes.

A corpus is a folder of text files that say the same line by line, `{split}.{language}`, also `.gz` and `.xz`: the
layout of Multi30k's task 1. IWSLT goes into the same layout. Without a folder, a corpus of one small grammar is
generated.

Vocabularies are no files of their own: they are a function of the training text, and a run keeps their checksum.
"""
import dataclasses
import functools
import json
import pathlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.rlhf.translation import synthetic as translation_synthetic
from experiments.runtime.stream import WHOLE, Share
from rlhf_jax.tasks import rows as rows_lib
from rlhf_jax.tasks import translation

KINDS = ('words', 'subwords')
SPECIALS = ('<pad>', '<unk>', '<bos>', '<eos>')  # ids 0 to 3, as translation.PAD and so on
SYNTHETIC = {'train': 4000, 'val': 200}  # sentences of the generated corpus
_SUFFIXES = ('', '.gz', '.xz')
_TOKEN = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")  # words with their inner apostrophes and hyphens, else one sign
_SPACE = '▁'  # begins the first subword of a word


# ---- Text ----------------------------------------------------------------------------------------------------------

def read(path: str, split: str, languages: Sequence[str]) -> dict[str, list[str]]:
    """Lines of one split, as they are written: {language: [line]}.

    Raises:
        FileNotFoundError: a language's file is not there.
        ValueError: the files differ in their number of lines, or a line is empty.
    """
    if not path:
        if split not in SYNTHETIC:
            raise ValueError(f'data.path is empty and the generated corpus has no split {split!r}; '
                             f'choose from {tuple(SYNTHETIC)}')
        sentences = translation_synthetic.rows(SYNTHETIC[split], (tuple(SYNTHETIC).index(split),))
    else:
        files = {language: _file(path, split, language) for language in languages}
        missing = [language for language, file in files.items() if file is None]
        if missing:
            raise FileNotFoundError(f'data.path={path}: no file {split}.{missing[0]} there (nor .gz, .xz)')
        sentences = rows_lib.read_parallel(files)
    return {language: [row[language] for row in sentences] for language in languages}


def _file(path: str, split: str, language: str) -> pathlib.Path | None:
    files = (pathlib.Path(path).expanduser() / f'{split}.{language}{suffix}' for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def tokenize(line: str, *, split: bool) -> list[str]:
    """Lower-cased words; with `split`, of plain text: signs stand apart from words."""
    return _TOKEN.findall(line.lower()) if split else line.lower().split()


# ---- Vocabularies --------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """One language's tokens and ids.

    Attributes:
        tokens: by id, `SPECIALS` first.
        subwords: a `tokenizers` model that cuts words up; None: a token is a word.
    """
    tokens: tuple[str, ...]
    subwords: Any = None

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def checksum(self) -> int:
        return zlib.crc32('\n'.join(self.tokens).encode())

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of a tokenized sentence, without BOS and EOS."""
        return [self._ids.get(token, translation.UNK) for token in _pieces(words, self.subwords)]

    def decode(self, ids: Sequence[int]) -> str:
        """Words separated by spaces, up to the first EOS; ids of no word read `<unk>`."""
        ids = list(ids)
        ids = ids[:ids.index(translation.EOS)] if translation.EOS in ids else ids
        tokens = [self.tokens[i] if i < len(self.tokens) else SPECIALS[translation.UNK] for i in ids
                  if i not in (translation.PAD, translation.BOS)]
        if self.subwords is None:
            return ' '.join(tokens)
        return ' '.join(''.join(tokens).replace(_SPACE, ' ').split())


def _pieces(words: Sequence[str], subwords: Any) -> list[str]:
    return list(words) if subwords is None else subwords.encode(' '.join(words), add_special_tokens=False).tokens


def vocabularies(config: ml_collections.ConfigDict, languages: Sequence[str]) -> dict[str, Vocabulary]:
    """Vocabulary of each language, from the training text in `config.vocabulary.paths`, by default `config.data.path`.

    The most frequent tokens that occur `min_count` times, at most `size` of them with the special ones. Subwords are
    learnt on all languages together that the paths hold (the published ones also saw validation and test text).

    Raises:
        ValueError: settings that mean nothing.
        FileNotFoundError: no path has training text of a language.
    """
    v = config.vocabulary
    if v.kind not in KINDS:
        raise ValueError(f'vocabulary.kind={v.kind!r} is not one of {KINDS}')
    if v.size <= len(SPECIALS):
        raise ValueError(f'vocabulary.size={v.size} must be more than the {len(SPECIALS)} special tokens')
    paths = tuple(v.paths) or (config.data.path,)
    made = _vocabularies(json.dumps(v.to_dict()), paths, config.data.train, config.data.tokenize)
    for language in languages:
        if language not in made:
            raise FileNotFoundError(f'vocabulary: no file {config.data.train}.{language} in {paths}; set '
                                    'vocabulary.paths to folders that have all three languages')
    return {language: made[language] for language in languages}


@functools.lru_cache(maxsize=8)
def _vocabularies(settings: str, paths: tuple[str, ...], split: str, cut: bool) -> dict[str, Vocabulary]:
    v, text = json.loads(settings), {}
    for path in paths:
        for language in translation.FIELDS:
            if not path or _file(path, split, language):
                lines = read(path, split, (language,))[language]
                text.setdefault(language, []).extend(tokenize(line, split=cut) for line in lines)
    subwords = _learn_subwords(text, v['subwords']) if v['kind'] == 'subwords' else None
    out = {}
    for language, sentences in text.items():
        counts = Counter(token for words in sentences for token in _pieces(words, subwords))
        ranked = sorted((-count, token) for token, count in counts.items() if count >= v['min_count'])
        out[language] = Vocabulary(SPECIALS + tuple(token for _, token in ranked[:v['size'] - len(SPECIALS)]), subwords)
    return out


def _learn_subwords(text: Mapping[str, Sequence[Sequence[str]]], size: int) -> Any:
    """Byte pair encoding over characters (arXiv 1508.07909), of `size` subwords."""
    import tokenizers  # deferred: only this kind of vocabulary needs it
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
    # A mark in front of each word, rather than a suffix behind it: the trainer numbers characters in their order, but
    # suffixed ones in the order of a hash table, and ties would then go either way.
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme='always')
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=['<unk>'])
    model.train_from_iterator((' '.join(words) for language in sorted(text) for words in text[language]), trainer)
    return model


# ---- Corpora -------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split.

    Attributes:
        plain: {language: lines as written}, for `bleu.sacrebleu`.
        words: {language: tokenized lines}, for `bleu.legacy`.
        tokens: {language: int32 [N, longest]}, BOS first, EOS last; longer sentences are cut before their EOS.
        lengths: {language: int32 [N]}, BOS and EOS counted.
    """
    plain: dict[str, list[str]]
    words: dict[str, list[str]]
    tokens: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


def open_corpus(config: ml_collections.ConfigDict, split: str, languages: Sequence[str], *, path: str | None = None,
                most: int = 0) -> Corpus:
    """A split of `config.data`. `path`: another folder; `most`: its first so many rows, 0 all."""
    plain = read(config.data.path if path is None else path, split, languages)
    plain = {language: lines[:most or None] for language, lines in plain.items()}
    coded = vocabularies(config, languages)
    longest, words, tokens, lengths = config.data.lengths[-1], {}, {}, {}
    for language, lines in plain.items():
        sentences = [tokenize(line, split=config.data.tokenize) for line in lines]
        padded, lengths[language] = translation.pad_right(
            [translation.sequence(coded[language].encode(sentence), longest - 2) for sentence in sentences])
        tokens[language] = np.pad(padded, ((0, 0), (0, longest - padded.shape[1])), constant_values=translation.PAD)
        words[language] = [' '.join(sentence) for sentence in sentences]
    return Corpus(plain, words, tokens, lengths)


def encoded(vocabulary: Vocabulary, sentences: Sequence[str], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentences, words separated by spaces and perhaps none, as int32 tokens [N, longest] and lengths [N], BOS and EOS
    included; longer ones are cut before their EOS."""
    rows = [translation.sequence(vocabulary.encode(sentence.split()), longest - 2) for sentence in sentences]
    tokens = np.full((len(rows), longest), translation.PAD, np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


# ---- Batches -------------------------------------------------------------------------------------------------------

def batch_shapes(config: ml_collections.ConfigDict, unit: int = 1) -> list[tuple[int, int]]:
    """(rows, tokens a row) of the batches, shortest first: about as many tokens in each.

    A step compiles once for a shape, so there are few: `data.lengths`. `batch_size` is the rows of the longest.

    Args:
        unit: devices, whose number divides the rows.

    Raises:
        ValueError: lengths that do not ascend, or too short to hold a token between BOS and EOS.
    """
    lengths = tuple(config.data.lengths)
    if not lengths or lengths[0] < 3 or list(lengths) != sorted(set(lengths)):
        raise ValueError(f'data.lengths={lengths} must ascend from at least 3')
    return [(max(config.batch_size * lengths[-1] // length // unit, 1) * unit, length) for length in lengths]


class LengthBatches:
    """Endless batches of sentences of similar length, in shapes known beforehand, with an exact position.

    An epoch holds every row at least once, in an order drawn from (seed, epoch). A row goes to the shortest shape that
    its longest language fits; what does not fill a batch there goes to the next longer, and at the end the last batch
    is filled up with other rows. So every epoch has the same number of batches, and the position is their count.

    Yields `{language: int32 [rows, length], language + '_length': int32 [rows]}` and what is `beside`, this process's
    part of the rows.

    Args:
        corpus: rows; all of its languages are handed out, or those of `languages`.
        shapes: as `batch_shapes` gives them.
        languages: None: all.
        beside: name -> array with an entry for each row.
    """

    def __init__(self, corpus: Corpus, shapes: Sequence[tuple[int, int]], *, seed: int, share: Share = WHOLE,
                 languages: Sequence[str] | None = None, beside: Mapping[str, np.ndarray] | None = None):
        languages, self._beside = tuple(languages or corpus.tokens), dict(beside or {})
        self._tokens = {language: corpus.tokens[language] for language in languages}
        self._lengths = {language: corpus.lengths[language] for language in languages}
        longest = np.max(list(self._lengths.values()), axis=0)
        self._shapes, self._seed = list(shapes), seed
        self._shape_of = np.searchsorted([length for _, length in shapes], longest)
        self._mine = {rows: share.rows(rows) for rows, _ in shapes}  # rows of a batch -> this process's
        self._position, self._epoch, self._plan = 0, -1, []

    def _plan_of(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(shape, rows) of each batch of an epoch."""
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._shape_of))
        plan, waiting = [], order[:0]
        for shape, (rows, _) in enumerate(self._shapes):
            waiting = np.concatenate([waiting, order[self._shape_of[order] == shape]])
            full = len(waiting) // rows * rows
            plan += [(shape, part) for part in waiting[:full].reshape(-1, rows)]
            waiting = waiting[full:]
        if len(waiting):
            fill = np.resize(order, self._shapes[-1][0] - len(waiting))
            plan.append((len(self._shapes) - 1, np.concatenate([waiting, fill])))
        return [plan[i] for i in rng.permutation(len(plan))]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._plan:
            self._epoch, self._plan = 0, self._plan_of(0)
        epoch, index = divmod(self._position, len(self._plan))
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        shape, rows = self._plan[index]
        rows = rows[self._mine[len(rows)]]
        self._position += 1
        batch = {language: x[rows, :self._shapes[shape][1]] for language, x in self._tokens.items()}
        batch |= {f'{language}_length': x[rows] for language, x in self._lengths.items()}
        return batch | {name: x[rows] for name, x in self._beside.items()}

    def get_state(self) -> dict[str, int]:
        return {'position': self._position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._position = int(state['position'])

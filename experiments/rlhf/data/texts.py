"""Tokenised demonstrations and preference pairs as arrays that are padded on the right.

A text is prompt, response and EOS, or several prompts and responses in turn. Which tokens belong to it is known from
lengths and never from an id, so that EOS is trained on and read from even where the tokenizer pads with it.
"""
import bisect
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.rlhf.data import lengths
from experiments.runtime import placement
from experiments.runtime.stream import ArrayBatches
from rlhf_jax import chat

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Encoded = tuple[list[int], list[int]]  # ids of a text, and how many of them there are up to the end of each part


class TooLong(ValueError):
    """A text has more tokens than the model that is to read it takes."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How one stage reads texts: its tokenizer, and whether a text begins with BOS.

    Attributes:
        tokenizer: see `rlhf_jax.tokenizers`.
        bos: whether it does. A chat template writes its own BOS.
        name: what the config calls the tokenizer, for messages.

    Raises:
        ValueError: `bos` of a tokenizer without BOS.
    """
    tokenizer: Any
    bos: bool = False
    name: str = 'the tokenizer'

    def __post_init__(self):
        if self.bos and self.tokenizer.bos is None:
            raise ValueError(f'bos=True, but tokenizer={self.name} names no bos token')

    def __call__(self, text: chat.Text) -> list[int]:
        """Ids of a text, BOS included."""
        if isinstance(text, chat.Chat):
            ids = self.tokenizer.encode_chat(text)
            return [self.tokenizer.bos, *ids] if self.bos and not text.has_bos else ids
        ids = self.tokenizer.encode(text)
        return [self.tokenizer.bos, *ids] if self.bos else ids

    def continuing(self, text: chat.Text) -> list[int]:
        """Ids of a text that continues another: no BOS, no space that the tokenizer would put in front."""
        if not isinstance(text, chat.Chat):
            return self.tokenizer.encode(text, start=False)
        parts = (self.tokenizer.encode_chat(chat.Chat(chat.special(part))) if is_special else
                 self.tokenizer.encode(part, start=False) for part, is_special in text.parts())
        return [i for part in parts for i in part]

    def cut(self, ids: Sequence[int], longest: int) -> list[int]:
        """The last `longest` of the ids of a prompt, a BOS in front kept."""
        first = int(self.bos and list(ids[:1]) == [self.tokenizer.bos])
        return [*ids[:first], *ids[first:][max(len(ids) - longest, 0):]]


def joined(encode: Encoder, *parts: chat.Text, add_eos: bool = True) -> Encoded:
    """Ids of parts that follow each other, and (`add_eos`) of EOS, which a chat template may have written itself.

    Part by part the ids are those of the whole text so far where these begin with the ids before, else the ids before
    and those of what follows: a policy continues the ids of the prompt, whatever they would have become with what
    follows. Either way they decode to the text.
    """
    ids: list[int] = []
    ends: list[int] = []
    text: chat.Text | None = None
    for part in parts:
        text = part if text is None else chat.concat(text, part)
        whole = list(encode(text))
        ids = whole if whole[:len(ids)] == ids else [*ids, *encode.continuing(part)]
        ends.append(len(ids))
    eos = encode.tokenizer.eos
    written = isinstance(parts[-1], chat.Chat) and parts[-1].marked and ids[-1:] == [eos]
    if add_eos and not written:
        ids = [*ids, eos]
        ends[-1] += 1
    return ids, ends


def count_spelled(encode: Encoder, texts: Iterable[chat.Text], field: str) -> None:
    """Warns where texts spell special tokens of the tokenizer, which are then read as the characters they are."""
    tokens = tuple(getattr(encode.tokenizer, 'special_tokens', ()))
    spelled = [token for text in texts if isinstance(text, str) and (token := chat.spells(text, tokens))]
    if spelled:
        log.warning('%s: %d texts spell a special token of the tokenizer, such as %r, which is read as text; '
                    'conversations under a chat template are read by data.task=chat', field, len(spelled), spelled[0])


# ---- Demonstrations --------------------------------------------------------------------------------------------------

def demonstrations(conversations: Sequence[Sequence[chat.Text]], encode: Encoder, *, pad: int, max_length: int,
                   packing: bool = False, add_eos: bool = True) -> Arrays:
    """Texts to fine-tune on.

    Args:
        conversations: (prompt, response), or more such parts of one text in turn.
        max_length: T; longer texts are left out, counted and logged.
        packing: several texts a row.
        add_eos: whether texts end with EOS.

    Returns:
        `tokens` int32 [N, T]; `mask` bool [N, T], or with `packing` int32, 1, 2, ... for the texts of a row and 0 for
        padding; `prompt_mask` bool [N, T], prompts and whatever else is not a response.

    Raises:
        ValueError: no text, or none that is short enough.
    """
    count_spelled(encode, (part for parts in conversations for part in parts), 'data')
    texts = [joined(encode, *parts, add_eos=add_eos) for parts in conversations]
    texts = _short_enough(texts, max_length, [len(ids) for ids, _ in texts], 'texts')
    lengths = [len(ids) for ids, _ in texts]
    groups = pack(lengths, max_length) if packing else [[i] for i in range(len(texts))]
    tokens = np.full((len(groups), max_length), pad, np.int32)
    mask = np.zeros(tokens.shape, np.int32 if packing else bool)
    prompt_mask = np.zeros(tokens.shape, bool)
    for row, group in enumerate(groups):
        start = 0
        for number, i in enumerate(group, 1):
            ids, ends = texts[i]
            tokens[row, start:start + len(ids)] = ids
            mask[row, start:start + len(ids)] = number
            for begin, end in zip([0, *ends[1::2]], ends[::2]):
                prompt_mask[row, start + begin:start + end] = True
            start += len(ids)
    if packing:
        log.info('packed %d texts into %d rows of %d tokens, %.0f%% full', len(texts), len(groups), max_length,
                 100 * sum(lengths) / tokens.size)
    return {'tokens': tokens, 'mask': mask, 'prompt_mask': prompt_mask}


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `max_length`: the longest first, each where the least space is
    left over (best fit)."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # space -> rows that have it
    spaces: list[int] = []  # its keys, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(spaces, lengths[i])
        if at == len(spaces):
            rows.append([])
            row, space = len(rows) - 1, max_length
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(i)
        left = space - lengths[i]
        if left not in open_rows:
            bisect.insort(spaces, left)
        open_rows.setdefault(left, []).append(row)
    return rows


# ---- Preferences -----------------------------------------------------------------------------------------------------

def preferences(triples: Sequence[tuple[chat.Text, chat.Text, chat.Text]], encode: Encoder, *, pad: int,
                max_length: int, add_eos: bool = True) -> Arrays:
    """Pairs of texts that share a prompt.

    Args:
        triples: (prompt, chosen, rejected).
        max_length: T; pairs of which one is longer are left out, counted and logged.
        add_eos: whether texts end with EOS.

    Returns:
        `chosen`, `rejected` int32 [N, T]; `chosen_mask`, `rejected_mask` bool [N, T]; `prompt_length` int32 [N].

    Raises:
        ValueError: no pair, none that is short enough, or (without EOS) a text of no token.
    """
    count_spelled(encode, (text for triple in triples for text in triple), 'data')
    pairs = [(joined(encode, prompt, chosen, add_eos=add_eos), joined(encode, prompt, rejected, add_eos=add_eos))
             for prompt, chosen, rejected in triples]
    pairs = _short_enough(pairs, max_length, [max(len(c), len(r)) for (c, _), (r, _) in pairs], 'pairs')
    if any(not ids for pair in pairs for ids, _ in pair):
        raise ValueError('add_eos=False, but a text of a pair is empty, so that it has no token to be read at; set '
                         'add_eos=True or leave that pair out')
    arrays: Arrays = {'prompt_length': np.array([ends[0] for (_, ends), _ in pairs], np.int32)}
    for side, name in enumerate(('chosen', 'rejected')):
        arrays[name] = np.full((len(pairs), max_length), pad, np.int32)
        arrays[f'{name}_mask'] = np.zeros((len(pairs), max_length), bool)
        for row, pair in enumerate(pairs):
            ids = pair[side][0]
            arrays[name][row, :len(ids)] = ids
            arrays[f'{name}_mask'][row, :len(ids)] = True
    return arrays


def _short_enough(items: list[Any], max_length: int, lengths: Sequence[int], what: str) -> list[Any]:
    if not items:
        raise ValueError(f'data: there are no {what}')
    kept = [item for item, length in zip(items, lengths) if length <= max_length]
    if not kept:
        raise ValueError(f'max_length={max_length}: all {len(items)} {what} are longer; the shortest has '
                         f'{min(lengths)} tokens')
    if len(kept) < len(items):
        log.warning('left out %d of %d %s that are longer than max_length=%d tokens', len(items) - len(kept),
                    len(items), what, max_length)
    return kept


# ---- Streams ---------------------------------------------------------------------------------------------------------

class TextBatches(ArrayBatches):
    """Endless batches of this process's rows, shuffled anew each epoch and cut to the least of a few lengths that holds
    the longest row of the whole batch, those of other processes included.

    Args:
        arrays: rows padded on the right.
        config: of the run.
        share: which rows of a batch this process provides.
    """

    def __init__(self, arrays: Arrays, config: ml_collections.ConfigDict, share: placement.Share = placement.WHOLE):
        super().__init__(arrays, config.batch_size, seed=config.seed, share=share)
        self._lengths = lengths.lengths(config.max_length, config.length_buckets)
        self._row_lengths = lengths.row_lengths(arrays)

    def _whole(self) -> np.ndarray:
        """Rows int64 [batch_size] of `arrays` that the batch has, over all processes."""
        return self._order(self._position + np.arange(self._batch_size))

    def _draw(self) -> Arrays:
        return lengths.cut_rows(super()._draw(), lengths.least(self._lengths, self._row_lengths[self._whole()].max()))


class PackedTextBatches(TextBatches):
    """Batches of texts, each batch packed into as few rows as hold it: the same texts a step, and the same loss up to
    rounding where it is a mean over tokens.

    The number of rows is one of a few (`row_counts`), all multiples of a microbatch; rows left over are padding.

    Args:
        arrays: `demonstrations` that are not packed.
    """

    def __init__(self, arrays: Arrays, config: ml_collections.ConfigDict, share: placement.Share = placement.WHOLE):
        super().__init__(arrays, config, share)
        self._share, self._max_length = share, config.max_length
        self._row_counts = row_counts(config.batch_size, config.accumulate)

    def _draw(self) -> Arrays:
        texts = self._whole()
        groups = pack(self._row_lengths[texts].tolist(), self._max_length)
        rows = self._share.rows(lengths.least(self._row_counts, len(groups)))
        return packed([texts[groups[row]].tolist() if row < len(groups) else [] for row in rows.tolist()], self._arrays,
                      self._row_lengths)


def row_counts(batch_size: int, accumulate: int) -> tuple[int, ...]:
    """Numbers of rows that a batch of `batch_size` texts may be packed into, ascending: 1, 2, 3, 4, 6, 8, 12, 16, ...
    microbatches of the size that `accumulate` gives, up to all of them."""
    counts = {count for power in range(accumulate.bit_length()) for count in (2 ** power, 3 * 2 ** power)}
    return tuple(batch_size // accumulate * count for count in sorted(counts | {accumulate}) if count <= accumulate)


def packed(groups: Sequence[Sequence[int]], arrays: Arrays, row_lengths: np.ndarray) -> Arrays:
    """Rows that hold several of the texts of `demonstrations` each.

    Args:
        groups: texts of each row, none for a row of padding.
        arrays: `tokens`, `mask`, `prompt_mask`, [N, T].
        row_lengths: int [N], tokens of each text.

    Returns:
        The same arrays [len(groups), T], `mask` int32 as of packed `demonstrations`; tokens of padding are 0.
    """
    shape = len(groups), arrays['tokens'].shape[1]
    out = {'tokens': np.zeros(shape, np.int32), 'mask': np.zeros(shape, np.int32),
           'prompt_mask': np.zeros(shape, bool)}
    for row, group in enumerate(groups):
        start = 0
        for number, text in enumerate(group, 1):
            length = row_lengths[text]
            span = slice(start, start + length)
            out['tokens'][row, span] = arrays['tokens'][text, :length]
            out['prompt_mask'][row, span] = arrays['prompt_mask'][text, :length]
            out['mask'][row, span] = number
            start += length
    return out


def batches(arrays: Arrays, config: ml_collections.ConfigDict,
            share: placement.Share = placement.WHOLE) -> TextBatches:
    """The stream of batches that `config` describes."""
    stream = PackedTextBatches if config.get('pack_batch') else TextBatches
    return stream(arrays, config, share)


def decoded(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, prompts: np.ndarray | None = None,
            prompt_mask: np.ndarray | None = None) -> tuple[list[str], np.ndarray]:
    """Texts of responses [N, L] without their EOS, and whether they have one, bool [N].

    A response continues its prompt: behind the prompt's text it is what was drawn, its first space included.

    Args:
        prompts, prompt_mask: [N, P], of which it matters alone whether there is any text; None: there is.
    """
    lengths = mask.sum(1)
    last = tokens[np.arange(len(lengths)), np.maximum(lengths - 1, 0)]
    ended = (lengths > 0) & np.isin(last, tokenizer.stops)
    starts = np.zeros(len(lengths), bool)
    if prompts is not None:
        special = list(tokenizer.special_tokens.values())
        starts = ~(np.asarray(prompt_mask, bool) & ~np.isin(prompts, special)).any(1)
    # A vocabulary is often padded to a round size: ids that no text has can be drawn, and say nothing.
    size = tokenizer.vocab_size
    known = [[i for i in row[:length - end] if i < size] for row, length, end in zip(tokens, lengths, ended)]
    return [tokenizer.decode(ids, start=bool(start)) for ids, start in zip(known, starts)], ended

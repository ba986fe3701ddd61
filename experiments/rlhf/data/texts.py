"""Tokenised demonstrations and preference pairs as arrays that are padded on the right.

A text is prompt, response and EOS. Which tokens are there is known from lengths and never from an id, so that EOS is
trained on and read from even where the tokenizer pads with it.
"""
import bisect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from experiments.runtime import placement
from experiments.runtime.stream import ArrayBatches

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Text = tuple[list[int], int]  # ids, and how many of them are the prompt's


def encoder(config: ml_collections.ConfigDict, tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> ids, after the tokenizer's BOS where `config.bos` asks for it.

    Raises:
        ValueError: it has no BOS.
    """
    if not config.bos:
        return tokenizer.encode
    if tokenizer.bos is None:
        raise ValueError(f'bos=True, but tokenizer={config.tokenizer} names no bos token')
    return lambda text: [tokenizer.bos, *tokenizer.encode(text)]


def joined(encode: Callable[[str], Sequence[int]], eos: int, prompt: str, response: str) -> Text:
    """Ids of prompt, response and EOS.

    The two are encoded as one text where its ids begin with those of the prompt, else one after the other: a policy
    continues the ids of the prompt, whatever they would have become with what follows.
    """
    first, whole = list(encode(prompt)), list(encode(prompt + response))
    if whole[:len(first)] != first:
        bos = len(encode(''))
        whole = first + list(encode(response))[bos:]
    return [*whole, eos], len(first)


# ---- Demonstrations --------------------------------------------------------------------------------------------------

def demonstrations(pairs: Sequence[tuple[str, str]], encode: Callable[[str], Sequence[int]], *, eos: int, pad: int,
                   max_length: int, packing: bool = False) -> Arrays:
    """Texts to fine-tune on.

    Args:
        pairs: (prompt, response).
        max_length: T; longer texts are left out, counted and logged.
        packing: several texts a row.

    Returns:
        `tokens` int32 [N, T]; `mask` bool [N, T], or with `packing` int32, 1, 2, ... for the texts of a row and 0 for
        padding; `prompt_mask` bool [N, T].

    Raises:
        ValueError: no text, or none that is short enough.
    """
    texts = [joined(encode, eos, *pair) for pair in pairs]
    texts = _short_enough(texts, max_length, [len(ids) for ids, _ in texts], 'texts')
    lengths = [len(ids) for ids, _ in texts]
    groups = pack(lengths, max_length) if packing else [[i] for i in range(len(texts))]
    tokens = np.full((len(groups), max_length), pad, np.int32)
    mask = np.zeros(tokens.shape, np.int32 if packing else bool)
    prompt_mask = np.zeros(tokens.shape, bool)
    for row, group in enumerate(groups):
        start = 0
        for number, i in enumerate(group, 1):
            ids, num_prompt = texts[i]
            tokens[row, start:start + len(ids)] = ids
            mask[row, start:start + len(ids)] = number
            prompt_mask[row, start:start + num_prompt] = True
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

def preferences(triples: Sequence[tuple[str, str, str]], encode: Callable[[str], Sequence[int]], *, eos: int, pad: int,
                max_length: int) -> Arrays:
    """Pairs of texts that share a prompt.

    Args:
        triples: (prompt, chosen, rejected).
        max_length: T; pairs of which one is longer are left out, counted and logged.

    Returns:
        `chosen`, `rejected` int32 [N, T]; `chosen_mask`, `rejected_mask` bool [N, T]; `prompt_length` int32 [N].

    Raises:
        ValueError: no pair, or none that is short enough.
    """
    pairs = [(joined(encode, eos, prompt, chosen), joined(encode, eos, prompt, rejected))
             for prompt, chosen, rejected in triples]
    pairs = _short_enough(pairs, max_length, [max(len(c), len(r)) for (c, _), (r, _) in pairs], 'pairs')
    arrays: Arrays = {'prompt_length': np.array([num for (_, num), _ in pairs], np.int32)}
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

def batches(arrays: Arrays, config: ml_collections.ConfigDict,
            share: placement.Share = placement.WHOLE) -> ArrayBatches:
    """Endless batches of this process's rows, shuffled anew each epoch."""
    return ArrayBatches(arrays, config.batch_size, seed=config.seed, share=share)


def decoded(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Texts of responses [N, L] without their EOS, and whether they have one, bool [N]."""
    lengths = mask.sum(1)
    last = tokens[np.arange(len(lengths)), np.maximum(lengths - 1, 0)]
    ended = (lengths > 0) & (last == tokenizer.eos)
    # A vocabulary is often padded to a round size: ids that no text has can be drawn, and say nothing.
    known = [[i for i in row[:length - end] if i < tokenizer.vocab_size]
             for row, length, end in zip(tokens, lengths, ended)]
    return [tokenizer.decode(ids) for ids in known], ended

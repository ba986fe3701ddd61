"""Lengths that batches are cut to, so that a training step does not compute padding which no row of its batch needs.

XLA compiles a program for each shape. Rows are therefore cut to one of a few lengths, the least that holds the longest
row of the batch. Which one depends on the batch alone and on all of its rows, so that every process takes the same and
a resumed run the same as one that was never stopped; the loss is the same up to rounding.
"""
import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

TILE = 128  # tokens, that lengths are multiples of: matrix units and attention kernels work on as many at a time


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError unless `config.length_buckets` is a number of lengths."""
    if config.length_buckets < 1:
        raise ValueError(f'length_buckets={config.length_buckets} must be at least 1; 1 pads every batch to the full '
                         'length')


def lengths(longest: int, count: int) -> tuple[int, ...]:
    """At most `count` lengths, evenly spaced up to `longest` and rounded up to multiples of `TILE`, ascending."""
    steps = (-(-longest * i // (count * TILE)) * TILE for i in range(1, count + 1))
    return tuple(sorted({min(step, longest) for step in steps}))


def least(choices: Sequence[int], needed: int) -> int:
    """The least of ascending `choices` that is at least `needed`; the last where none is."""
    return choices[min(bisect.bisect_left(choices, needed), len(choices) - 1)]


def cut_rows(rows: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Rows padded on the right, `[N, T]`, cut to their first `length` tokens; arrays [N] stay as they are."""
    return {name: x[:, :length] if x.ndim > 1 else x for name, x in rows.items()}


def row_lengths(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tokens int64 [N] that each row needs: up to the last that any of its masks `mask` or `NAME_mask` counts, but for
    `prompt_mask`, which marks some of them.

    Args:
        arrays: rows padded on the right, see `texts.demonstrations` and `texts.preferences`.
    """
    masks = [x for name, x in arrays.items()
             if name == 'mask' or name.endswith('_mask') and name != 'prompt_mask']
    return np.max([np.count_nonzero(mask, axis=1) for mask in masks], axis=0)


def left_aligned(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `tokens` and `mask` [N, T] with all their padding on the right, wherever it was."""
    order = np.argsort(~mask, axis=1, kind='stable')
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)


def batches_by_length(counts: np.ndarray, size: int, choices: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in batches of `size`, the shortest first, so that few of them are padded to the length of a long one.

    Args:
        counts: int [N], tokens of each row.
        choices: lengths, ascending.

    Returns:
        (numbers of rows int [size], the least length that holds them all) of each batch; the last is filled up with the
        longest row.
    """
    order = np.argsort(counts, kind='stable')
    for start in range(0, len(order), size):
        rows = order[np.minimum(np.arange(start, start + size), len(order) - 1)]
        yield rows, least(choices, int(counts[rows[-1]]))


def cut_rollouts(batch: Mapping[str, Any], prompts: Sequence[int], responses: Sequence[int]) -> dict[str, Any]:
    """A rollout batch [B, K, ...] (`rlhf_jax.rollout.batch`) without padding that none of its rows needs.

    One position after the longest response stays: there PPO's reward is read where it comes past EOS.

    Args:
        batch: of all processes, with `prompt_mask` [B, K, P]; prompts are padded on the left, responses on the right.
        prompts, responses: lengths to choose from, ascending.
    """
    prompt_mask, mask = np.asarray(batch['prompt_mask']), np.asarray(batch['mask'])
    prompt_width, response_width = prompt_mask.shape[-1], mask.shape[-1]
    prompt = min(least(prompts, _needed(prompt_mask[..., ::-1])), prompt_width)
    response = min(least(responses, _needed(mask) + 1), response_width)
    first = prompt_width - prompt
    cut = dict(batch)
    cut['tokens'] = batch['tokens'][..., first:prompt_width + response]
    cut['prompt_mask'] = batch['prompt_mask'][..., first:]
    for name in ('mask', 'logprobs', 'policy_version'):
        cut[name] = batch[name][..., :response]
    return cut


def _needed(mask: np.ndarray) -> int:
    """Columns of `mask` [B, K, L] up to the last in which any row is True."""
    columns = np.flatnonzero(mask.any((0, 1)))
    return int(columns[-1]) + 1 if columns.size else 0

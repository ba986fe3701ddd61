"""Pictures that show two attributes, some combinations of which are in no training set: what compositions ask for."""
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.dlc.data import digit_pairs, emoji


class Grid(NamedTuple):
    """A data set of two attributes; a label is `values` times the first of them plus the second.

    Attributes:
        first, second: what they are called.
        values: how many values the second has.
        is_unseen: (first, second) -> which combinations are kept out of training.
        sources: the split whose pictures are composed: one of combinations that are trained on.
        judge: the classifier that reads both attributes; no other of the quickstart's does.
    """
    first: str
    second: str
    values: int
    is_unseen: Callable[[np.ndarray, np.ndarray], np.ndarray]
    sources: str
    judge: str

    def attributes(self, labels: np.ndarray) -> np.ndarray:
        """int [N, 2] of labels [N]."""
        return np.stack(np.divmod(np.asarray(labels), self.values), 1)

    def label(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return first * self.values + second

    def crossed(self, labels: np.ndarray, num: int, *, seed: int = 0) -> np.ndarray:
        """int [num, 2]: rows of pictures (a, b) and (c, d) that make unseen combinations when they are crossed.

        Neither (a, d) nor (c, b) is in the training set, a is not c, and b is not d.

        Args:
            labels: of pictures, [N].

        Raises:
            ValueError: no two of them are such.
        """
        first, second = self.attributes(labels).T
        unseen = self.is_unseen(first[:, None], second)  # [N, N]: the first of one with the second of another
        rows = np.argwhere(unseen & unseen.T & (first[:, None] != first) & (second[:, None] != second))
        if not len(rows):
            raise ValueError(f'{len(first)} pictures, no two of which cross to unseen pairs; give more')
        return rows[np.random.default_rng(seed).integers(len(rows), size=num)]


DIGITS = Grid('upper digit', 'lower digit', 10, digit_pairs.is_unseen, 'heldout', 'perceptron')
EMOJI = Grid('figure', 'tone', len(emoji.TONES), emoji.is_unseen, 'train', 'nearest')


def grid_of(config: ml_collections.ConfigDict) -> Grid | None:
    """That of a quickstart's pictures; None where they show one thing."""
    if config.encoded == 'halves':
        return DIGITS
    return {'digit_pairs': DIGITS, 'emoji': EMOJI}.get(config.encoder.data.name)

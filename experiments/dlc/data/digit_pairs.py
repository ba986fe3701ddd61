"""Two handwritten digits, one above the other, and what a caption says of them: the miniature of text to image.

A picture is 16x16 pixels, its label 10 times the upper digit plus the lower. Some pairs of classes are never seen in
training, though each of their digits is, in that place: a model has to put together what it knows.
"""
import numpy as np

from experiments.dlc.data.images import ArrayImages, split_rows

SIDE = 16
NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
PHRASES = ('a {upper} above a {lower}', 'a {upper} on top of a {lower}',
           'a {lower} below a {upper}', 'a {lower} under a {upper}')
WORDS = tuple(sorted({word for phrase in PHRASES for word in phrase.split() if '{' not in word} | set(NUMBERS)))
REGIONS = ((0, 8, 4, 12), (8, 16, 4, 12))  # (top, bottom, left, right) of the upper and of the lower digit, pixels
SPLITS = {'train': 'train', 'heldout': 'heldout', 'unseen': 'heldout'}


def is_unseen(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Which pairs are kept out of training: 20 of the 100, every digit twice in either place."""
    return np.isin((lower - upper) % 10, (3, 7))


def caption(upper: int, lower: int, phrase: int) -> str:
    return PHRASES[phrase].format(upper=NUMBERS[upper], lower=NUMBERS[lower])


class DigitPairs(ArrayImages):
    """`num` pairs of scikit-learn's digits, as many of each pair of classes as goes.

    Splits: 'train' and 'heldout' have the same pairs of classes, made of different images; 'unseen' has the others, of
    the images of 'heldout'.
    """

    def __init__(self, split: str, num: int, *, heldout: float = 0.25, seed: int = 0, channels: int = 0,
                 image_size: int = 0):
        if split not in SPLITS:
            raise ValueError(f'data.split={split!r}: digit_pairs has {tuple(SPLITS)}')
        images, digits = single_digits(SPLITS[split], heldout=heldout, seed=seed)
        rng = np.random.default_rng((seed, tuple(SPLITS).index(split)))
        upper, lower = np.divmod(np.arange(100), 10)
        pairs = np.flatnonzero(is_unseen(upper, lower) == (split == 'unseen'))
        labels = rng.permutation(np.resize(pairs, num))
        of_class = [np.flatnonzero(digits == c) for c in range(10)]
        canvas = np.zeros((num, SIDE, SIDE, 1), np.uint8)
        captions = []
        for i, label in enumerate(labels):
            for half, digit in zip(halves(canvas[i:i + 1]), divmod(label, 10)):
                half[0] = images[rng.choice(of_class[digit])]
            captions.append(caption(*divmod(label, 10), rng.integers(len(PHRASES))))
        names = tuple(f'{a} above {b}' for a in NUMBERS for b in NUMBERS)
        super().__init__(canvas, labels, names, prefix=f'digit_pairs/{split}', channels=channels, image_size=image_size)
        self.captions = {self.name(i): text for i, text in enumerate(captions)}


def single_digits(split: str, *, heldout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits that pairs of a split are made of: uint8 [N, 8, 8, 1] and their classes [N]."""
    from sklearn.datasets import load_digits  # deferred: its import takes a second
    data = load_digits()
    rows = split_rows(data.target, split, heldout, seed)
    return np.rint(data.images[rows] * (255 / 16)).astype(np.uint8)[..., None], data.target[rows]


def halves(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower digits [N, 8, 8, 1] of pictures [N, 16, 16, 1], as views."""
    upper, lower = (images[:, top:bottom, left:right] for top, bottom, left, right in REGIONS)
    return upper, lower


def cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pictures [N, 16, 16, C] of the upper digits of `first` and the lower digits of `second`."""
    half = SIDE // 2
    return np.concatenate([first[:, :half], second[:, half:]], 1)

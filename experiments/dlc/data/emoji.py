"""Emoji of people: who, and in which tone of skin; some combinations are kept out of training.

What a picture shows is read from its file's name, which is the emoji's code points, as Noto Emoji has them
(googlefonts/noto-emoji on GitHub, png/128): `emoji_u1f469_1f3fd_200d_1f33e.png` is a woman of the third tone, a farmer.
Of a role there are a person, a man and a woman, each in no tone and in five; roles that lack any are left out.
"""
import collections
import os
import pathlib
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from experiments.dlc.data.decode import Decoding
from experiments.dlc.data.image_files import FolderImages

TONES = ('no tone', 'light', 'medium-light', 'medium', 'medium-dark', 'dark')
GENDERS = ('person', 'man', 'woman')
SPLITS = ('train', 'heldout', 'all')

_MODIFIERS = {0x1f3fb + i: i + 1 for i in range(5)}     # of the tone
_PERSON = 0x1f9d1
_PEOPLE = {_PERSON: 0, 0x1f468: 1, 0x1f469: 2}          # code point of a whole person -> gender
_SIGNS = {0x2642: 1, 0x2640: 2}                         # sign that follows a role -> gender
_JOINERS = (0x200d, 0xfe0f)


class Attributes(NamedTuple):
    """What a picture shows: `role`, code points that say neither gender nor tone; indices of GENDERS and of TONES."""
    role: tuple[int, ...]
    gender: int
    tone: int


def attributes(name: str) -> Attributes | None:
    """What the file `name` shows, by its name; None of one that is no emoji of one person or group in one tone."""
    stem = pathlib.PurePath(name).stem
    try:
        points = [int(point, 16) for point in stem.removeprefix('emoji_u').split('_')]
    except ValueError:
        return None
    tones = [_MODIFIERS[p] for p in points if p in _MODIFIERS]
    people = [_PEOPLE[p] for p in points if p in _PEOPLE]
    signs = [_SIGNS[p] for p in points if p in _SIGNS]
    if not stem.startswith('emoji_u') or max(map(len, (tones, people, signs))) > 1:
        return None
    role = tuple(_PERSON if p in _PEOPLE else p for p in points if p not in (*_MODIFIERS, *_SIGNS, *_JOINERS))
    return Attributes(role, (signs or people or [0])[0], (tones or [0])[0])


def complete(files: Iterable[str]) -> dict[Attributes, str]:
    """What is shown -> its file, the first of `files` that shows it, of those roles of which nothing is missing."""
    shown: dict[Attributes, str] = {}
    for file in files:
        if (what := attributes(file)) is not None:
            shown.setdefault(what, file)
    counts = collections.Counter(what.role for what in shown)
    return {what: file for what, file in shown.items() if counts[what.role] == len(GENDERS) * len(TONES)}


def is_unseen(figure: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Which combinations are kept out of training: one tone of every figure, a figure being 3 * role + gender."""
    return (figure // len(GENDERS) + figure % len(GENDERS) + tone) % len(TONES) == 0


class Emoji(FolderImages):
    """One picture of each combination; its label is 6 * figure + tone, with figure = 3 * role + gender.

    Splits: 'train' has the combinations that are trained on, 'heldout' the others, 'all' both.

    Raises:
        FileNotFoundError: no such folder, or no image below it.
        ValueError: no role of which every picture is there, or no such split.
    """

    def __init__(self, path: str | os.PathLike, split: str, *, decoding: Decoding = Decoding(), image_size: int = 0):
        if split not in SPLITS:
            raise ValueError(f'data.split={split!r}: emoji has {SPLITS}')
        super().__init__(pathlib.Path(path).expanduser(), decoding=decoding, image_size=image_size)
        shown = complete(self.name(i) for i in range(len(self)))
        if not shown:
            raise ValueError(f'data.path={path}: of no role are there all {len(GENDERS) * len(TONES)} emoji, named by '
                             'their code points (emoji_u1f469_1f3fd_200d_1f33e.png); give png/128 of Noto Emoji')
        roles = {role: number for number, role in enumerate(sorted({what.role for what in shown}))}
        files = {(roles[what.role] * len(GENDERS) + what.gender) * len(TONES) + what.tone: file
                 for what, file in shown.items()}
        self.class_names = tuple(f'{_in_words(role)}, {gender}, {tone}'
                                 for role in roles for gender in GENDERS for tone in TONES)
        chosen = np.array(sorted(files), np.int32)
        if split != 'all':
            chosen = chosen[is_unseen(*np.divmod(chosen, len(TONES))) == (split == 'heldout')]
        self._files, self.labels = np.array([os.fsencode(files[label]) for label in chosen.tolist()]), chosen


def _in_words(role: tuple[int, ...]) -> str:
    return ' '.join(unicodedata.name(chr(point), f'u{point:x}').lower() for point in role)

"""Features of the images that the captions of a corpus were written for, and how well captions find them.

A folder holds `{split}.npy` of each split, float [N, F]: the features of one image a line, in the order of its lines.
"""
import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np

from experiments.rlhf.translation import data as data_lib
from experiments.rlhf.translation import synthetic

RECALLS = (1, 5, 10)
DISTRACTORS = 19  # random images beside the right one, in the published measure


def features(folder: str, split: str, captions: Sequence[str], width: int) -> np.ndarray:
    """Features of the image of each caption, float32 [N, F].

    Args:
        folder: of the files; '': the generated corpus, whose images are made of its captions (`synthetic.images`).
        captions: all lines of the split.
        width: F.

    Raises:
        FileNotFoundError: no file of this split.
        ValueError: it holds something else than so many rows of so many numbers.
    """
    if not folder:
        return synthetic.images(captions, width)
    file = pathlib.Path(folder).expanduser() / f'{split}.npy'
    if not file.is_file():
        raise FileNotFoundError(f'images: no file {file}; write the features of the images of {split} there, one row '
                                'for each line of its captions, or name another folder')
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f'images: {file} is no .npy file of numbers ({error}); write one by numpy.save') from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != 'f':
        raise ValueError(f'images: {file} holds {getattr(array, "dtype", "several arrays")} '
                         f'{getattr(array, "shape", "")}; expected floating-point features [images, {width}]')
    if len(array) != len(captions):
        raise ValueError(f'images: {file} has {len(array)} rows and {split}.en {len(captions)} lines; give one row for '
                         'each line')
    if array.shape[1] != width:
        raise ValueError(f'images: {file} has {array.shape[1]} features a row, model.features={width}; set it to '
                         f'{array.shape[1]}')
    bad = ~np.isfinite(array).all(1)
    if bad.any():
        raise ValueError(f'images: row {int(bad.argmax())} of {file} is not finite')
    return array.astype(np.float32)


def folder_of(config: ml_collections.ConfigDict) -> str:
    """The folder of a ranker's features: `images`, or that of its text."""
    return config.images or config.data.path


def captions_of(config: ml_collections.ConfigDict, split: str) -> list[str]:
    """All English lines of a split of `config.data`."""
    return data_lib.read(config.data.path, split, ('en',))['en']


# ---- Ranks -----------------------------------------------------------------------------------------------------------

def ranks(sentences: np.ndarray, images: np.ndarray, rows: int = 256) -> np.ndarray:
    """Rank of each sentence's own image among all, from 1: int64 [N].

    Images that score the same as the right one, and scores that are not finite, count as ahead of it: a ranker that
    tells nothing apart ranks every image last.

    Args:
        sentences, images: float32 [N, D]; row i of both belongs together.
        rows: sentences scored at a time.
    """
    out = []
    for first in range(0, len(sentences), rows):
        scores = sentences[first:first + rows] @ images.T
        of_pairs = np.take_along_axis(scores, np.arange(first, first + len(scores))[:, None], 1)
        out.append((~(scores < of_pairs)).sum(1))
    return np.concatenate(out)


def measures(of_images: np.ndarray) -> dict[str, float]:
    """Measures of the ranks of N captions' own images among N.

    Returns:
        `image_recall_k`, the share of captions that have their image among the first k; `image_median_rank`; and
        `image_first_of_20`, the share that rank it before 19 others: these are drawn with replacement from all images,
        the right one included, as published, and the mean over such draws is exact.
    """
    behind = 1 - (of_images - 1) / len(of_images)
    out = {f'image_recall_{k}': float((of_images <= k).mean()) for k in RECALLS}
    return out | {'image_median_rank': float(np.median(of_images)),
                  f'image_first_of_{DISTRACTORS + 1}': float((behind ** DISTRACTORS).mean())}

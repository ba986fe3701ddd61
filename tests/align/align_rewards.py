"""Reward functions of images that the tests name; some are wrong in the ways rewards can be."""
import time

import numpy as np


def brightness(images, rows):
    """Mean of the upper half: what a code can change and a rule can read."""
    assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1
    return images[:, :images.shape[1] // 2].mean((1, 2, 3))


def with_row(images, rows):
    assert len(images) == len(rows) and all(row['caption'] for row in rows)
    return [row['label'] + image.mean() for image, row in zip(images, rows)]


def some_missing(images, rows):
    return [None if i % 3 == 0 else float(image.mean()) for i, image in enumerate(images)]


def slow(images, rows):
    time.sleep(30)


def too_few(images, rows):
    return [0.0]

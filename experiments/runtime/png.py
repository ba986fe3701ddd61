"""Arrays as PNG files, and many of them as one picture."""
import os
from typing import IO

import numpy as np
from PIL import Image

from experiments.runtime import storage


def grid(images: np.ndarray, columns: int, *, gap: int = 1) -> np.ndarray:
    """uint8 [N, H, W, C] -> one uint8 picture, row by row, `gap` white pixels between; the last row is padded white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[y:y + h, x:x + w] = image
    return canvas


def save(file: str | os.PathLike | IO, image: np.ndarray) -> None:
    """Writes uint8 [H, W, 1 or 3] as PNG to a path or an open file."""
    if isinstance(file, (str, os.PathLike)):
        with storage.write_whole(file) as opened:
            return save(opened, image)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format='PNG')

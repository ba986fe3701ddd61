"""Inception features of a stream of images: the input of FID, sFID, precision/recall and the Inception Score."""
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from dlc_jax.models.inception import InceptionOutput, InceptionV3


def inception_features(module: InceptionV3, params: Any, batches: Iterable[np.ndarray], *, batch_size: int = 64,
                       sharding: jax.sharding.Sharding | None = None) -> InceptionOutput:
    """Runs the network over every image of `batches`, in order.

    The images are regrouped into batches of exactly `batch_size`, the last one padded: one program is compiled, and the
    result does not depend, to the bit, on how the stream was cut.

    Args:
        module, params: as `dlc_jax.convert.from_torch('inception', …)` gives them.
        batches: uint8 arrays [n, H, W, 3], all of one H and W, n free.
        batch_size: images a device call.
        sharding: of a batch, to use several devices; its leading axis must divide `batch_size`.

    Returns:
        `InceptionOutput` of float32 numpy arrays with one row an image.

    Raises:
        ValueError: no image at all, or an array that is not uint8 [n, H, W, 3] of the size of those before it.
    """
    rows = []
    for batch, count in _regroup(batches, batch_size):
        x = batch if sharding is None else jax.device_put(batch, sharding)
        rows.append(jax.tree.map(lambda y: np.asarray(y)[:count], _apply(module, params, x)))
    if not rows:
        raise ValueError('inception_features: batches holds no image')
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


@functools.partial(jax.jit, static_argnums=0)  # at module level, so that a second stream does not compile again
def _apply(module: InceptionV3, params: Any, images: jax.Array) -> InceptionOutput:
    output: Any = module.apply({'params': params}, images)
    return output


def _regroup(batches: Iterable[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of exactly `batch_size` rows, with how many of them are real."""
    if batch_size < 1:
        raise ValueError(f'inception_features: batch_size={batch_size} must be at least 1')
    shape, buffer, filled = None, None, 0
    for images in batches:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError('inception_features: each batch must be uint8 [n, H, W, 3], got '
                             f'{images.dtype} {images.shape}')
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise ValueError(f'inception_features: images of {images.shape[1:3]} after images of {shape[:2]}; '
                             'resize them to one size first')
        while len(images):
            if buffer is None:
                buffer, filled = np.zeros((batch_size, *shape), np.uint8), 0
            part, images = images[:batch_size - filled], images[batch_size - filled:]
            buffer[filled:filled + len(part)] = part
            filled += len(part)
            if filled == batch_size:
                yield buffer, filled
                buffer = None
    if buffer is not None:
        yield buffer, filled

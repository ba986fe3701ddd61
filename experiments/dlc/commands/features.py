"""Features of images by networks that no compared model has seen the inside of: FID's Inception, DINOv2, an encoder."""
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dlc_jax import convert
from dlc_jax.metrics.inception_features import inception_features
from dlc_jax.models.inception import InceptionOutput
from dlc_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, CenterCrop
from experiments.dlc.encoder import Encoder, encode
from experiments.dlc.weights import reading
from experiments.runtime import cores, modules, shards, storage
from experiments.runtime import mesh as mesh_lib
from rlhf_jax.weights.files import load_state_dict

DINOV2_SIZE = 224  # pixels that DINOv2 is shown, as FD-DINOv2 was published (arXiv 2306.04675)


def inception(path: str | os.PathLike, batch_size: int) -> Callable[[np.ndarray], InceptionOutput]:
    """What released FID weights see, `batch_size` images at once on a device.

    Raises:
        FileNotFoundError, ValueError: nothing there, or other weights.
    """
    module, params = convert.from_torch('inception', load_state_dict(storage.local_copy(path)))

    def compute(images: np.ndarray) -> InceptionOutput:
        unit = modules.Unit.of(batch_size, len(images))
        mesh = mesh_lib.make_mesh({'data': -1}, jax.local_devices()[:unit.devices])
        return shards.gathered(lambda part: inception_features(
            module, params, [images[part.start:part.stop]], batch_size=unit.rows * unit.devices,
            sharding=mesh_lib.batch_sharding(mesh)), len(images), unit.rows)
    return compute


def encoder(path: str | os.PathLike, batch_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Class tokens float32 [N, D] of a DINOv2, or embeddings of an encoder: a folder or file of released weights, or a
    work directory. Images are cropped, resized and normalised as the network was trained on them.

    Raises:
        FileNotFoundError, ValueError: nothing there, or other weights.
    """
    if reading.is_released(path) and reading.kind_of(path) == 'dinov2':
        module, params = reading.read('dinov2', path)
        size = DINOV2_SIZE // module.patch_size * module.patch_size
        crop = CenterCrop(size, IMAGENET_MEAN, IMAGENET_STD)
        one = lambda params, x: module.apply({'params': params}, x).cls
        return _network(one, params, batch_size, crop, 3)
    model = reading.load(Encoder, path)
    one = lambda params, x: encode(model.config, params, x, outputs=('embeddings',))['embeddings']
    return _network(one, model.params, batch_size, model.transform, model.config.data.channels)


def _network(one: Callable[[Any, Any], Any], params: Any, batch_size: int,
             transform: Callable[[np.ndarray], np.ndarray], channels: int) -> Callable[[np.ndarray], np.ndarray]:
    def compute(images: np.ndarray) -> np.ndarray:
        unit = modules.Unit.of(batch_size, len(images))
        run, size = modules.Batched(one, params, unit), unit.rows * unit.devices

        def of_part(part: range) -> np.ndarray:
            # A few batches at a time: as floats all images would be four times as large.
            blocks = [part[i:i + 8 * size] for i in range(0, len(part), 8 * size)]
            return np.concatenate([run(_prepared(transform, images[block.start:block.stop], channels), len(block))
                                   for block in blocks])
        return shards.gathered(of_part, len(images), unit.rows)
    return compute


def _prepared(transform: Callable[[np.ndarray], np.ndarray], images: np.ndarray, channels: int) -> np.ndarray:
    """float32 [N, H, W, channels]; grey images are repeated over the channels of a network for colour.

    Raises:
        ValueError: colour images for a network that reads grey ones.
    """
    if images.shape[-1] != channels:
        if images.shape[-1] != 1:
            raise ValueError(f'the images have {images.shape[-1]} channels, the network reads {channels}')
        images = np.repeat(images, channels, -1)
    with ThreadPoolExecutor(cores.usable()) as threads:
        return np.stack(list(threads.map(transform, images)))

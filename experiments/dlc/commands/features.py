"""Features of images by networks that no compared model has seen the inside of: FID's Inception, DINOv2, an encoder."""
import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dlc_jax import convert
from dlc_jax.metrics.inception_features import inception_features
from dlc_jax.models.inception import InceptionOutput
from dlc_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, CenterCrop
from experiments.dlc.data import codestore, codestore_shards
from experiments.dlc.encoder import Encoder, encode
from experiments.dlc.weights import reading
from experiments.runtime import cores, modules, processes, shards, steps, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.digest import fingerprint
from experiments.runtime.prefetch import ahead
from rlhf_jax.weights.files import load_state_dict

DINOV2_SIZE = 224  # pixels that DINOv2 is shown, as FD-DINOv2 was published (arXiv 2306.04675)
BLOCK = 8  # batches whose images are prepared, and whose features are written, together

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a network sees in images, `batch_size` of them at once on a device.

    Attributes:
        made: JSON values that decide what it sees in an image.
        program: unit -> (images uint8 [n, H, W, C] -> arrays [n, ...] by name).
        output: these arrays, of all images -> what a call returns.
    """
    batch_size: int
    made: Mapping[str, Any]
    program: Callable[[modules.Unit], Callable[[np.ndarray], Arrays]]
    output: Callable[[Arrays], Any]

    def __call__(self, images: np.ndarray, place: str = '') -> Any:
        """What it sees in `images`; the processes of a job share the work.

        Args:
            place: where features are kept, block by block, until somebody removes them: interrupted, a call for the
                same images goes on after the last of them. Only process 0 gets the result then, the others None. '':
                they are not kept, and every process gets the result.

        Raises:
            ValueError, OSError: images that the network does not read, or no room for the features.
        """
        unit = modules.Unit.of(self.batch_size, len(images))
        see, size = self.program(unit), BLOCK * unit.rows * unit.devices
        cut = lambda rows: [rows[i:i + size] for i in range(0, len(rows), size)]
        if place:
            self._keep(images, place := self._place(images, unit, place), unit, see, cut)
            if jax.process_index() != 0:
                return None
            return self.output({name: np.array(x) for name, x in codestore.open_rows(place).arrays.items()})

        def of_part(part: range) -> Arrays:
            blocks = [see(images[block.start:block.stop]) for block in cut(part)]
            return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        return self.output(shards.gathered(of_part, len(images), unit.rows))

    def _place(self, images: np.ndarray, unit: modules.Unit, place: str) -> str:
        """A place of its own for everything that decides the features: those of other images, of another network or
        in other batches are never taken for these."""
        if jax.process_index() != 0:
            return processes.agreed(None)
        made = dict(self.made, images=fingerprint(images), shape=images.shape, rows=unit.rows)
        return processes.agreed(f'{place}-{fingerprint(np.frombuffer(repr(made).encode(), np.uint8))}')

    def _keep(self, images: np.ndarray, place: str, unit: modules.Unit, see: Callable[[np.ndarray], Arrays],
              cut: Callable[[range], list[range]]) -> None:
        """Writes the features that are missing at `place`, a store of rows."""
        if codestore_shards.is_finished_for_all(place):
            return
        for part in shards.of_this_process(None, place, len(images), unit.rows):
            rows = part.rows(len(images), unit.rows)
            with codestore_shards.part_writer(place, {}, part, rows) as store:
                blocks = cut(rows[store.done:])
                with tqdm(total=len(rows), initial=store.done, desc='features', unit='image', dynamic_ncols=True,
                          disable=jax.process_index() != 0) as bar:
                    for block, seen in ahead(lambda some: (some, see(images[some.start:some.stop])), blocks):
                        store.append(seen, names=[str(i) for i in block])
                        bar.update(len(block))
        codestore_shards.merge_for_all(place)


def inception(path: str | os.PathLike, batch_size: int) -> Network:
    """Released FID weights, which give an `InceptionOutput` of [N, ...].

    Raises:
        FileNotFoundError, ValueError: nothing there, or other weights.
    """
    module, params = convert.from_torch('inception', load_state_dict(storage.local_copy(path)))

    def program(unit: modules.Unit) -> Callable[[np.ndarray], Arrays]:
        mesh = mesh_lib.make_mesh({'data': -1}, jax.local_devices()[:unit.devices])
        on_mesh, size = jax.device_put(params, mesh_lib.replicated(mesh)), unit.rows * unit.devices
        return lambda images: vars(inception_features(module, on_mesh, [images], batch_size=size,
                                                      sharding=mesh_lib.batch_sharding(mesh)))
    return Network(batch_size, dict(network=fingerprint(params)), program, lambda arrays: InceptionOutput(**arrays))


def encoder(path: str | os.PathLike, batch_size: int) -> Network:
    """A DINOv2, which gives class tokens float32 [N, D], or an encoder, which gives its embeddings: a folder or file of
    released weights, or a work directory. Images are cropped, resized and normalised as the network was trained on
    them.

    Raises:
        FileNotFoundError, ValueError: nothing there, or other weights.
    """
    if reading.is_released(path) and reading.kind_of(path) == 'dinov2':
        module, params = reading.read('dinov2', path)
        size = DINOV2_SIZE // module.patch_size * module.patch_size
        crop = CenterCrop(size, IMAGENET_MEAN, IMAGENET_STD)

        def one(params: Any, x: Any) -> Any:
            with jax.default_matmul_precision('highest'):  # products that the hardware rounds would move distances
                return module.apply({'params': params}, x).cls
        return _network(one, params, batch_size, crop, 3)
    model = reading.load(Encoder, path, step=steps.agreed_newest(path))
    one = lambda params, x: encode(model.config, params, x, outputs=('embeddings',))['embeddings']
    return _network(one, model.params, batch_size, model.transform, model.config.data.channels)


def _network(one: Callable[[Any, Any], Any], params: Any, batch_size: int, transform: CenterCrop,
             channels: int) -> Network:
    def program(unit: modules.Unit) -> Callable[[np.ndarray], Arrays]:
        run = modules.Batched(one, params, unit)
        return lambda images: {'features': run(_prepared(transform, images, channels), len(images))}
    made = dict(network=fingerprint(params), transform=repr(transform), channels=channels)
    return Network(batch_size, made, program, lambda arrays: arrays['features'])


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

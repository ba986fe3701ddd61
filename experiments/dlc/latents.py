"""Latents of the released Stable Diffusion autoencoder: how the paper's generator sees images (arXiv 2507.12318 §4)."""
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import convert
from dlc_jax.diffusion.gaussian import to_uint8
from dlc_jax.models.vae import SCALING_FACTOR
from experiments.runtime import modules, storage
from rlhf_jax.weights.files import load_state_dict

IMAGES_A_DEVICE = 16  # at 256 pixels the decoder's widest features take a gigabyte for as many


@dataclasses.dataclass(frozen=True, eq=False)
class LatentDecoder:
    """The frozen autoencoder, over all devices, in float32, products included where the hardware would round them.
    Latents are scaled to about unit variance on this side."""
    module: Any
    params: Any

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'LatentDecoder':
        """From a directory or file of released weights (diffusers names)."""
        return cls(*convert.from_torch('sd_vae', load_state_dict(storage.local_copy(path))))

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(height, width, channels) of the latents of square images of `image_size` pixels."""
        side = image_size // self.module.stride
        return side, side, self.module.latent_channels

    def posterior(self, images: np.ndarray, batch_size: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, scaled, float32 [N, h, w, 4] each. `images`: float32 [N, H, W, 3] in [-1, 1].

        `batch_size`: rows that come together wherever a set is cut, of which a device takes a part at once; 0: all of
        `images`.
        """
        return self._run('posterior', images, batch_size, None)

    def decode(self, latents: np.ndarray, batch_size: int = 0,
               progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Scaled latents [N, h, w, 4] -> images uint8 [N, H, W, 3]; `batch_size` as of `posterior`.

        Bytes leave the devices, not floats: fifty thousand images of 256 pixels are 10 GB as the one, 39 as the other.
        """
        return self._run('decode', latents, batch_size, progress)

    def _run(self, what: str, rows: np.ndarray, batch_size: int, progress: Callable[[int], None] | None) -> Any:
        # A divisor, so that the same rows come together wherever a set is cut at multiples of `batch_size`.
        at_once = max(n for n in range(1, IMAGES_A_DEVICE + 1) if batch_size % n == 0) if batch_size else min(
            IMAGES_A_DEVICE, len(rows))
        return self._compiled(what, modules.Unit(at_once, modules.Unit.of(at_once, len(rows)).devices))(
            rows, len(rows), progress)

    @functools.lru_cache(maxsize=4)
    def _compiled(self, what: str, unit: modules.Unit) -> modules.Batched:
        def posterior(params, images):
            mean, logvar = self.module.apply({'params': params}, images, method='encode')
            return SCALING_FACTOR * mean, SCALING_FACTOR * jnp.exp(0.5 * logvar)

        def decode(params, latents):
            return to_uint8(self.module.apply({'params': params}, latents / SCALING_FACTOR, method='decode'))

        def run(params, rows):
            with jax.default_matmul_precision('highest'):
                return {'posterior': posterior, 'decode': decode}[what](params, rows)
        return modules.Batched(run, self.params, unit)

"""Latents of the released Stable Diffusion autoencoder: how the paper's generator sees images (arXiv 2507.12318 §4)."""
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import convert
from dlc_jax.convert.files import load_state_dict
from experiments.runtime import storage

SCALE = 0.18215  # latents are stored and modelled at about unit variance


@dataclasses.dataclass(frozen=True)
class LatentDecoder:
    """The frozen autoencoder. Call it to turn scaled latents [N, h, w, 4] into images [N, H, W, 3] in [-1, 1]."""
    module: Any
    params: Any

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'LatentDecoder':
        """From a directory or file of released weights (diffusers names)."""
        return cls(*convert.from_torch('sd_vae', load_state_dict(storage.local_copy(path))))

    def __call__(self, latents: np.ndarray, *, batch_size: int = 16) -> np.ndarray:
        decode = jax.jit(lambda p, z: self.module.apply({'params': p}, z / SCALE, method='decode'))
        return self._rows(decode, latents, batch_size)

    def encode(self, images: np.ndarray, key: jax.Array, *, batch_size: int = 16) -> np.ndarray:
        """One posterior sample an image, scaled. `images` float32 [N, H, W, 3] in [-1, 1]."""
        def encode(p, x, k):
            mean, logvar = self.module.apply({'params': p}, x, method='encode')
            return SCALE * (mean + jnp.exp(0.5 * logvar) * jax.random.normal(k, mean.shape))
        return self._rows(jax.jit(encode), images, batch_size, key)

    def _rows(self, fn: Any, x: np.ndarray, batch_size: int, key: jax.Array | None = None) -> np.ndarray:
        out = []
        for i in range(0, len(x), batch_size):
            part = np.asarray(x[i:i + batch_size])
            padded = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
            extra = () if key is None else (jax.random.fold_in(key, i),)
            out.append(np.asarray(fn(self.params, padded, *extra))[:len(part)])
        return np.concatenate(out)

"""Pictures of several parts, and codes of which each position speaks of one part alone."""
import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from dlc_jax import codes as codes_lib
from dlc_jax.preprocess import CenterCrop
from experiments.dlc.encoder import OUTPUTS, Encoder

Region = tuple[int, int, int, int]  # top, bottom, left, right, in pixels


@dataclasses.dataclass(frozen=True)
class PartsTransform:
    """uint8 [H, W, C] -> float32 [parts, h, w, C]: each region as the encoder reads an image."""
    one: CenterCrop
    regions: tuple[Region, ...]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return np.stack([self.one(image[top:bottom, left:right]) for top, bottom, left, right in self.regions])


class PartsEncoder:
    """An encoder that reads each region of a picture by itself; has the methods of `Encoder`.

    The code of a picture is that of its first region, then those of the others; so are its soft code and its embedding.

    Attributes:
        config: of the encoder of one region, but for `model.num_codes`, which is that of all together.
        params: of that encoder.
    """

    def __init__(self, encoder: Encoder, regions: Sequence[Region]):
        self._encoder, self._regions = encoder, tuple(regions)
        self.config: ml_collections.ConfigDict = encoder.config.copy_and_resolve_references().unlock()
        self.config.model.num_codes *= len(self._regions)
        self.params = encoder.params

    @property
    def transform(self) -> PartsTransform:
        """uint8 [H, W, C] -> float32 [parts, h, w, C], without the parameters."""
        return PartsTransform(self._encoder.transform, self._regions)

    def encode(self, images: np.ndarray, *, temperature: float | None = None, batch_size: int = 256,
               outputs: Sequence[str] = OUTPUTS) -> dict[str, np.ndarray]:
        """`codes` int32 [N, parts * L], `sem` float32 [N, parts * L, V], `embeddings` float32 [N, parts * D] of
        preprocessed pictures [N, parts, h, w, C]; `batch_size` regions at once on a device."""
        num, parts, *shape = images.shape
        out = self._encoder.encode(images.reshape(num * parts, *shape), temperature=temperature, batch_size=batch_size,
                                   outputs=outputs)
        return {name: x.reshape(num, parts * x.shape[1], *x.shape[2:]) for name, x in out.items()}

    def encode_images(self, images: Sequence[np.ndarray], **kwargs: Any) -> dict[str, np.ndarray]:
        """`encode` of raw uint8 pictures."""
        transform = self.transform
        return self.encode(np.stack([transform(image) for image in images]), **kwargs)


def belonging(features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """bool [parts, P]: which part each place of `features` [N, P, F] belongs to: the one that explains most of it.

    From what a part explains is taken what as many classes would by chance, which counts where one part has hundreds
    and another has six: shares are of estimates of variances, as in the adjusted coefficient of determination.

    Args:
        classes: int [N, parts], what each part of a picture shows.

    Raises:
        ValueError: a part shows something else in every picture, which explains everything and says nothing.
    """
    counts = np.array([[len(np.unique(of_part))] for of_part in classes.T])
    if counts.max() == len(features):
        raise ValueError(f'{len(features)} pictures of as many classes; give several of each')
    shares = np.stack([codes_lib.explained(features, of_part) for of_part in classes.T])
    shares = 1 - (1 - shares) * (len(features) - 1) / (len(features) - counts)
    return np.arange(len(shares))[:, None] == shares.argmax(0)

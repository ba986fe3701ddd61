"""A judge for data sets of one real picture a class: it names the one that a picture is nearest to."""
import dataclasses

import numpy as np

from dlc_jax.metrics import nearest
from experiments.dlc.grids import Grid

FEATURES = 32  # principal components


@dataclasses.dataclass(frozen=True, eq=False)
class NearestJudge:
    """Has the methods of `judge.PictureJudge` that measurements ask for; nothing is learnt but a mean and a basis.

    Attributes:
        grid: what a label says.
        images: uint8 [M, H, W, C], one of every label.
        labels: int [M].
        mean, basis: float64 [D] and [D, F]: principal components of the images' D values, the largest first.
    """
    grid: Grid
    images: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    basis: np.ndarray

    @classmethod
    def of(cls, grid: Grid, images: np.ndarray, labels: np.ndarray) -> 'NearestJudge':
        """
        Raises:
            ValueError: two images of one label.
        """
        if len(np.unique(labels)) != len(labels):
            raise ValueError(f'{len(labels)} images of {len(np.unique(labels))} labels; give one of each')
        rows = _rows(images)
        mean = rows.mean(0)
        _, _, components = np.linalg.svd(rows - mean, full_matrices=False)
        return cls(grid, images, np.asarray(labels), mean, components[:FEATURES].T)

    def classes_of(self, labels: np.ndarray) -> np.ndarray:
        """int [N, 2]: what labels [N] say."""
        return self.grid.attributes(labels)

    def features(self, images: np.ndarray) -> np.ndarray:
        """float64 [N, F] of uint8 images [N, H, W, C]: their principal components, in units of the full range."""
        return (_rows(images) - self.mean) @ self.basis

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Labels int [N] of the nearest real images, by the distance of pixels."""
        return self.labels[nearest.nearest_distances(_rows(images), _rows(self.images), return_index=True)[1]]


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255

"""Block masks over the patches of the student's global crops (DINOv2, arXiv 2304.07193; iBOT, arXiv 2111.07832 §3).

numpy only: masks are drawn beside the images, in the loader. After the original's `data/masking.py`, `data/collate.py`.
"""
import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockMasking:
    """Draws the patches of global crops that the student does not see.

    Of `n` crops exactly `floor(n * share)` get a mask. The i-th of them aims at a share of patches drawn from the
    i-th equal part of `ratio`, so every batch holds the whole range; the crops are then shuffled. A mask is a union of
    rectangles, and may fall short of its aim (when `tries` rectangles in a row do not fit), never exceed it.

    Attributes:
        grid: patches per side, or (rows, columns); 224 / 14 gives 16.
        share: of crops that get a mask.
        ratio: smallest and largest share of masked patches in such a crop.
        min_patches: smallest area asked of one rectangle. Grids of fewer than about 8 x 8 need 1 or 2: a rectangle
            larger than what is left to mask is rejected.
        max_patches: largest number of patches one rectangle may add; None is half of the grid.
        min_aspect: aspect ratios are log-uniform in [min_aspect, 1 / min_aspect].
        tries: rectangles drawn before giving up on adding to a mask.
    """
    grid: int | tuple[int, int] = 16
    share: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    min_patches: int = 4
    max_patches: int | None = None
    min_aspect: float = 0.3
    tries: int = 10

    def __post_init__(self):
        if min(self.sides) < 1:
            raise ValueError(f'grid={self.grid}: both sides must be at least 1 patch')
        if not 0 <= self.share <= 1:
            raise ValueError(f'share={self.share}: must be in [0, 1]')
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise ValueError(f'ratio={self.ratio}: must be ordered and in [0, 1]')
        if self.min_patches < 1 or self.tries < 1 or (self.max_patches is not None and self.max_patches < 1):
            raise ValueError(f'min_patches={self.min_patches}, max_patches={self.max_patches}, tries={self.tries}: '
                             'must be at least 1')
        if not 0 < self.min_aspect <= 1:
            raise ValueError(f'min_aspect={self.min_aspect}: must be in (0, 1]')

    @property
    def sides(self) -> tuple[int, int]:
        rows, columns = (self.grid, self.grid) if isinstance(self.grid, int) else self.grid
        return rows, columns

    @property
    def num_patches(self) -> int:
        return self.sides[0] * self.sides[1]

    def _bounds(self, num_crops: int) -> np.ndarray:
        """Edges of the parts of `ratio`, one part a masked crop."""
        return np.linspace(*self.ratio, int(num_crops * self.share) + 1)

    def max_masked(self, num_crops: int) -> int:
        """Most patches that masks of `num_crops` crops can hold together: the static M of `pack_masks`. At least 1."""
        bounds = self._bounds(num_crops)[1:]
        return max(1, int(np.floor(self.num_patches * bounds).sum()))

    def mask(self, rng: np.random.Generator, target: int) -> np.ndarray:
        """One mask [rows, columns] bool with at most `target` patches set."""
        rows, columns = self.sides
        limit = self.max_patches or max(1, self.num_patches // 2)
        spread = -math.log(self.min_aspect)
        mask, count = np.zeros(self.sides, bool), 0
        while count < target:
            room = min(target - count, limit)
            for u in rng.random((self.tries, 4)).tolist():  # one call: this loop is most of the cost of a batch
                # With less than min_patches to go the interval is reversed, as in the original: it asks for less.
                area = self.min_patches + (room - self.min_patches) * u[0]
                aspect = math.exp(spread * (2 * u[1] - 1))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if not (0 < height < rows and 0 < width < columns):
                    continue
                top, left = int(u[2] * (rows - height + 1)), int(u[3] * (columns - width + 1))
                block = mask[top:top + height, left:left + width]
                new = height * width - int(np.count_nonzero(block))
                if 0 < new <= room:
                    block[:] = True
                    count += new
                    break
            else:
                break
        return mask

    def __call__(self, rng: np.random.Generator, num_crops: int) -> np.ndarray:
        """Masks of `num_crops` crops: [num_crops, rows * columns] bool, True where the student sees the mask token."""
        bounds = self._bounds(num_crops)
        masks = np.zeros((num_crops, *self.sides), bool)
        for i, (low, high) in enumerate(zip(bounds[:-1], bounds[1:])):
            masks[i] = self.mask(rng, int(self.num_patches * min(high, low + (high - low) * rng.random())))
        return rng.permutation(masks.reshape(num_crops, self.num_patches))


def pack_masks(masks: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of masked patches at a static length, for a gather under jit.

    Args:
        masks: [crops, N] bool.
        size: M, from `BlockMasking.max_masked(crops)`.

    Returns:
        indices: [M] int32 into the flattened [crops * N]; padding points at 0.
        weights: [M] float32, 1 / (number of masked patches in that crop); 0 on padding. Their sum over a batch is the
            number of crops with a mask, so iBOT's loss is `sum(weights * cross_entropy) / crops`.

    Raises:
        ValueError: more than `size` patches are masked.
    """
    masked_index = np.flatnonzero(masks)
    if masked_index.size > size:
        raise ValueError(f'{masked_index.size} masked patches do not fit into size={size}; use BlockMasking.max_masked')
    indices, weights = np.zeros(size, np.int32), np.zeros(size, np.float32)
    indices[:masked_index.size] = masked_index
    weights[:masked_index.size] = 1 / masks.sum(-1)[masked_index // masks.shape[-1]]
    return indices, weights

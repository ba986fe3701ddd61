"""Multi-crop augmentation of the DINOv2 recipe, and the random crop of a linear probe. numpy and PIL only.

The random parameters of all crops are drawn first (`MultiCrop.sample`), then applied by one of two routes: PIL, crop by
crop, for photographs of any size; and numpy over a whole batch of equal-sized small images, where PIL's cost per call
would dominate. The two differ where resizing rounds a pixel the other way, and nowhere else. The operations are
torchvision's on PIL images (`RandomResizedCrop`, `ColorJitter`, `RandomGrayscale`, `GaussianBlur`, `RandomSolarize`),
uint8 rounding included, as composed in the original's `data/augmentations.py`.
"""
import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dlc_jax.preprocess import IMAGENET_MEAN, IMAGENET_STD, check_image, normalize, to_pil
from dlc_jax.ssl import pixels

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CROP_TRIES = 10


class Views(NamedTuple):
    """Drawn parameters of V crops of each of B images; every array leads with [B, V]."""
    top: np.ndarray  # int, crop box in pixels of the image
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray  # bool
    jitter: np.ndarray  # bool
    order: np.ndarray  # [B, V, 4] int, the order of the four jitter operations
    factors: np.ndarray  # [B, V, 4] float, indexed by operation
    gray: np.ndarray  # bool
    blur: np.ndarray  # bool
    sigma: np.ndarray  # float, pixels of the crop
    solarize: np.ndarray  # bool


def sample_boxes(rng: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int],
                 scale: np.ndarray | tuple[float, float],
                 ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of torchvision's `RandomResizedCrop.get_params`: area uniform in `scale`, aspect ratio log-uniform.

    The first of ten draws that fits inside the image is taken; if none does, the largest central box whose aspect
    ratio lies in `ratio`.

    Args:
        shape: of the arrays to return.
        size: (height, width) of the image.
        scale: smallest and largest share of the area, [..., 2], broadcast over `shape`.
        ratio: smallest and largest width / height.

    Returns:
        top, left, height, width: int64 of `shape`.
    """
    rows, columns = size
    u = rng.random((2, *shape, CROP_TRIES))
    scale = np.broadcast_to(scale, (*shape, 2))[..., None]
    area = rows * columns * (scale[..., 0, :] + (scale[..., 1, :] - scale[..., 0, :]) * u[0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * u[1])
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (0 < width) & (width <= columns) & (0 < height) & (height <= rows)
    first = fits.argmax(-1)[..., None]
    width = np.take_along_axis(width, first, -1)[..., 0].astype(np.int64)
    height = np.take_along_axis(height, first, -1)[..., 0].astype(np.int64)

    whole_height, whole_width = rows, columns
    if columns / rows < ratio[0]:
        whole_height = round(columns / ratio[0])
    elif columns / rows > ratio[1]:
        whole_width = round(rows * ratio[1])
    any_fits = fits.any(-1)
    height, width = np.where(any_fits, height, whole_height), np.where(any_fits, width, whole_width)
    place = rng.random((2, *shape))
    top = np.where(any_fits, place[0] * (rows - height + 1), (rows - height) // 2).astype(np.int64)
    left = np.where(any_fits, place[1] * (columns - width + 1), (columns - width) // 2).astype(np.int64)
    return top, left, height, width


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """Two global and `num_local` local crops of an image, each distorted on its own.

    Order for every crop: crop and bicubic resize, flip, colour jitter (its four operations in random order), grayscale,
    blur, solarize, normalise. Colour operations that mean nothing on one channel (saturation, hue, grayscale) are
    skipped there.

    `blur`'s probabilities (first global, second global, local) are what the original does, not what its arguments say:
    its `GaussianBlur(p)` hands 1 - p to `RandomApply`, so p = 1.0, 0.1, 0.5 blur with probability 0, 0.9, 0.5
    (facebookresearch/dinov2, `data/transforms.py`). (1.0, 0.1, 0.5) gives what the papers describe.

    Attributes:
        global_size, local_size: side of the crops in pixels.
        num_local: local crops per image.
        global_scale, local_scale: share of the image's area a crop may cover.
        ratio: width / height of a crop before resizing.
        flip, jitter, grayscale: probability of a horizontal flip, of colour jitter, of grayscale.
        jitter_strength: of brightness, contrast, saturation, hue.
        blur: probability in the first global, the second global and the local crops.
        blur_kernel: taps, odd.
        blur_sigma: range of the standard deviation, pixels.
        solarize: probability in the second global crop; no other crop is solarized.
        solarize_threshold: values from here on are inverted.
        mean, std: of the output's normalisation, values in [0, 1]; as many as channels, or one for all.
    """
    global_size: int = 224
    local_size: int = 98
    num_local: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_kernel: int = 9
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.2
    solarize_threshold: int = 128
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        if self.blur_kernel % 2 != 1:
            raise ValueError(f'blur_kernel={self.blur_kernel}: must be odd')
        if len(self.jitter_strength) != 4 or self.jitter_strength[HUE] > 0.5:
            raise ValueError(f'jitter_strength={self.jitter_strength}: give brightness, contrast, saturation and hue, '
                             'the last at most 0.5')
        for name in ('global_scale', 'local_scale', 'ratio', 'blur_sigma'):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f'{name}={(low, high)}: must be ordered and positive')
        if len(self.blur) != 3:
            raise ValueError(f'blur={self.blur}: give probabilities of (first global, second global, local)')

    @property
    def num_views(self) -> int:
        return 2 + self.num_local

    def _per_view(self, values: tuple) -> np.ndarray:
        """Repeats the values of (first global, second global, local) for each view: [V, ...]."""
        return np.asarray([values[min(i, 2)] for i in range(self.num_views)])

    def sample(self, rng: np.random.Generator, batch: int, size: tuple[int, int]) -> Views:
        """Parameters of the crops of `batch` images of (height, width) `size`: two globals, then the locals."""
        shape = (batch, self.num_views)
        scale = self._per_view((self.global_scale, self.global_scale, self.local_scale))
        top, left, height, width = sample_boxes(rng, shape, size, scale, self.ratio)
        strength = np.asarray(self.jitter_strength)
        low, high = np.maximum(0, 1 - strength), 1 + strength
        low[HUE], high[HUE] = -strength[HUE], strength[HUE]
        chance = rng.random((5, *shape))
        return Views(
            top, left, height, width,
            flip=chance[0] < self.flip,
            jitter=chance[1] < self.jitter,
            order=rng.random((*shape, 4)).argsort(-1),
            factors=low + (high - low) * rng.random((*shape, 4)),
            gray=chance[2] < self.grayscale,
            blur=chance[3] < self._per_view(self.blur),
            sigma=self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * rng.random(shape),
            solarize=chance[4] < self._per_view((0, self.solarize, 0)))

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One image, by PIL.

        Args:
            rng: consumed in an order that depends only on the number of crops.
            image: [H, W, C] uint8, C 1 or 3.

        Returns:
            globals [2, S, S, C] and locals [num_local, s, s, C], float32, normalised.
        """
        return self.apply(image, self.sample(rng, 1, image.shape[:2]))

    def apply(self, image: np.ndarray, views: Views) -> tuple[np.ndarray, np.ndarray]:
        """The crops of one image by PIL, from parameters drawn with batch 1."""
        channels = check_image(image)
        picture = to_pil(image)
        crops = (np.empty((2, self.global_size, self.global_size, channels), np.float32),
                 np.empty((self.num_local, self.local_size, self.local_size, channels), np.float32))
        for i in range(self.num_views):
            view = Views(*(x[0, i] for x in views))
            out = crops[i >= 2][i - 2 * (i >= 2)]
            normalize(self._distort(picture, view, out.shape[0]), self.mean, self.std, out=out)
        return crops

    def _distort(self, picture: Image.Image, view: Views, side: int) -> np.ndarray:
        """One crop, [side, side, C] uint8."""
        # Crop first: `resize(box=...)` would let pixels outside the box into the filter.
        left, top, width, height = (int(x) for x in (view.left, view.top, view.width, view.height))
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        if view.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        color = picture.mode == 'RGB'
        if view.jitter:
            for op in view.order:
                picture = jitter_pil(picture, op, view.factors[op])
        if view.gray and color:
            picture = picture.convert('L').convert('RGB')
        if view.blur:
            blurred = pixels.gaussian_blur(np.asarray(picture, np.float32).reshape(side, side, -1), view.sigma,
                                           self.blur_kernel)
            picture = to_pil(np.rint(blurred).astype(np.uint8))
        if view.solarize:
            picture = ImageOps.solarize(picture, self.solarize_threshold)
        return np.asarray(picture).reshape(side, side, -1)

    def batch(self, rng: np.random.Generator, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Many small images at once, by numpy.

        Args:
            images: [B, H, W, C] uint8, C 1 or 3.

        Returns:
            globals [B, 2, S, S, C] and locals [B, num_local, s, s, C], float32, normalised.
        """
        return self.apply_batch(images, self.sample(rng, images.shape[0], images.shape[1:3]))

    def apply_batch(self, images: np.ndarray, views: Views) -> tuple[np.ndarray, np.ndarray]:
        """The crops of a batch by numpy, from drawn parameters."""
        check_image(images[0])
        planes = np.ascontiguousarray(np.moveaxis(images, -1, 1), np.float32)
        return (self._distort_batch(planes, Views(*(x[:, :2] for x in views)), self.global_size),
                self._distort_batch(planes, Views(*(x[:, 2:] for x in views)), self.local_size))

    def _distort_batch(self, planes: np.ndarray, views: Views, side: int) -> np.ndarray:
        """Crops of one size, whole grey levels until the last line: planes [B, C, H, W] -> [B, V, side, side, C]."""
        x = pixels.resize_boxes(planes, views.top, views.left, views.height, views.width, views.flip, side)
        shape = x.shape  # [B, V, C, side, side]
        x, flat = x.reshape(-1, *shape[2:]), Views(*(a.reshape(-1, *a.shape[2:]) for a in views))
        color = shape[2] == 3
        for place in range(4):
            for op in range(4 if color else SATURATION):
                rows = np.flatnonzero(flat.jitter & (flat.order[:, place] == op))
                if rows.size:
                    x[rows] = JITTER[op](x[rows], flat.factors[rows, op])
        if color:
            rows = np.flatnonzero(flat.gray)
            x[rows] = pixels.luma(x[rows])
        rows = np.flatnonzero(flat.blur)
        if rows.size:
            blurred = pixels.gaussian_blur(x[rows].reshape(-1, side, side, 1), np.repeat(flat.sigma[rows], shape[2]),
                                           self.blur_kernel)
            x[rows] = np.rint(blurred).reshape(-1, *shape[2:])
        rows = np.flatnonzero(flat.solarize)
        x[rows] = np.where(x[rows] < self.solarize_threshold, x[rows], 255 - x[rows])
        out = np.empty((shape[0] * shape[1], side, side, shape[2]), np.float32)
        out[:] = np.moveaxis(x, 1, -1)
        normalize(out, self.mean, self.std, out=out)
        return out.reshape(*shape[:2], side, side, shape[2])


JITTER = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)


def jitter_pil(picture: Image.Image, op: int, factor: float) -> Image.Image:
    """One operation of torchvision's `ColorJitter` on a PIL image; saturation and hue leave gray images alone."""
    if op == BRIGHTNESS:
        return ImageEnhance.Brightness(picture).enhance(factor)
    if op == CONTRAST:
        return ImageEnhance.Contrast(picture).enhance(factor)
    if picture.mode != 'RGB':
        return picture
    if op == SATURATION:
        return ImageEnhance.Color(picture).enhance(factor)
    h, s, v = picture.convert('HSV').split()
    turned = np.asarray(h) + np.int32(factor * 255).astype(np.uint8)  # hue is a circle: uint8 wraps around
    return Image.merge('HSV', (Image.fromarray(turned), s, v)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """One random crop and a flip, for training a linear probe: [H, W, C] uint8 -> [size, size, C] float32."""
    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        channels = check_image(image)
        top, left, height, width = (int(x) for x in sample_boxes(rng, (), image.shape[:2], self.scale, self.ratio))
        crop = to_pil(image[top:top + height, left:left + width])
        crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalize(np.asarray(crop).reshape(self.size, self.size, channels), self.mean, self.std)

"""How an image becomes a network's input without any randomness: centre crops and normalisation. numpy and PIL only."""
import dataclasses

import numpy as np
from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_image(image: np.ndarray) -> int:
    """Number of channels of an [H, W, 1 or 3] uint8 image; a ValueError on anything else."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f'image is {image.dtype} {image.shape}; expected uint8 [height, width, 1 or 3]')
    return image.shape[-1]


def to_pil(image: np.ndarray) -> Image.Image:
    """[H, W, C] uint8 to mode L (C = 1) or RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def normalize(x: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], *,
              out: np.ndarray | None = None) -> np.ndarray:
    """(x / 255 - mean) / std over the last axis of [..., W, C], float32. `out` may be `x`.

    Raises:
        ValueError: `mean` and `std` have neither one entry nor one a channel.
    """
    for name, values in (('mean', mean), ('std', std)):
        if len(values) not in (1, x.shape[-1]):
            raise ValueError(f'{name}={values} does not fit {x.shape[-1]} channel(s); give 1 or {x.shape[-1]} values')
    out = np.empty(x.shape, np.float32) if out is None else out
    # Whole rows at a time: broadcasting over three channels would make numpy's inner loop three long.
    scale, shift = 1 / (255 * np.asarray(std)), np.asarray(mean) / np.asarray(std)
    scales, shifts = (np.broadcast_to(v, x.shape[-2:]).astype(np.float32).ravel() for v in (scale, shift))
    rows = out.reshape(-1, scales.size)
    np.multiply(x.reshape(-1, scales.size), scales, out=rows, dtype=np.float32)
    rows -= shifts
    return out


LONGEST_SIDES = 32  # of the short side: how much of a long image is resized before its centre is cut out


def _central(picture: Image.Image) -> Image.Image:
    """The middle of `picture`, `LONGEST_SIDES` times as long as it is wide; `picture` itself where it is not longer."""
    limit = LONGEST_SIDES * min(picture.size)
    width, height = (min(side, limit) for side in picture.size)
    if (width, height) == picture.size:
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's preprocessing (openai/guided-diffusion, `image_datasets.py`).

    Halved by averaging while twice too large, then resized (bicubic) so that the short side is `size`, then the central
    square. Smaller images are enlarged. Of images longer than `LONGEST_SIDES` times their short side, only the central
    part is resized: whole, a picture of 1 x 60000 pixels would grow to gigabytes.

    Args:
        image: [H, W, C] uint8.

    Returns:
        [size, size, C] uint8.
    """
    channels = check_image(image)
    picture = _central(to_pil(image))
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).reshape(size, size, channels)


def resize_center_crop(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """torchvision's `Resize(resize, bicubic)`, then `CenterCrop(size)`: [H, W, C] uint8 -> [size, size, C] uint8."""
    if size > resize:
        raise ValueError(f'size={size} is larger than resize={resize}')
    channels = check_image(image)
    picture = _central(to_pil(image))
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(resize * width / short), int(resize * height / short)), Image.Resampling.BICUBIC)
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size))).reshape(size, size, channels)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """`center_crop` and normalise: [H, W, C] uint8 -> [size, size, C] float32. mean = std = (0.5,) gives [-1, 1]."""
    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return normalize(center_crop(image, self.size), self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class ResizeCenterCrop:
    """`resize_center_crop` and normalise, as DINOv2 evaluates: [H, W, C] uint8 -> [size, size, C] float32."""
    resize: int = 256
    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return normalize(resize_center_crop(image, self.resize, self.size), self.mean, self.std)

"""Image arithmetic over batches in numpy, matching Pillow's and torchvision's uint8 results.

Planes are channels first, float32 holding whole numbers in [0, 255]: [n, C, H, W]. Each function documents the Pillow
call whose rounding it follows.
"""
import numpy as np


def resample_weights(start: np.ndarray, length: np.ndarray, size: int, side: int) -> np.ndarray:
    """Pillow's antialiased bicubic filter (a = -0.5) along one axis, as matrices.

    Args:
        start, length: [...] int, the interval to resample, inside [0, size).
        size: pixels along the axis of the source.
        side: pixels along the axis of the result.

    Returns:
        [..., side, size] float32, zero outside the interval: as if the interval were cut out first.
    """
    start, length = (x[..., None, None].astype(np.float32) for x in (start, length))
    scale = length / np.float32(side)
    width = np.maximum(scale, 1)  # the filter widens when shrinking
    center = (np.arange(side, dtype=np.float32)[:, None] + 0.5) * scale
    pixel = np.arange(size, dtype=np.float32) - start
    distance = np.abs((pixel + 0.5 - center) / width)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, far)
    weights *= (distance < 2) & (pixel >= 0) & (pixel < length)
    return weights / weights.sum(-1, keepdims=True)


def whole(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest value a uint8 can hold, in place."""
    return np.clip(np.rint(x, out=x), 0, 255, out=x)


def resize_boxes(planes: np.ndarray, top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray,
                 flip: np.ndarray, side: int) -> np.ndarray:
    """V boxes of each of B images: cut out, resized to `side` x `side` (`Image.resize`, bicubic), flipped where `flip`.

    Args:
        planes: [B, C, H, W].
        top, left, height, width, flip: [B, V].

    Returns:
        [B, V, C, side, side].
    """
    across = resample_weights(left, width, planes.shape[3], side)
    across = np.where(flip[..., None, None], across[..., ::-1, :], across)
    down = resample_weights(top, height, planes.shape[2], side)
    # Pillow rounds to uint8 between the passes, which also cuts overshoot; recent versions may filter columns first.
    x = whole(planes[:, None] @ np.swapaxes(across, -1, -2)[:, :, None])
    return whole(down[:, :, None] @ x)


def blend(degenerate: np.ndarray | np.floating, x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blends as `Image.blend`: degenerate + factor (x - degenerate), cut to [0, 255] and truncated. `factor`: [n]."""
    factor = factor.astype(np.float32)[:, None, None, None]
    return np.floor(np.clip(degenerate + factor * (x - degenerate), 0, 255))


def luma(x: np.ndarray) -> np.ndarray:
    """Grey levels as of `Image.convert('L')`: [n, 3, H, W] -> [n, 1, H, W]; one channel is returned as it is."""
    if x.shape[1] == 1:
        return x
    # Fixed point with 16 bits: the sums stay below 2^24, so float32 holds them exactly.
    return np.floor((19595 * x[:, :1] + 38470 * x[:, 1:2] + 7471 * x[:, 2:] + 32768) / 65536)


def brightness(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Changes the brightness (`ImageEnhance.Brightness`)."""
    return blend(np.float32(0), x, factor)


def contrast(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Changes the contrast (`ImageEnhance.Contrast`): away from the rounded mean gray level of each image."""
    mean = np.floor(luma(x).mean((1, 2, 3), dtype=np.float64) + 0.5).astype(np.float32)
    return blend(mean[:, None, None, None], x, factor)


def saturation(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Changes the saturation (`ImageEnhance.Color`): away from the grayscale image."""
    return blend(luma(x), x, factor)


# Pillow's HSV -> RGB reads hue and saturation through 256 values each; doubles, rounded to float, as in its C code.
_SECTOR = np.arange(256) * 6 / 255
_PART = np.floor(_SECTOR).astype(np.intp) % 6
_REST = (_SECTOR - np.floor(_SECTOR)).astype(np.float32)
_SHARE = (np.arange(256) / 255).astype(np.float32)
# Which of (v, p, q, t) red, green and blue take in each sixth of the circle.
_RED, _GREEN, _BLUE = np.array([0, 2, 1, 1, 3, 0]), np.array([3, 0, 0, 2, 1, 1]), np.array([1, 1, 3, 0, 0, 2])


def hue(x: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Turns the hue by `factor` of the circle, through Pillow's 8-bit HSV (torchvision's `adjust_hue`)."""
    red, green, blue = x[:, 0], x[:, 1], x[:, 2]
    value, low = x.max(1), x.min(1)
    chroma = value - low
    safe = np.where(chroma > 0, chroma, 1)
    # Many hues fall on whole numbers, so the roundings to float must come where Pillow's do.
    to_red, to_green, to_blue = (((value - channel) / safe).astype(np.float64) for channel in (red, green, blue))
    sector = np.where(red == value, to_blue - to_green,
                      np.where(green == value, 2 + to_red - to_blue, 4 + to_green - to_red)).astype(np.float32)
    turn = np.fmod(sector.astype(np.float64) / 6 + 1, 1).astype(np.float32)
    h = np.where(chroma > 0, turn.astype(np.float64) * 255, 0).astype(np.int16)
    s = ((chroma / np.maximum(value, 1)).astype(np.float64) * 255).astype(np.int16)
    h = (h + np.trunc(factor * 255).astype(np.int16)[:, None, None]) & 255

    part, rest, share = _PART[h], _REST[h].astype(np.float64), _SHARE[s].astype(np.float64)
    p, q, t = (np.floor(value * (1 - share * f) + 0.5).astype(np.float32) for f in (1, rest, 1 - rest))
    return np.stack([np.choose(channel[part], (value, p, q, t)) for channel in (_RED, _GREEN, _BLUE)], 1)


def gaussian_blur(x: np.ndarray, sigma: np.ndarray | float, kernel: int) -> np.ndarray:
    """Separable Gaussian blur with reflected borders (torchvision's `gaussian_blur`), unrounded.

    Args:
        x: [..., H, W, C] float32.
        sigma: standard deviation in pixels, one for each of the leading axes.
        kernel: odd number of taps.
    """
    half = kernel // 2
    taps = np.exp(-0.5 * (np.arange(half + 1) / np.asarray(sigma, np.float64)[..., None]) ** 2)
    taps = (taps / (2 * taps.sum(-1, keepdims=True) - taps[..., :1])).astype(np.float32)[..., None, None, None, :]
    for axis in (-3, -2):
        size = x.shape[axis]
        # Images smaller than the kernel are reflected more than once; torch would raise.
        index = np.pad(np.arange(size), half, mode='reflect') if size > 1 else np.zeros(1 + 2 * half, np.intp)
        padded = np.take(x, index, axis)
        windows = [padded[(..., slice(k, k + size), slice(None), slice(None))[:4 if axis == -3 else 3]]
                   for k in range(2 * half + 1)]
        x = windows[half] * taps[..., 0]
        pair = np.empty_like(x)
        for offset in range(1, half + 1):
            np.add(windows[half - offset], windows[half + offset], out=pair)
            pair *= taps[..., offset]
            x += pair
    return x

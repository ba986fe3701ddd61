"""Oracles are worked out by hand or are Pillow itself; the numpy route is checked against the Pillow route."""
import numpy as np
import pytest
from PIL import Image

from dlc_jax.preprocess import CenterCrop, ResizeCenterCrop, center_crop, resize_center_crop
from dlc_jax.ssl import pixels
from dlc_jax.ssl.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    MultiCrop,
    RandomResizedCrop,
    Views,
    jitter_pil,
    sample_boxes,
)

RATIO = (3 / 4, 4 / 3)


class Fixed:
    """A generator that hands out the given numbers."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def random(self, shape):
        return np.broadcast_to(np.asarray(self.draws.pop(0), float), shape)


def tries(*pairs):
    """Area and aspect draws, the last one repeated up to ten."""
    pairs = list(pairs) + [pairs[-1]] * (10 - len(pairs))
    return np.asarray(pairs).T


def raw(**kw):
    """A MultiCrop whose output is the grey level itself."""
    return MultiCrop(mean=(0.0,), std=(1 / 255,), **kw)


def photos(n, size, channels, seed=0):
    rng = np.random.default_rng(seed)
    smooth = [np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((size, size), 2))
              for _ in range(n // 2)]
    noise = rng.integers(0, 256, (n - n // 2, size, size, 3), np.uint8)
    return np.concatenate([smooth, noise])[..., :channels]


# ---- Crop boxes: rows 100, columns 200 -----------------------------------------------------------------------------

def test_box_by_hand():
    # area 20000 (0.1 + 0.4 / 2) = 6000, aspect exp(0) = 1: side round(77.46) = 77; 24 rows, 124 columns to choose from.
    box = sample_boxes(Fixed(tries((0.5, 0.5)), [0.5, 0.25]), (), (100, 200), (0.1, 0.5), RATIO)
    assert [int(x) for x in box] == [12, 31, 77, 77]


def test_box_aspect_is_width_over_height_and_log_uniform():
    # aspect draw 1: 4/3. area 4800: width sqrt(6400) = 80, height sqrt(3600) = 60.
    box = sample_boxes(Fixed(tries((0.35, 1.0)), [0.0, 0.0]), (), (100, 200), (0.1, 0.5), RATIO)
    assert [int(x) for x in box] == [0, 0, 60, 80]


def test_first_try_that_fits_is_taken():
    # Whole area at aspect 1 asks for 141 rows of 100; the second try gives 10000: 100 x 100.
    draws = Fixed(tries((1.0, 0.5), (0.0, 0.5), (0.1, 0.5)), [0.99, 0.99])
    box = sample_boxes(draws, (), (100, 200), (0.5, 1.0), RATIO)
    assert [int(x) for x in box] == [0, 99, 100, 100]


@pytest.mark.parametrize('size,expected', [((100, 200), [0, 33, 100, 133]), ((200, 100), [33, 0, 133, 100]),
                                           ((100, 110), [0, 0, 100, 110])])
def test_fallback_is_the_central_box_of_allowed_shape(size, expected):
    box = sample_boxes(Fixed(tries((1.0, 0.5)), [0.7, 0.7]), (), size, (2.0, 2.0), RATIO)
    assert [int(x) for x in box] == expected


def test_boxes_fill_the_scale_and_stay_inside():
    top, left, height, width = sample_boxes(np.random.default_rng(0), (4000,), (50, 60), (0.05, 0.32), RATIO)
    share = height * width / 3000
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 50).all() and (left + width <= 60).all()
    assert share.min() > 0.04 and share.max() < 0.34 and abs(share.mean() - 0.185) < 0.005
    assert (top + height == 50).any() and (left + width == 60).any()
    assert abs(np.log(width / height).mean()) < 0.02


# ---- Colour operations ---------------------------------------------------------------------------------------------

def both(op, colors, factor):
    """The operation on one-pixel-high images by Pillow and by numpy: [n, 3] each."""
    image = np.asarray(colors, np.uint8)[None]
    pil = np.asarray(jitter_pil(Image.fromarray(image), op, factor))[0]
    planes = np.moveaxis(image, -1, 0)[None].astype(np.float32)
    ours = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)[op](planes, np.array([factor]))
    return pil.tolist(), np.moveaxis(ours[0], 0, -1)[0].astype(int).tolist()


@pytest.mark.parametrize('op,colors,factor,expected', [
    (BRIGHTNESS, [(101, 200, 0)], 1.5, [(151, 255, 0)]),  # 151.5 is truncated, 300 cut
    (BRIGHTNESS, [(101, 200, 0)], 0.6, [(60, 120, 0)]),
    # Gray levels 50 and 101, mean 75.5 rounded to 76: 76 + 1.4 (50 - 76) = 39.6, 76 + 1.4 (101 - 76) = 111.
    (CONTRAST, [(50, 50, 50), (101, 101, 101)], 1.4, [(39, 39, 39), (111, 111, 111)]),
    # Gray level (19595 200 + 38470 100 + 7471 50 + 32768) >> 16 = 124.
    (SATURATION, [(200, 100, 50)], 0.5, [(162, 112, 87)]),
    (HUE, [(255, 0, 0)], 1 / 3, [(0, 255, 0)]),
    # -85 wraps to 171, sector 171 6 / 255 = 4.0235: red 255 0.0235 = 6.
    (HUE, [(255, 0, 0)], -1 / 3, [(6, 0, 255)]),
    (HUE, [(80, 80, 80)], 0.1, [(80, 80, 80)]),
])
def test_jitter_by_hand(op, colors, factor, expected):
    for got in both(op, colors, factor):
        assert [tuple(c) for c in got] == expected


@pytest.mark.parametrize('op,low,high', [(BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.8, 1.2),
                                         (HUE, -0.1, 0.1)])
def test_numpy_jitter_is_pillows_bit_for_bit(op, low, high):
    images = photos(12, 24, 3)
    factors = np.random.default_rng(1).uniform(low, high, 12)
    ours = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)[op](
        np.moveaxis(images, -1, 1).astype(np.float32), factors)
    pil = np.stack([np.asarray(jitter_pil(Image.fromarray(x), op, f)) for x, f in zip(images, factors)])
    np.testing.assert_array_equal(np.moveaxis(ours, 1, -1), pil)


def test_resize_is_pillows_to_one_level():
    images = photos(8, 20, 3)
    top, left, height, width = sample_boxes(np.random.default_rng(0), (8, 1), (20, 20), (0.1, 1.0), RATIO)
    flip = np.arange(8)[:, None] % 2 == 1
    for side in (7, 12, 33):
        ours = pixels.resize_boxes(np.moveaxis(images, -1, 1).astype(np.float32), top, left, height, width, flip, side)
        for i in range(8):
            box = (left[i, 0], top[i, 0], left[i, 0] + width[i, 0], top[i, 0] + height[i, 0])
            # Rows first, whatever order this version of Pillow prefers.
            pil = Image.fromarray(images[i]).crop(box).resize((side, int(height[i, 0])), Image.Resampling.BICUBIC)
            pil = np.asarray(pil.resize((side, side), Image.Resampling.BICUBIC))
            pil = pil[:, ::-1] if flip[i, 0] else pil
            difference = np.abs(np.moveaxis(ours[i, 0], 0, -1) - pil)
            assert difference.max() <= 1 and difference.mean() < 0.05


def test_blur_by_hand():
    impulse = np.zeros((5, 5, 1), np.float32)
    impulse[2, 2] = 255
    side, center = np.exp(-0.5) / (1 + 2 * np.exp(-0.5)), 1 / (1 + 2 * np.exp(-0.5))
    out = pixels.gaussian_blur(impulse, 1.0, 3)[..., 0]
    np.testing.assert_allclose(out[1:4, 1:4], 255 * np.outer([side, center, side], [side, center, side]), rtol=1e-5)
    assert out[0].max() == 0
    ramp = np.broadcast_to(10 * np.arange(4, dtype=np.float32)[:, None, None], (4, 4, 1))
    np.testing.assert_allclose(pixels.gaussian_blur(ramp, 1.0, 3)[:, 0, 0],
                               [20 * side, 10, 20, 30 * center + 40 * side], rtol=1e-5)
    # One sigma for each leading index; an image smaller than the kernel.
    stack = np.stack([impulse, impulse])
    np.testing.assert_allclose(pixels.gaussian_blur(stack, np.array([1.0, 0.5]), 9)[1],
                               pixels.gaussian_blur(impulse, 0.5, 9), rtol=1e-5)
    np.testing.assert_allclose(pixels.gaussian_blur(np.full((2, 1, 1), 7.0, np.float32), 1.0, 9), 7, rtol=1e-6)


# ---- MultiCrop -----------------------------------------------------------------------------------------------------

def test_probabilities_of_each_view():
    views = MultiCrop(num_local=3).sample(np.random.default_rng(0), 4000, (32, 32))
    close = dict(atol=0.03)
    np.testing.assert_allclose(views.blur.mean(0), [0, 0.9, 0.5, 0.5, 0.5], **close)  # p inverted, as in the original
    np.testing.assert_allclose(views.solarize.mean(0), [0, 0.2, 0, 0, 0], **close)
    np.testing.assert_allclose(views.flip.mean(0), 0.5, **close)
    np.testing.assert_allclose(views.jitter.mean(0), 0.8, **close)
    np.testing.assert_allclose(views.gray.mean(0), 0.2, **close)
    low, high = views.factors.min((0, 1)), views.factors.max((0, 1))
    np.testing.assert_allclose(low, [0.6, 0.6, 0.8, -0.1], atol=0.01)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.2, 0.1], atol=0.01)
    assert (views.sigma >= 0.1).all() and (views.sigma <= 2).all() and abs(views.sigma.mean() - 1.05) < 0.03
    assert (np.sort(views.order, -1) == np.arange(4)).all()
    np.testing.assert_allclose((views.order[..., 0, None] == np.arange(4)).mean((0, 1)), 0.25, **close)
    assert MultiCrop(blur=(1.0, 0.1, 0.5)).sample(np.random.default_rng(0), 9, (9, 9)).blur[:, 0].all()


def test_scales_of_each_view():
    views = MultiCrop(num_local=2).sample(np.random.default_rng(0), 2000, (64, 64))
    share = views.height * views.width / 64 ** 2
    assert share[:, :2].min() > 0.3 and share[:, 2:].max() < 0.34
    assert share[:, :2].max() > 0.95 and share[:, 2:].min() < 0.06


@pytest.mark.parametrize('channels', [1, 3])
def test_both_routes_agree(channels):
    # Hue is left out: through 8-bit HSV it turns one level of resizing into several. It is compared on its own above.
    crop = raw(global_size=24, local_size=10, num_local=3, jitter_strength=(0.4, 0.4, 0.2, 0.0))
    images = photos(10, 20, channels)
    views = crop.sample(np.random.default_rng(2), 10, (20, 20))
    for flag in views[4:6] + (views.gray, views.blur, views.solarize):
        assert flag.any() and not flag.all()
    whole, small = crop.apply_batch(images, views)
    assert whole.shape == (10, 2, 24, 24, channels) and small.shape == (10, 3, 10, 10, channels)
    assert whole.dtype == small.dtype == np.float32
    for i in range(10):
        one = crop.apply(images[i], Views(*(x[i:i + 1] for x in views)))
        for a, b in zip(one, (whole[i], small[i])):
            # Some versions of Pillow resize columns first, which rounds (and cuts overshoot) differently.
            assert np.abs(a - b).mean() < 0.5 and (np.abs(a - b) > 3.5).mean() < 0.03


def test_identity_crop_normalised():
    still = MultiCrop(global_size=16, local_size=16, num_local=1, global_scale=(1, 1), local_scale=(1, 1), ratio=(1, 1),
                      flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)
    image = photos(2, 16, 3)[0]
    whole, small = still(np.random.default_rng(0), image)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for got in (whole[0], whole[1], small[0], still.batch(np.random.default_rng(0), image[None])[0][0, 1]):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_solarize_threshold_and_view():
    crop = raw(global_size=4, local_size=4, num_local=1, global_scale=(1, 1), local_scale=(1, 1), ratio=(1, 1), flip=0,
               jitter=0, blur=(0, 0, 0), solarize=1)
    image = np.zeros((4, 4, 1), np.uint8)
    image[0, :, 0] = [127, 128, 200, 255]
    batch = [x[0] for x in crop.batch(np.random.default_rng(0), image[None])]
    for whole, small in (crop(np.random.default_rng(0), image), batch):
        np.testing.assert_allclose(whole[1, 0, :, 0], [127, 127, 55, 0], atol=1e-4)
        np.testing.assert_allclose(whole[0], image, atol=1e-4)
        np.testing.assert_allclose(small[0], image, atol=1e-4)


def test_deterministic_and_views_differ():
    crop, image = MultiCrop(global_size=16, local_size=8, num_local=2), photos(2, 30, 3)[0]
    one, two = (crop(np.random.default_rng(5), image) for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert np.abs(one[0][0] - one[0][1]).max() > 0.1 and np.abs(one[1][0] - one[1][1]).max() > 0.1


@pytest.mark.parametrize('image,match', [
    (np.zeros((8, 8, 3), np.float32), 'uint8'), (np.zeros((8, 8), np.uint8), r'\(8, 8\)'),
    (np.zeros((8, 8, 4), np.uint8), '1 or 3')])
def test_bad_images_are_named(image, match):
    with pytest.raises(ValueError, match=match):
        MultiCrop()(np.random.default_rng(0), image)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match='mean=.*1 channel'):
        MultiCrop()(np.random.default_rng(0), np.zeros((8, 8, 1), np.uint8))
    for field, value in (('blur_kernel', 8), ('jitter_strength', (0.4, 0.4, 0.2, 0.7)), ('local_scale', (0.5, 0.1)),
                         ('blur', (0.5, 0.5))):
        with pytest.raises(ValueError, match=field):
            MultiCrop(**{field: value})


# ---- Evaluation transforms -----------------------------------------------------------------------------------------

def test_center_crop_halves_by_averaging():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 1), np.uint8)
    half = image[..., 0].reshape(4, 2, 6, 2).mean((1, 3))
    quarter = np.rint(half).reshape(2, 2, 3, 2).mean((1, 3))
    # Box halving stops at 2 x 3, which is cut to the two left columns: (3 - 2) // 2 = 0.
    np.testing.assert_allclose(center_crop(image, 2)[..., 0], quarter[:, :2], atol=2)  # Pillow rounds each pass up


def test_center_crop_of_small_and_large_images():
    image = photos(2, 30, 3)[0][:, :23]
    for size in (8, 14, 23, 64):
        assert center_crop(image, size).shape == (size, size, 3)
    np.testing.assert_array_equal(center_crop(image, 23), image[3:26])
    np.testing.assert_array_equal(center_crop(image[..., :1], 23), image[3:26, :, :1])


def test_resize_center_crop_geometry():
    image = photos(2, 40, 3)[0][:, :30]
    expected = np.asarray(Image.fromarray(image).resize((20, 26), Image.Resampling.BICUBIC))[5:21, 2:18]
    np.testing.assert_array_equal(resize_center_crop(image, 20, 16), expected)
    assert ResizeCenterCrop(20, 16)(image).shape == (16, 16, 3)
    with pytest.raises(ValueError, match='size=21'):
        resize_center_crop(image, 20, 21)


def test_transforms_normalise():
    image = np.full((9, 9, 1), 255, np.uint8)
    np.testing.assert_allclose(CenterCrop(6, (0.5,), (0.5,))(image), 1, atol=1e-6)
    out = RandomResizedCrop(6, mean=(0.5,), std=(0.5,))(np.random.default_rng(0), image)
    assert out.shape == (6, 6, 1) and out.dtype == np.float32
    np.testing.assert_allclose(out, 1, atol=1e-6)
    np.testing.assert_allclose(CenterCrop(4)(np.full((4, 4, 3), 255, np.uint8))[0, 0],
                               [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], atol=1e-5)

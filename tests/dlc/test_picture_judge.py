"""Judges: what is written is what was fitted, and labels say what each region shows."""
import json

import numpy as np
import pytest

from dlc_jax import codes as codes_lib
from experiments.dlc import evaluation, parts
from experiments.dlc.judge import Judge, PictureJudge

REGIONS = ((0, 3, 1, 4), (3, 6, 1, 4))


@pytest.fixture(scope='module')
def fitted():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    images = rng.integers(0, 60, (200, 3, 3, 1)) + labels[:, None, None, None] * 50
    return PictureJudge(Judge.fit(images.astype(np.uint8), labels), (6, 6, 1), REGIONS)


def pictures(upper, lower):
    x = np.zeros((len(upper), 6, 6, 1), np.uint8)
    x[:, :3, 1:4], x[:, 3:, 1:4] = (50 * np.asarray(y)[:, None, None, None] + 30 for y in (upper, lower))
    return x


def test_a_judge_is_read_as_it_was_fitted(fitted, tmp_path):
    fitted.save(tmp_path)
    read = PictureJudge.load(tmp_path)
    x = np.random.default_rng(1).integers(0, 256, (50, 3, 3, 1)).astype(np.uint8)
    np.testing.assert_allclose(read.judge.probabilities(x), fitted.judge.probabilities(x), rtol=1e-12)
    np.testing.assert_array_equal(read.judge.predict(x), fitted.judge.predict(x))
    np.testing.assert_allclose(read.judge.features(x), fitted.judge.features(x), rtol=1e-12)
    assert (read.shape, read.regions, read.num_labels) == ((6, 6, 1), REGIONS, 16)


def test_labels_say_the_class_of_each_region(fitted):
    upper, lower = np.array([3, 0, 2]), np.array([1, 1, 2])
    images = pictures(upper, lower) / 255.0
    np.testing.assert_array_equal(fitted.classes_of(4 * upper + lower), np.stack([upper, lower], 1))
    right = fitted.agreement(images, 4 * upper + lower)
    assert right.dtype == np.float32 and (right > 0.8).all()
    swapped = fitted.agreement(images, 4 * lower + upper)
    assert (swapped[:2] < 0.1).all() and swapped[2] == right[2]
    p = [fitted.judge.probabilities(part * 255)[0] for part in fitted.parts(images)]
    assert right[0] == pytest.approx(p[0][3] * p[1][1], rel=1e-6)


def test_a_judge_of_regions_measures_as_one_of_pictures(fitted):
    upper, lower = np.array([3, 0, 2]), np.array([1, 1, 2])
    images = pictures(upper, lower)
    np.testing.assert_array_equal(fitted.classes, np.arange(16))
    np.testing.assert_array_equal(fitted.predict(images), 4 * upper + lower)
    p, (of_upper, of_lower) = fitted.probabilities(images), map(fitted.judge.probabilities, fitted.parts(images))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(p[0].reshape(4, 4), np.outer(of_upper[0], of_lower[0]), rtol=1e-12)
    features = fitted.features(images)
    assert features.shape == (3, 128)
    np.testing.assert_array_equal(features[0, :64], fitted.judge.features(fitted.parts(images)[0])[0])


def test_compositions_of_parts_by_hand(fitted):
    """Sources (3, 1) and (0, 2): the first itself, the second, crossed, crossed the other way round, neither."""
    images = pictures([3, 0, 3, 0, 1], [1, 2, 2, 1, 1])
    first, second = np.full(5, 4 * 3 + 1), np.full(5, 4 * 0 + 2)
    row = evaluation.composition_of_attributes(fitted, images, first, second, images[2:3])
    assert {name: row[name] for name in row if not name.startswith('nearest')} == {
        'first': 0.2, 'second': 0.2, 'either': 0.4, 'of_first': 0.4, 'of_second': 0.4, 'crossed': 0.2, 'both': 0.4}
    again = evaluation.composition_of_attributes(fitted, images[2:3], first[:1], second[:1], images)
    assert again['nearest_train'] == again['nearest_features'] == 0 < row['nearest_features']


def test_places_belong_to_the_part_that_explains_them():
    rng = np.random.default_rng(0)
    classes, noise = rng.integers(0, 4, (400, 2)), rng.random(400) < 0.3
    tokens = np.stack([classes[:, 1], np.where(noise, 0, classes[:, 0]), classes[:, 0] // 2], 1)
    np.testing.assert_array_equal(parts.belonging(codes_lib.one_hot(tokens, 4), classes),
                                  [[False, True, True], [True, False, False]])


def test_many_classes_explain_no_more_than_they_know():
    """A hundred classes explain a quarter of any noise of 400 pictures, which two classes do not."""
    rng = np.random.default_rng(0)
    classes = np.stack([np.arange(400) // 4, rng.integers(0, 2, 400)], 1)
    features = rng.normal(size=(400, 20, 1))
    features[:, :10, 0] += classes[:, 1:]  # a fifth of the variance
    shares = np.stack([codes_lib.explained(features, of_part) for of_part in classes.T])
    assert (shares[0, :10] > shares[1, :10]).any()
    assert parts.belonging(features, classes)[1, :10].all()
    with pytest.raises(ValueError, match='400 pictures of as many classes'):
        parts.belonging(features, np.stack([np.arange(400), classes[:, 1]], 1))


def test_a_folder_that_holds_no_judge(fitted, tmp_path):
    fitted.save(tmp_path)
    (tmp_path / 'judge.npz').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='its judge.npz is damaged'):
        PictureJudge.load(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps({'experiment': 'encoder'}))
    with pytest.raises(ValueError, match="experiment='encoder', not a judge"):
        PictureJudge.load(tmp_path)

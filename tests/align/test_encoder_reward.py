"""The reward by an encoder: how near the soft code of a picture is to that of the image in its row."""
import numpy as np
import pytest

from align_runs import SIDE, devices, write_encoder
from experiments.align import rewards
from experiments.dlc.encoder import Encoder


class Rows(list):
    """Rows as a code store gives them: a list that names its fields."""
    fields = ('caption', 'image')


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """Work directory of an encoder of random weights."""
    folder = tmp_path_factory.mktemp('encoder') / 'run'
    write_encoder(folder)
    return folder


def images(seed, num=5):
    return np.random.default_rng(seed).integers(0, 256, (num, SIDE, SIDE, 1)).astype(np.uint8)


def test_a_picture_is_as_good_as_its_soft_code_is_near_that_of_its_row(encoder):
    drawn, wanted = images(1), images(2)
    wanted[0] = drawn[0]
    rows = Rows({'caption': 'a', 'image': image} for image in wanted)
    reward = rewards.find('reward.kind', str(encoder), rows, (SIDE, SIDE, 1), devices(2, data=2))
    scores = reward(rewards.Pictures(drawn.astype(np.float32) / 255, rows, np.ones(5, bool)))
    codes = [Encoder.load(encoder).encode_images(list(x), outputs=('sem',))['sem'].reshape(5, -1)
             for x in (drawn, wanted)]
    cosines = (codes[0] * codes[1]).sum(1) / np.linalg.norm(codes[0], axis=1) / np.linalg.norm(codes[1], axis=1)
    np.testing.assert_allclose(scores, cosines, rtol=1e-5)
    assert scores[0] == pytest.approx(1) and scores[1:].max() < 0.99


def test_rows_without_an_image_and_pictures_of_other_channels_are_refused(encoder):
    rows = Rows({'caption': 'a', 'image': image} for image in images(2))
    with pytest.raises(ValueError, match=r'reward.gold: .*reads images of 1 channels, but the generator makes'):
        rewards.find('reward.gold', str(encoder), rows, (SIDE, SIDE, 3), devices(1))
    rows.fields = ('caption',)
    with pytest.raises(ValueError, match=r"reward.kind: .*needs the 'image' of each caption"):
        rewards.find('reward.kind', str(encoder), rows, (SIDE, SIDE, 1), devices(1))

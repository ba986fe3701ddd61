"""Emoji of people: what names of files say, which combinations are kept apart, and who judges what is composed."""
import numpy as np
import pytest
from PIL import Image

from configs.dlc import quickstart
from experiments.dlc import evaluation, grids
from experiments.dlc.data import emoji, sources
from experiments.dlc.nearest_judge import NearestJudge
from experiments.quickstarts import compositions

# Names of one role's pictures: with a person's code point, and with a sign that follows the role.
FARMER = [f'emoji_u{person}{tone}_200d_1f33e.png' for person in ('1f9d1', '1f468', '1f469')
          for tone in ('', *(f'_1f3f{c}' for c in 'bcdef'))]
RUNNER = [f'emoji_u1f3c3{tone}{sign}.png' for sign in ('', '_200d_2642', '_200d_2640')
          for tone in ('', *(f'_1f3f{c}' for c in 'bcdef'))]


@pytest.mark.parametrize('name, role, gender, tone', [
    ('emoji_u1f469_1f3fd_200d_1f33e.png', (0x1f9d1, 0x1f33e), 2, 3),
    ('emoji_u1f468_200d_1f33e.png', (0x1f9d1, 0x1f33e), 1, 0),
    ('there/emoji_u1f3c3_1f3ff_200d_2640_fe0f.webp', (0x1f3c3,), 2, 5),
    ('emoji_u1f3c3_200d_27a1.png', (0x1f3c3, 0x27a1), 0, 0),
    ('emoji_u1f471_1f3fb_200d_2642.png', (0x1f471,), 1, 1),
])
def test_names_say_who_is_shown_and_in_which_tone(name, role, gender, tone):
    assert emoji.attributes(name) == (role, gender, tone)


@pytest.mark.parametrize('name', [
    'emoji_u1f9d1_1f3fb_200d_1f91d_200d_1f9d1_1f3fd.png',  # two people in two tones
    'emoji_u1f468_200d_1f469_200d_1f466.png', 'cat.png', 'emoji_uXY.png', '1f9d1.png'])
def test_names_that_say_no_such_thing(name):
    assert emoji.attributes(name) is None


def test_roles_that_lack_a_picture_are_left_out():
    shown = emoji.complete([*FARMER, *RUNNER[:-1], 'emoji_u1f600.png'])
    assert sorted(shown.values()) == sorted(FARMER)
    assert len({(what.gender, what.tone) for what in shown}) == 18


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two roles and a picture of neither; a pixel's colour says which file it is."""
    root = tmp_path_factory.mktemp('emoji')
    for i, name in enumerate([*FARMER, *RUNNER]):
        Image.new('RGB', (8, 8), (5 * i, 255 - 5 * i, 100)).save(root / name)
    Image.new('RGB', (8, 8)).save(root / 'emoji_u1f600.png')
    return root


def test_one_tone_of_every_figure_is_held_out(folder):
    data = dict(name='emoji', path=str(folder), image_size=8, channels=3, in_memory=True)
    train, heldout, every = (sources.image_source(data, split) for split in ('train', 'heldout', 'all'))
    assert (len(train), len(heldout), len(every)) == (30, 6, 36) and every.num_classes == 36
    assert sorted([*train.labels, *heldout.labels]) == list(range(36))
    figures, tones = np.divmod(heldout.labels, 6)
    assert sorted(figures) == list(range(6)) and len(set(tones)) == 4  # 3 genders of 2 roles, in turn
    # Roles by code point: the runner's is the lower one. A label's picture is that of its file.
    names = [*RUNNER, *FARMER]
    for i in range(36):
        assert every[i]['image'][0, 0, 0] == 5 * [*FARMER, *RUNNER].index(names[every[i]['label']])
    assert every.class_names[0] == 'runner, person, no tone' and 'ear of rice, woman, dark' in every.class_names[-1]


@pytest.mark.parametrize('change, says', [
    (dict(path=''), "data.name='emoji' needs data.path"),
    (dict(split='unseen'), r"data.split='unseen': emoji has \('train', 'heldout', 'all'\)"),
    ('incomplete', 'of no role are there all 18 emoji'),
])
def test_what_does_not_fit_is_said(change, says, folder, tmp_path):
    data, split = dict(name='emoji', path=str(folder)), 'train'
    if change == 'incomplete':
        Image.new('RGB', (8, 8)).save(tmp_path / FARMER[0])
        data['path'] = str(tmp_path)
    else:
        split = change.pop('split', split)
        data |= change
    with pytest.raises(ValueError, match=says):
        sources.image_source(data, split)


def test_crossing_asks_for_held_out_combinations_of_two_seen_pictures():
    labels = np.arange(79 * 18)
    seen = labels[~emoji.is_unseen(*np.divmod(labels, 6))]
    rows = grids.EMOJI.crossed(seen, 200, seed=3)
    (a, c), (b, d) = (of.T for of in np.divmod(seen[rows], 6))
    assert emoji.is_unseen(a, d).all() and emoji.is_unseen(c, b).all() and (a != c).all() and (b != d).all()
    np.testing.assert_array_equal(grids.EMOJI.label(*grids.EMOJI.attributes(labels).T), labels)


def test_the_judge_names_the_nearest_real_picture(folder):
    every = sources.image_source(dict(name='emoji', path=str(folder), in_memory=True), 'all')
    judge = NearestJudge.of(grids.EMOJI, every.images, every.labels)
    np.testing.assert_array_equal(judge.predict(np.clip(every.images.astype(int) + 2, 0, 255).astype(np.uint8)),
                                  every.labels)
    features = judge.features(every.images)
    assert features.shape == (36, 32)
    np.testing.assert_allclose(np.cov(features.T)[0, 1:], 0, atol=1e-12)  # principal components
    # The figure of picture 1 in the tone of picture 9, the other way round, and picture 1 itself.
    row = evaluation.composition_of_attributes(
        judge, every.images[[3, 7, 1]], np.full(3, 1), np.full(3, 9), every.images)
    assert {name: row[name] for name in row if not name.startswith('nearest')} == pytest.approx(
        dict(first=1 / 3, second=0, either=1 / 3, of_first=2 / 3, of_second=1 / 3, crossed=1 / 3, both=2 / 3))
    with pytest.raises(ValueError, match='37 images of 36 labels; give one of each'):
        NearestJudge.of(grids.EMOJI, every.images[[*range(36), 0]], every.labels[[*range(36), 0]])


class Store(dict):
    """Arrays by name, as a code store gives them."""
    meta = dict(class_names=[f'class {i}' for i in range(36)])
    array = dict.__getitem__


def test_what_is_asked_for_is_a_held_out_picture(folder):
    config = quickstart.get_config('emoji')
    config.encoder.data.path = str(folder)
    data = dict(name='emoji', path=str(folder), in_memory=True)
    stores = {split: Store(images=source.images, labels=source.labels)
              for split in ('train', 'heldout') for source in [sources.image_source(data, split)]}
    labels = stores['train']['labels']
    rows = grids.EMOJI.crossed(labels, 20)
    asked = compositions.asked_for(config, stores, rows)
    held = {image.tobytes(): label for image, label in zip(stores['heldout']['images'], stores['heldout']['labels'])}
    (figures, _), (_, tones) = (np.divmod(labels[of], 6) for of in rows.T)
    np.testing.assert_array_equal([held[image.tobytes()] for image in asked], 6 * figures + tones)
    stores['heldout'] = Store(images=stores['heldout']['images'][:0], labels=labels[:0])
    with pytest.raises(ValueError, match="the held-out picture of 'class [0-9]+' could not be read; fetch it again"):
        compositions.asked_for(config, stores, rows)

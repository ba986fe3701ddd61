"""The quickstart on pictures from a file, and on codes of other lengths: a few steps on generated images of the same
shape."""
import io

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs.dlc import quickstart as config_lib
from experiments import train
from experiments.dlc import encoder, grids
from experiments.dlc.convolutional_judge import ConvolutionalJudge
from experiments.dlc.data import codestore, digit_pairs
from experiments.quickstarts import compositions
from experiments.quickstarts import dlc as quickstart
from experiments.runtime import mesh as mesh_lib

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('on_one_device')]


def pictures(side, channels, num=64):
    """Noise around a brightness that depends on the class, and classes [num] of 2."""
    labels, rng = np.arange(num) % 2, np.random.default_rng(0)
    images = rng.integers(0, 100, (num, side, side, channels)) + 100 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Name of a size -> an .npz of such pictures: bare ones as Fashion-MNIST's, encoded ones as CIFAR-10's."""
    root = tmp_path_factory.mktemp('pictures')
    images, labels = pictures(28, 1)
    rest = dict(labels=labels, is_test=np.arange(len(labels)) >= 40, class_names=np.array(['dark', 'light']))
    np.savez(root / 'fashion_mnist.npz', images=images[..., 0], **rest)
    encoded = []
    for image in pictures(32, 3)[0]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, 'PNG')
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    np.savez(root / 'cifar10.npz', jpeg_bytes=np.concatenate(encoded),
             offsets=np.cumsum([0, *map(len, encoded)]), **rest)
    (root / 'emoji').mkdir()
    for label in range(7 * 18):
        role, gender, tone = label // 18, label // 6 % 3, label % 6
        sign = ('', '_200d_2642', '_200d_2640')[gender]
        name = f'emoji_u1f93{role}{f"_1f3f{0xa + tone:x}" if tone else ""}{sign}.png'
        Image.new('RGB', (40, 40), (30 * role, 100 * gender, 40 * tone)).save(root / 'emoji' / name)
    return {name: str(root / f'{name}.npz') for name in config_lib.PICTURES} | {'emoji': str(root / 'emoji')}


@pytest.mark.parametrize('size', ['fashion_mnist', 'cifar10', 'L8', 'pairs', 'pairs_halves', 'emoji'])
def test_the_stages_fit_each_other_and_the_pictures(size, files):
    config = config_lib.get_config(size)
    if size in files:
        config.encoder.data.path = files[size]
    quickstart.check(config)
    config = config.copy_and_resolve_references()
    batches = encoder.open_batches(config.encoder, 1)
    spec = train.build(config.encoder, mesh_lib.make_mesh(config.encoder.mesh)).batch
    assert {name: x.shape for name, x in next(batches).items()} == {name: x.shape for name, x in spec.items()}
    stages = [config.code_model, *config.generators.values()]
    for stage in stages:
        experiment = train.build(stage, mesh_lib.make_mesh(stage.mesh))
        jax.eval_shape(experiment.init, jax.random.key(0))
        if stage.experiment == 'generator':
            data = config.encoder.data
            side = data.global_size * (2 if config.encoded == 'halves' else 1)
            assert experiment.batch['x'].shape[1:] == (side, side, data.channels)
    lengths = {stage.model.num_codes for stage in stages}
    assert lengths == {{'L8': 8, 'pairs': 32, 'pairs_halves': 32, 'emoji': 32}.get(size, 16)}
    assert config.encoder.model.num_codes == (16 if size == 'pairs_halves' else stages[0].model.num_codes)


def test_a_length_given_once_reaches_every_model():
    config = config_lib.get_config()
    config.encoder.model.num_codes = 5
    assert config.code_model.model.num_codes == config.generators.code.model.num_codes == 5


def test_pictures_from_a_file_without_the_rivals(files, tmp_path):
    config = config_lib.get_config('cifar10_tiny').unlock()
    config.encoder.data.path = files['cifar10']
    config.generators = {'code': config.generators.code}
    for stage in (config.encoder, config.code_model, config.generators.code):
        stage.num_steps, stage.model.depth = 2, 1
    config.sample_seeds, config.composition.pairs = (0, 1), 2
    metrics = quickstart.run(config.lock(), tmp_path)
    assert set(metrics['methods']) == {'code, then image', 'codes of held-out images', 'real training images'}
    assert set(metrics['composition']) == {'average', 'positions'}
    assert metrics['judge_accuracy'] == 1.0  # classes that brightness tells apart
    assert metrics['composition']['average']['nearest_train'] > 0
    assert 'Discrete Latent Codes on small photographs' in (tmp_path / 'report.html').read_text()
    assert not (tmp_path / 'embedding_model').exists()
    with np.load(tmp_path / 'samples' / 'code_then_image_0.npz') as drawn:
        assert drawn['images'].shape == (24, 32, 32, 3)


@pytest.mark.parametrize('size', ['pairs', 'pairs_halves'])
def test_compositions_of_pairs_of_digits(size, tmp_path):
    config = config_lib.get_config(f'{size}_tiny').unlock()
    config.encoder.data.num_images, config.sample_batch = 240, 60
    for stage in (config.encoder, config.code_model, config.embedding_model, *config.generators.values()):
        stage.num_steps, stage.model.depth = 2, 1
    metrics = quickstart.run(config.lock(), tmp_path)
    rows = metrics['composition']
    assert set(rows) == {*compositions.WAYS_OF_GRIDS, compositions.REAL}
    for row in rows.values():
        assert row['first'] + row['second'] == pytest.approx(row['either']) and row['crossed'] <= row['both']
    assert rows[compositions.REAL]['crossed'] > 0.8  # whatever was trained: the judge reads what is asked for
    assert rows[compositions.REAL]['nearest_features'] > 0
    assert 'Discrete Latent Codes on pairs of handwritten digits' in (tmp_path / 'report.html').read_text()

    stores = {split: codestore.open_code_store(tmp_path / 'codes' / split) for split in ('train', 'heldout')}
    train, heldout = (np.asarray(stores[split].array('labels')) for split in ('train', 'heldout'))
    with np.load(tmp_path / 'samples' / 'compositions_1.npz') as drawn:
        sources = drawn['sources']
        assert drawn['parts'].shape == (6, 4, 16, 16, 1)
    (a, c), (b, d) = (of.T for of in np.divmod(heldout[sources], 10))
    assert not np.isin([10 * a + d, 10 * c + b], train).any()
    # Where the encoder reads half by half, and there alone, crossing the conditions is coding the crossed picture.
    encoder = quickstart.Models(config, tmp_path).encoder
    codes = compositions.code_conditions(config, encoder, jax.random.key(0), stores, sources)['code of both'][::4]
    ends = np.asarray(stores['heldout'].array('codes'))[sources]
    half = codes.shape[1] // 2
    same_codes = (codes == np.concatenate([ends[:, 0, :half], ends[:, 1, half:]], 1)).all()
    embeddings = compositions.embedding_conditions(config, encoder, stores, sources)
    same_embeddings = np.allclose(embeddings['embedding parts'], embeddings['embedding of both'], atol=1e-5)
    assert (same_codes, same_embeddings) == (size == 'pairs_halves',) * 2


def test_compositions_of_emoji(files, tmp_path):
    config = config_lib.get_config('emoji_tiny').unlock()
    config.encoder.data.path, config.sample_batch = files['emoji'], 24
    for stage in (config.encoder, config.code_model, config.embedding_model, *config.generators.values()):
        stage.num_steps, stage.model.depth = 2, 1
    metrics = quickstart.run(config.lock(), tmp_path)
    rows = metrics['composition']
    assert set(rows) == {*compositions.WAYS_OF_GRIDS, compositions.REAL}
    real = rows[compositions.REAL]
    assert real['crossed'] == real['both'] == metrics['judge_accuracy'] == 1 and real['either'] == 0
    assert real['nearest_train'] > 0  # what is asked for is no training image
    assert max(row['knn'] for row in metrics['representation'].values()) > 0  # of figures: no label has been seen
    assert 'the figure and the tone of the first source' in (tmp_path / 'report.html').read_text()
    stores = {split: codestore.open_code_store(tmp_path / 'codes' / split) for split in ('train', 'heldout')}
    train, heldout = (np.asarray(stores[split].array('labels')) for split in ('train', 'heldout'))
    with np.load(tmp_path / 'samples' / 'compositions_0.npz') as drawn:
        (a, c), (b, d) = (of.T for of in np.divmod(train[drawn['sources']], 6))
    assert np.isin([6 * a + d, 6 * c + b], heldout).all() and len(train) == 105 and len(heldout) == 21


def test_crossed_pairs_are_unseen_ones_of_four_digits():
    labels = np.array([44, 99, 1, 83, 20])  # pairs that are trained on
    rows = grids.DIGITS.crossed(labels, 50, seed=1)
    (a, c), (b, d) = (of.T for of in np.divmod(labels[rows], 10))
    assert digit_pairs.is_unseen(a, d).all() and digit_pairs.is_unseen(c, b).all()
    assert (a != c).all() and (b != d).all() and not digit_pairs.is_unseen(*np.divmod(labels, 10)).any()
    with pytest.raises(ValueError, match='2 pictures, no two of which cross to unseen pairs'):
        grids.DIGITS.crossed(labels[:2], 1)
    first, second = (np.full((1, 16, 16, 1), value) for value in (3, 5))
    np.testing.assert_array_equal(digit_pairs.cross(first, second)[0, :, 0, 0], [3] * 8 + [5] * 8)


def test_the_convolutional_judge_names_classes_as_they_were_given():
    images, labels = pictures(6, 1, num=24)
    labels = np.where(labels, 7, 3)
    judge = ConvolutionalJudge.fit(images, labels, flip=True, features=16, epochs=20)
    np.testing.assert_array_equal(judge.classes, [3, 7])
    np.testing.assert_array_equal(judge.predict(images), labels)
    assert judge.features(images).shape == (24, 16)
    np.testing.assert_allclose(judge.probabilities(images).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize('change, says', [
    (dict(path=''), r"encoder.data.path is missing: give the .npz of pictures of clothes, --config.encoder.data.path="),
    (dict(path='nowhere.npz'), 'nowhere.npz: no such file'),
    (dict(channels=3), 'images have 1 channels but encoder.data.channels=3'),
    ('encoded', "encoded='quarters' is not one of"),
    (dict(image_size=30), 'patch_size=4 does not divide images of 30 pixels'),
    ('human', "judge='human' is not one of"),
    ('nearest', "judge='nearest' cannot read pictures of clothes; set --config.judge=perceptron"),
    ('code', "generators: must have 'code'"),
    ('one class', "one class alone in split 'train'"),
    ('few', "4 images in split 'heldout'; give at least 20"),
])
def test_what_does_not_fit_is_said_before_anything_is_written(change, says, files, tmp_path):
    config = config_lib.get_config('fashion_mnist_tiny').unlock()
    config.encoder.data.path = files['fashion_mnist']
    if isinstance(change, dict):
        config.encoder.data.update(change)
    elif change in ('human', 'nearest'):
        config.judge = change
    elif change == 'encoded':
        config.encoded = 'quarters'
    elif change == 'code':
        config.generators = ml_collections.ConfigDict({'none': config.generators.none})
    else:
        images, labels = pictures(28, 1)
        config.encoder.data.path = str(tmp_path / 'odd.npz')
        np.savez(config.encoder.data.path, images=images, labels=labels * (change != 'one class'),
                 is_test=np.arange(64) >= (60 if change == 'few' else 40))
    with pytest.raises((ValueError, OSError), match=says):
        quickstart.run(config.lock(), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('size, needs', [('emoji', 'nearest'), ('pairs_halves', 'perceptron')])
def test_pictures_of_two_attributes_have_a_judge_of_their_own(size, needs, files, tmp_path):
    config = config_lib.get_config(f'{size}_tiny').unlock()
    config.encoder.data.path, config.judge = files['emoji'], 'convolutional'
    with pytest.raises(ValueError, match=f'cannot read {config.pictures}; set --config.judge={needs}'):
        quickstart.run(config.lock(), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()

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
from experiments.dlc import encoder
from experiments.dlc.convolutional_judge import ConvolutionalJudge
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
    return {name: str(root / f'{name}.npz') for name in config_lib.PICTURES}


@pytest.mark.parametrize('size', ['fashion_mnist', 'cifar10', 'L8'])
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
            assert experiment.batch['x'].shape[1:] == (data.global_size, data.global_size, data.channels)
    lengths = {stage.model.num_codes for stage in (config.encoder, *stages)}
    assert len(lengths) == 1 and (size != 'L8' or lengths == {8})


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
    (dict(image_size=30), 'patch_size=4 does not divide images of 30 pixels'),
    ('judge', "judge='human' is not one of"),
    ('code', "generators: must have 'code'"),
    ('one class', "one class alone in split 'train'"),
    ('few', "4 images in split 'heldout'; give at least 20"),
])
def test_what_does_not_fit_is_said_before_anything_is_written(change, says, files, tmp_path):
    config = config_lib.get_config('fashion_mnist_tiny').unlock()
    config.encoder.data.path = files['fashion_mnist']
    if isinstance(change, dict):
        config.encoder.data.update(change)
    elif change == 'judge':
        config.judge = 'human'
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

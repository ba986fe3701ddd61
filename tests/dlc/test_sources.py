import io
import logging
import lzma
import os
import pickle
import shutil
import sys

import ml_collections
import numpy as np
import pytest
from PIL import Image

from experiments.dlc.data.decode import Decoding, read_image
from experiments.dlc.data.images import MAX_TRIES, NAMED_IN_LOG, ArrayImages, split_rows
from experiments.dlc.data.sources import image_source


def encoded(image, form='png', **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def plain(value, size=6):
    return np.full((size, size, 3), value, np.uint8)


def one_line(error):
    return '\n' not in str(error.value)


def make_folder(root, classes=('cat', 'dog'), count=4):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f'{i}.png').write_bytes(encoded(plain(10 * c + i)))
    return root


# ---- Digits, fake, splits ------------------------------------------------------------------------------------------

def test_digits_parts_are_fixed_disjoint_and_stratified():
    config = ml_collections.ConfigDict(dict(name='digits', image_size=16, channels=1, heldout=0.25, split_seed=0,
                                            path='', mean=(0.5,), num_workers=0))
    train, heldout = image_source(config, 'train'), image_source(config, 'heldout')
    assert len(train) + len(heldout) == 1797 and train.num_classes == 10 and train.class_names[3] == '3'
    names = [{source.name(i) for i in range(len(source))} for source in (train, heldout)]
    assert not names[0] & names[1]
    share = np.bincount(heldout.labels) / (np.bincount(heldout.labels) + np.bincount(train.labels))
    np.testing.assert_allclose(share, 0.25, atol=0.005)
    again = image_source(config, 'heldout')
    np.testing.assert_array_equal(again.images, heldout.images)
    config.split_seed = 1
    assert {image_source(config, 'heldout').name(i) for i in range(50)} != {heldout.name(i) for i in range(50)}


def test_digits_items():
    source = image_source(dict(name='digits', image_size=0, channels=0), 'all')
    from sklearn.datasets import load_digits
    data = load_digits()
    for i in (0, 7, 1796):
        item = source[i]
        assert item['image'].dtype == np.uint8 and item['image'].shape == (8, 8, 1) and type(item['label']) is int
        np.testing.assert_allclose(item['image'][..., 0], data.images[i] * 255 / 16, atol=0.5)
        assert item['label'] == data.target[i] and item['name'] == f'digits/{i}'
    wide = image_source(dict(name='digits', image_size=20, channels=3), 'all')
    assert wide.images.shape == (1797, 20, 20, 3)
    np.testing.assert_array_equal(wide.images[..., 0], wide.images[..., 2])


def test_fake_is_deterministic():
    config = dict(name='fake', image_size=24, num_images=30)
    one, two, heldout = image_source(config, 'train'), image_source(config, 'train'), image_source(config, 'heldout')
    assert len(one) == 30 and one[7]['image'].shape == (24, 24, 3)
    np.testing.assert_array_equal(one[7]['image'], two[7]['image'])
    assert (one[7]['image'] != one[17]['image']).any() and (one[7]['image'] != heldout[7]['image']).any()


def test_split_rows():
    labels = np.repeat([0, 1], [8, 4])
    train, apart = (split_rows(labels, split, 0.25, 3) for split in ('train', 'heldout'))
    assert sorted([*train, *apart]) == list(range(12))
    np.testing.assert_array_equal(np.bincount(labels[apart]), [2, 1])
    with pytest.raises(ValueError, match="data.split='valid'"):
        split_rows(labels, 'valid', 0.25, 0)
    with pytest.raises(ValueError, match='data.heldout=0.0'):
        split_rows(labels, 'heldout', 0.0, 0)


# ---- Folders -------------------------------------------------------------------------------------------------------

def test_folder_of_classes(tmp_path):
    root = make_folder(tmp_path / 'pets')
    (root / 'dog' / 'notes.txt').write_text('not an image')
    (root / 'dog' / 'deeper').mkdir()
    (root / 'dog' / 'deeper' / 'x.JPG').write_bytes(encoded(plain(200), 'jpeg', quality=95))
    (root / 'cat' / 'y.webp').write_bytes(encoded(plain(100), 'webp', lossless=True))
    source = image_source(dict(name='folder', path=str(root)), 'all')
    assert len(source) == 10 and source.class_names == ('cat', 'dog')
    items = {item['name']: item for item in (source[i] for i in range(10))}
    assert items['cat/2.png']['label'] == 0 and items['dog/deeper/x.JPG']['label'] == 1
    np.testing.assert_array_equal(items['dog/3.png']['image'], plain(13))
    np.testing.assert_array_equal(items['cat/y.webp']['image'], plain(100))
    assert abs(int(items['dog/deeper/x.JPG']['image'][0, 0, 0]) - 200) <= 2


def test_flat_folder_and_its_parts(tmp_path):
    for i in range(10):
        (tmp_path / f'{i}.png').write_bytes(encoded(plain(i)))
    config = dict(name='folder', path=str(tmp_path), heldout=0.3)
    train, heldout = image_source(config, 'train'), image_source(config, 'heldout')
    assert (len(train), len(heldout)) == (7, 3) and train.class_names == (tmp_path.name,)
    assert not {train.name(i) for i in range(7)} & {heldout.name(i) for i in range(3)}


def test_folder_with_its_own_split(tmp_path):
    make_folder(tmp_path / 'train', count=3)
    make_folder(tmp_path / 'val', count=2)
    config = dict(name='folder', path=str(tmp_path))
    assert len(image_source(config, 'train')) == 6 and len(image_source(config, 'heldout')) == 4
    assert image_source(config, 'train').class_names == ('cat', 'dog')
    # Classes are numbered by the training images, whatever else is there.
    shutil.rmtree(tmp_path / 'val' / 'cat')
    heldout = image_source(config, 'heldout')
    assert [heldout[i]['label'] for i in range(2)] == [1, 1] and heldout.class_names == ('cat', 'dog')
    (tmp_path / 'val' / 'dog').rename(tmp_path / 'val' / 'emu')
    with pytest.raises(ValueError, match='class emu has no training images'):
        image_source(config, 'heldout')
    with pytest.raises(ValueError, match="data.split='extra'"):
        image_source(config, 'extra')
    # Without held-out images of their own, a share of the training images is kept apart.
    shutil.rmtree(tmp_path / 'val')
    parts = [image_source(config | {'heldout': 1 / 3}, split) for split in ('train', 'heldout')]
    assert [len(part) for part in parts] == [4, 2] and parts[1].class_names == ('cat', 'dog')


def test_colour_modes(tmp_path):
    gray = np.arange(36, dtype=np.uint8).reshape(6, 6)
    (tmp_path / 'gray.png').write_bytes(encoded(gray))
    (tmp_path / 'deep.png').write_bytes(encoded(gray.astype(np.uint16) * 256))
    Image.fromarray(plain(9)).convert('RGBA').save(tmp_path / 'alpha.png')
    Image.fromarray(plain(9)).convert('P').save(tmp_path / 'palette.png')
    for name in ('gray.png', 'deep.png'):
        np.testing.assert_array_equal(read_image(tmp_path / name, Decoding(3)), np.repeat(gray[..., None], 3, -1))
        np.testing.assert_array_equal(read_image(tmp_path / name, Decoding(1)), gray[..., None])
    np.testing.assert_array_equal(read_image(tmp_path / 'alpha.png'), plain(9))
    assert read_image(tmp_path / 'palette.png').shape == (6, 6, 3)


def test_image_size_crops_every_item(tmp_path):
    (tmp_path / 'wide.png').write_bytes(encoded(np.zeros((10, 30, 3), np.uint8)))
    (tmp_path / 'small.png').write_bytes(encoded(plain(3)))
    source = image_source(dict(name='folder', path=str(tmp_path), image_size=8, in_memory=True), 'all')
    assert source.images.shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match='data.image_size'):
        image_source(dict(name='folder', path=str(tmp_path), in_memory=True), 'all')


def test_unreadable_images_are_counted_named_and_replaced_by_others(tmp_path, caplog):
    root = make_folder(tmp_path, classes=('a',), count=40)
    whole = (root / 'a' / '2.png').read_bytes()
    bad = [f'a/{i}.png' for i in range(10, 30)]
    for name in bad:
        (root / name).write_bytes(whole[:len(whole) // 2])
    source = image_source(dict(name='folder', path=str(root)), 'all')
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            items = [source[i] for i in range(40)]
    assert sorted(source.skipped) == sorted(bad)
    for i, item in enumerate(items):
        assert item['name'] not in bad and (source.name(i) in bad or item['index'] == i)
        np.testing.assert_array_equal(item['image'], plain(int(item['name'][2:-4])))
    # A damaged stretch is not one image twenty times over, and the same item is the same each time.
    stand_ins = [item['name'] for i, item in enumerate(items) if source.name(i) in bad]
    assert len(set(stand_ins)) > 8 and stand_ins == [source[i]['name'] for i in range(40) if source.name(i) in bad]
    said = [record.getMessage() for record in caplog.records]
    assert sum('skipped unreadable image' in line for line in said) == NAMED_IN_LOG
    assert any('skipped 16 unreadable images so far' in line for line in said) and len(said) == NAMED_IN_LOG + 1
    (root / 'a' / '1.png').unlink()
    assert source[1]['name'] != 'a/1.png' and source.skipped['a/1.png'] == 'no such file'


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / 'x.png').write_bytes(b'')
    source = image_source(dict(name='folder', path=str(tmp_path)), 'all')
    with pytest.raises(OSError, match='x.png: unreadable .*so are all 1 images tried') as error:
        source[0]
    assert one_line(error) and MAX_TRIES >= 100


# ---- npz -----------------------------------------------------------------------------------------------------------

def write_encoded(path, count=10, **changes):
    blobs = [encoded(plain(20 * i)) for i in range(count)]
    arrays = dict(jpeg_bytes=np.frombuffer(b''.join(blobs), np.uint8), offsets=np.cumsum([0] + [len(b) for b in blobs]),
                  labels=np.arange(count) % 2, is_test=np.arange(count) >= 7, class_names=np.array(['even', 'odd']))
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)


def test_npz_of_encoded_images(tmp_path):
    config = dict(name='npz', path=write_encoded(tmp_path / 'set.npz'))
    train, heldout = image_source(config, 'train'), image_source(config, 'heldout')
    assert (len(train), len(heldout), len(image_source(config, 'all'))) == (7, 3, 10)
    item = heldout[1]
    np.testing.assert_array_equal(item['image'], plain(160))
    assert item['label'] == 0 and item['name'] == 'set/8' and heldout.class_names == ('even', 'odd')


def test_damaged_bytes_in_npz_are_skipped(tmp_path):
    path = tmp_path / 'set.npz'
    write_encoded(path)
    with np.load(path) as z:
        arrays = {k: z[k] for k in z.files}
    arrays['jpeg_bytes'] = arrays['jpeg_bytes'].copy()
    arrays['jpeg_bytes'][arrays['offsets'][3]:arrays['offsets'][4]] = 7
    np.savez(path, **arrays)
    source = image_source(dict(name='npz', path=str(path), in_memory=True), 'train')
    assert isinstance(source, ArrayImages) and list(source.skipped) == ['set/3']
    np.testing.assert_array_equal(source.images, [plain(20 * i) for i in range(7) if i != 3])


@pytest.mark.parametrize('compress', [False, True])
def test_npz_of_arrays(tmp_path, compress):
    images = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
    buffer = io.BytesIO()
    np.savez(buffer, train_images=images[:4], train_labels=[0, 1, 2, 0], test_images=images[4:], test_labels=[1, 2])
    path = tmp_path / ('a.npz.xz' if compress else 'a.npz')
    path.write_bytes(lzma.compress(buffer.getvalue()) if compress else buffer.getvalue())
    source = image_source(dict(name='npz', path=str(path), channels=1), 'heldout')
    np.testing.assert_array_equal(source.images[..., 0], images[4:])
    np.testing.assert_array_equal(source.labels, [1, 2])
    assert source.num_classes == 3


@pytest.mark.parametrize('changes,match', [
    (dict(labels=np.zeros(9, int)), '10 images but 9 labels'),
    (dict(is_test=np.zeros(11, bool)), '10 images but 11 is_test'),
    (dict(offsets=None), "no 'offsets'"),
    (dict(offsets=np.arange(11) * 10 ** 6), "'offsets' do not fit"),
    (dict(jpeg_bytes=None), "needs 'images'"),
    (dict(jpeg_bytes=None, images=np.zeros((10, 4, 4), np.float32)), 'float32'),
    (dict(jpeg_bytes=None, images=np.zeros((10, 4, 4, 2), np.uint8)), '1 or 3'),
    (dict(is_test=np.zeros(10, bool)), "no image in split 'heldout'"),
])
def test_bad_npz_is_named(tmp_path, changes, match):
    path = write_encoded(tmp_path / 'set.npz', **changes)
    with pytest.raises(ValueError, match=match) as error:
        image_source(dict(name='npz', path=path), 'heldout')
    assert one_line(error) and 'set.npz' in str(error.value)


@pytest.mark.parametrize('suffix', ['.npz', '.npz.xz'])
@pytest.mark.parametrize('keep', [0.0, 0.3, 0.98])
def test_truncated_npz_is_named(tmp_path, suffix, keep):
    whole = tmp_path / 'whole.npz'
    write_encoded(whole)
    content = whole.read_bytes() if suffix == '.npz' else lzma.compress(whole.read_bytes())
    cut = tmp_path / f'cut{suffix}'
    cut.write_bytes(content[:int(keep * len(content))])
    with pytest.raises(OSError, match='truncated or not an .npz') as error:
        image_source(dict(name='npz', path=str(cut)), 'train')
    assert one_line(error) and str(cut) in str(error.value)


def test_pickles_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / 'p.npz', images=np.array([{'a': 1}], object))
    with pytest.raises(OSError, match='p.npz'):
        image_source(dict(name='npz', path=str(tmp_path / 'p.npz')), 'train')


# ---- TFDS ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
    """A data set as TFDS prepares it, written without TensorFlow."""
    import tensorflow_datasets as tfds
    root = tmp_path_factory.mktemp('tfds')
    folder = root / 'tiny' / '1.0.0'
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(6, 6, 3)),
                                           'label': tfds.features.ClassLabel(names=['a', 'b'])})
    identity = tfds.core.dataset_info.DatasetIdentity(name='tiny', version=tfds.core.Version('1.0.0'),
                                                      data_dir=str(folder), module_name='tiny')
    writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features),
                                        max_examples_per_shard=3, file_format='array_record')
    writer.initialize_splits(['train', 'test'])
    for i in range(5):
        image = encoded(plain(i)) if i != 2 else encoded(plain(i))[:40]
        writer.add_examples({'train': [{'image': image, 'label': i % 2}]})
    writer.add_examples({'test': [{'image': encoded(plain(99)), 'label': 1}]})
    writer.close_all()
    return root


def test_tfds_reads_array_record_without_tensorflow(tfds_dir):
    source = image_source(dict(name='tiny', path=str(tfds_dir)), 'train')
    assert len(source) == 5 and source.class_names == ('a', 'b')
    np.testing.assert_array_equal(source[3]['image'], plain(3))
    assert source[3]['label'] == 1 and source[3]['name'] == 'tiny/train/3'
    assert source[2]['name'] != 'tiny/train/2' and list(source.skipped) == ['tiny/train/2']
    heldout = image_source(dict(name='tiny', path=str(tfds_dir)), 'heldout')
    np.testing.assert_array_equal(heldout[0]['image'], plain(99))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[4]['image'], plain(4))
    assert 'tensorflow' not in sys.modules


def test_tfds_bad_input(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match="data.split='val'.*train.*test"):
        image_source(dict(name='tiny', path=str(tfds_dir)), 'val')
    with pytest.raises(FileNotFoundError, match='cifar10.*tfds build cifar10 --file_format=array_record') as error:
        image_source(dict(name='cifar10', path=str(tmp_path)), 'train')
    assert one_line(error)
    with pytest.raises(FileNotFoundError, match='ILSVRC2012_img_train.tar'):
        image_source(dict(name='imagenet2012', path=str(tmp_path)), 'train')


def test_tfds_truncated_file_is_named(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / 'copy')
    file = tmp_path / 'copy' / 'tiny' / '1.0.0' / 'tiny-train.array_record-00000'
    os.truncate(file, 70_000)
    source = image_source(dict(name='tiny', path=str(tmp_path / 'copy')), 'train')
    with pytest.raises(OSError, match='truncated.*tfds build tiny') as error:
        source[0]
    assert one_line(error)
    for damage in (lambda: os.truncate(file, 0), file.unlink):  # seen before anything is read
        damage()
        with pytest.raises(OSError, match=f'{file.name}: missing or truncated; prepare it again') as error:
            image_source(dict(name='tiny', path=str(tmp_path / 'copy')), 'train')
        assert one_line(error)


# ---- Names and fields ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config,match', [
    (dict(name='digitz'), "did you mean 'digits'"),
    (dict(name='imagenet_2012'), "did you mean 'imagenet2012"),
    (dict(name='nothing like it'), 'nor a TFDS data set'),
    (dict(name='folder'), 'needs data.path'),
    (dict(name='npz', path=''), 'needs data.path'),
    (dict(name='folder', path='/no/such/place'), '/no/such/place: no such folder'),
    (dict(name='npz', path='/no/such/file.npz'), '/no/such/file.npz: no such file'),
    (dict(name='digits', channels=4), 'data.channels=4'),
    (dict(name='digits', heldout=1.5), 'data.heldout=1.5'),
])
def test_bad_fields_are_named(config, match):
    with pytest.raises((ValueError, OSError), match=match) as error:
        image_source(config, 'train')
    assert one_line(error)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no .png, .jpg.*.tiff.* file below it'):
        image_source(dict(name='folder', path=str(tmp_path)), 'train')
    make_folder(tmp_path / 'pets')
    (tmp_path / 'pets' / 'stray.png').write_bytes(encoded(plain(1)))
    with pytest.raises(ValueError, match='stray.png'):
        image_source(dict(name='folder', path=str(tmp_path / 'pets')), 'train')


def test_read_image_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.png: no such file'):
        read_image(tmp_path / 'none.png')
    (tmp_path / 'bad.png').write_bytes(b'???')
    with pytest.raises(OSError, match='bad.png: not a readable image'):
        read_image(tmp_path / 'bad.png')


def test_index_outside_is_an_error():
    with pytest.raises(IndexError):
        image_source(dict(name='digits'), 'train')[5000]


# ---- Real data -----------------------------------------------------------------------------------------------------

def test_real_photos(shared_data):
    path = shared_data / 'imagenette_64' / 'imagenette_64_jpeg.npz'
    if not path.exists():
        pytest.skip('imagenette_64 is not present')
    train, heldout = (image_source(dict(name='npz', path=str(path)), split) for split in ('train', 'heldout'))
    assert (len(train), len(heldout), train.num_classes) == (9469, 3925, 10)
    items = [train[i] for i in range(0, 9469, 500)]
    assert all(item['image'].shape == (64, 64, 3) for item in items) and not train.skipped
    assert len({item['label'] for item in items}) == 10
    assert 80 < np.mean([item['image'].mean() for item in items]) < 160


def test_real_grayscale_arrays(shared_data):
    path = shared_data / 'fashion_mnist' / 'fashion_mnist.npz.xz'
    if not path.exists():
        pytest.skip('fashion_mnist is not present')
    source = image_source(dict(name='npz', path=str(path), channels=1), 'heldout')
    assert source.images.shape == (10000, 28, 28, 1) and source.class_names[0] == 'T-shirt/top'
    np.testing.assert_array_equal(np.bincount(source.labels), 1000)


def test_pairs_of_digits_by_name():
    data = dict(name='digit_pairs', num_images=80, heldout=0.25, split_seed=0, channels=1)
    sources = {split: image_source(data, split) for split in ('train', 'heldout', 'unseen')}
    assert {split: len(source) for split, source in sources.items()} == {'train': 80, 'heldout': 20, 'unseen': 20}
    assert sources['train'][0]['image'].shape == (16, 16, 1) and sources['train'].num_classes == 100
    assert sources['heldout'].digest() != sources['unseen'].digest()
    with pytest.raises(ValueError, match="data.split='all': digit_pairs has"):
        image_source(data, 'all')
    with pytest.raises(ValueError, match="data.name='digit_pairs' reads no files"):
        image_source(data | dict(path='somewhere'), 'train')

"""Images in .npz files as others write them, and files that are broken or meant to break."""
import io
import lzma
import struct
import zipfile

import numpy as np
import pytest

from experiments.dlc.data import memory
from experiments.dlc.data.sources import image_source

N = 6


def pictures(first=0, num=N):
    return np.arange(first, first + num, dtype=np.uint8)[:, None, None] + np.zeros((1, 4, 4), np.uint8)


def opened(path, split='all', **fields):
    return image_source(dict(name='npz', path=str(path), channels=1, heldout=0.5) | fields, split)


@pytest.fixture
def save(tmp_path):
    def write(name='set.npz', **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name
    return write


# ---- Labels --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('labels, class_names, want, names', [
    ([[2], [0], [1], [0], [0], [1]], None, [2, 0, 1, 0, 0, 1], ('class 0', 'class 1', 'class 2')),
    (['dog', 'cat', 'cat', 'emu', 'dog', 'cat'], None, [1, 0, 0, 2, 1, 0], ('cat', 'dog', 'emu')),
    ([b'dog', b'cat', b'cat', b'dog', b'dog', b'cat'], None, [1, 0, 0, 1, 1, 0], ('cat', 'dog')),
    (['dog', 'cat', 'cat', 'dog', 'dog', 'cat'], ['emu', 'dog', 'cat'], [1, 2, 2, 1, 1, 2], ('emu', 'dog', 'cat')),
    ([0.0, 1.0, 1.0, 0.0, 0.0, 1.0], ['a', 'b'], [0, 1, 1, 0, 0, 1], ('a', 'b')),
    ([False, True, True, False, False, True], None, [0, 1, 1, 0, 0, 1], ('class 0', 'class 1'))])
def test_labels_as_others_write_them(save, labels, class_names, want, names):
    more = {} if class_names is None else {'class_names': np.array(class_names)}
    source = opened(save(images=pictures(), labels=np.array(labels), **more))
    assert source.labels.tolist() == want and source.class_names == names
    assert [source[i]['label'] for i in range(N)] == want


@pytest.mark.parametrize('labels, match', [
    ([0, 1, 2, 3, 4, 10 ** 12], r'labels lie in 0..1000000000000; number the classes from 0 to at most 1048575'),
    ([0, 1, 2, 3, 4, -1], r'labels lie in -1..4'), ([0.5] * N, 'labels are float64; need whole numbers'),
    ([np.nan] * N, 'labels are float64'), (np.zeros((N, 14), int), r'labels are \(6, 14\); need one class an image'),
    (3, r'labels are \(\); need'), ([0] * 5, '6 images but 5 labels'), ([1j] * N, 'labels are complex128'),
    (np.full(N, 2 ** 63, np.uint64), 'labels lie in 9223372036854775808..')])
def test_labels_that_are_none(save, labels, match):
    with pytest.raises(ValueError, match=match) as error:
        opened(save(images=pictures(), labels=np.array(labels)))
    assert 'set.npz' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('labels, class_names, match', [
    ([0, 1, 2, 0, 1, 2], ['a', 'b'], r'labels lie in 0..2; .* at most 1'),
    (['a', 'b', 'c', 'a', 'a', 'a'], ['a', 'b'], 'label c is not among its class_names'),
    ([0] * N, [1, 2], r'class_names are int64 \(2,\); need strings'), ([0] * N, 'a', 'class_names are')])
def test_labels_that_class_names_do_not_have(save, labels, class_names, match):
    with pytest.raises(ValueError, match=match):
        opened(save(images=pictures(), labels=np.array(labels), class_names=np.array(class_names)))


# ---- Parts ---------------------------------------------------------------------------------------------------------

def test_three_parts_as_medmnist(save, caplog):
    parts = {'train': pictures(0, 4), 'val': pictures(10, 2), 'test': pictures(20, 3)}
    path = save(**{f'{part}_images': x for part, x in parts.items()},
                **{f'{part}_labels': np.arange(len(x))[:, None] % 2 for part, x in parts.items()})
    for split, part in (('train', 'train'), ('val', 'val'), ('test', 'test'), ('heldout', 'val')):
        source = opened(path, split)
        np.testing.assert_array_equal(source.images[..., 0], parts[part])
        assert source.labels.tolist() == [i % 2 for i in range(len(parts[part]))] and source.held_back == 0
    assert 'held out are the images of val; left out: test' in caplog.text
    assert len(opened(path, 'all')) == 9
    with pytest.raises(ValueError, match="data.split='valid': .*'train', 'val', 'test'"):
        opened(path, 'valid')


def test_two_parts_as_keras(save):
    path = save(x_train=pictures(0, 4), y_train=[0, 1, 2, 0], x_test=pictures(9, 2), y_test=[2, 1])
    assert len(opened(path, 'train')) == 4 and opened(path, 'heldout').labels.tolist() == [2, 1]


def test_one_part_is_divided(save):
    path = save(train_images=pictures(), train_labels=np.zeros(N, int))
    assert len(opened(path, 'train')) == len(opened(path, 'heldout')) == 3 and opened(path, 'train').held_back == 3


@pytest.mark.parametrize('change, match', [
    (dict(test_labels=None), 'test has images but no labels'),
    (dict(test_labels=np.zeros(3, int)), 'test has 2 images'),
    (dict(test_labels=np.zeros((2, 1), int)), 'labels of its parts differ in shape'),
    (dict(test_images=np.zeros((2, 5, 5), np.uint8)), 'images of its parts differ in size'),
    (dict(test_images=np.zeros((2, 4, 4))), "test: 'images' are float64")])
def test_parts_that_do_not_fit(save, change, match):
    arrays = dict(train_images=pictures(0, 4), train_labels=np.zeros(4, int), test_images=pictures(0, 2),
                  test_labels=np.zeros(2, int)) | change
    with pytest.raises(ValueError, match=match):
        opened(save(**{name: x for name, x in arrays.items() if x is not None}))


# ---- Files that are larger than they look --------------------------------------------------------------------------

def npy(header, data=b''):
    """A .npy member with a header of its own."""
    text = header.encode() + b'\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text + data


def archive(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f'{name}.npy', content)
    return path


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(memory, 'available', lambda: 2.0 ** 20)


def test_a_header_of_terabytes_takes_no_memory(tmp_path):
    path = archive(tmp_path / 'x.npz', images=npy("{'descr': '|u1', 'fortran_order': False, 'shape': "
                                                  '(1000000, 4096, 4096)}', b'\0' * 16))
    with pytest.raises(OSError, match='x.npz: truncated or not an .npz file .images: its header announces uint8'):
        opened(path)


@pytest.mark.parametrize('packed', [False, True])
def test_a_small_file_that_unpacks_to_more_than_there_is(tmp_path, little_memory, packed):
    plain = archive(tmp_path / 'x.npz', images=npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4096, 32, 32)}",
                                                   bytes(4096 * 1024)))
    if packed:
        (tmp_path / 'x.npz.xz').write_bytes(lzma.compress(plain.read_bytes() + bytes(2 ** 24)))
    path = tmp_path / ('x.npz.xz' if packed else 'x.npz')
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match='x.npz.*: what it unpacks to would take 0.0 GiB of the 0.0 GiB') as error:
        opened(path)
    assert '\n' not in str(error.value)


def test_arrays_that_are_not_read_may_be_of_any_size(tmp_path, little_memory):
    buffer = io.BytesIO()
    np.save(buffer, pictures())
    path = archive(tmp_path / 'x.npz', images=buffer.getvalue(), features=bytes(2 ** 23))
    assert len(opened(path)) == N


def test_in_memory_is_refused_before_the_second_image(tmp_path, little_memory):
    from PIL import Image
    for i in range(3):
        Image.new('L', (1024, 1024)).save(tmp_path / f'{i}.png')
    with pytest.raises(ValueError, match='data.in_memory: 3 images would take .*; set data.in_memory=False'):
        image_source(dict(name='folder', path=str(tmp_path), channels=1, in_memory=True), 'all')


# ---- Fuzz ----------------------------------------------------------------------------------------------------------

def test_no_damage_ends_in_anything_but_one_line(save, tmp_path):
    """Random bytes changed, cut out or put in, anywhere in the file: it opens, or one line says why not."""
    plain = save(images=pictures(), labels=np.arange(N) % 2, class_names=np.array(['a', 'b'])).read_bytes()
    encoded = save(jpeg_bytes=np.frombuffer(plain[:60], np.uint8), offsets=np.arange(0, 70, 10),
                   is_test=np.arange(6) > 3).read_bytes()
    rng, opened_whole = np.random.default_rng(0), 0
    for trial in range(400):
        data = bytearray((plain, encoded)[trial % 2])
        for _ in range(rng.integers(1, 4)):
            at, kind = rng.integers(len(data)), rng.integers(3)
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                del data[at:at + rng.integers(1, 40)]
            else:
                data[at:at] = rng.bytes(rng.integers(1, 20))
        (tmp_path / 'fuzz.npz').write_bytes(data)
        try:
            source = opened(tmp_path / 'fuzz.npz')
            assert len(source) > 0 and source.labels.min() >= 0
            opened_whole += 1
        except (ValueError, OSError) as error:
            assert 'fuzz.npz' in str(error) and '\n' not in str(error)
    assert 0 < opened_whole < 400

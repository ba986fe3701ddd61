"""Folders of images as people have them: layouts, junk, formats, and pictures that an RGB array cannot hold."""
import io
import logging
import os

import numpy as np
import pytest
from PIL import Image

from dlc_jax.preprocess import center_crop, resize_center_crop
from experiments.dlc.data.decode import SUFFIXES, Decoding, Unreadable, decode_image, read_image
from experiments.dlc.data.sources import image_source


@pytest.fixture
def put(tmp_path):
    """Writes small grey pictures, given by path or as a number of them in a folder."""
    def write(*paths, count=None, value=100, **options):
        for path in [f'{path}/{i}.png' for path in paths for i in range(count)] if count else paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('L', (8, 8), value).save(file, **options)
        return tmp_path
    return write


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def opened(path, split='all', **fields):
    return image_source(dict(name='folder', path=str(path), channels=1, heldout=0.5) | fields, split)


def names(source):
    return [source.name(i) for i in range(len(source))]


# ---- Layouts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['train', 'val', 'test', 'Valid'])
def test_a_class_called_as_a_split_is_a_class(put, said, name):
    source = opened(put(name, 'bus', 'car', count=2))
    assert source.class_names == tuple(sorted((name, 'bus', 'car'))) and len(source) == 6
    assert [line for line in said() if f'the folders {name} beside bus, car are read as classes' in line]
    splits = dict(layout='splits')
    if name == 'train':
        assert len(opened(put(), **splits)) == 2
        assert 'left out are the folders beside train: bus, car' in said()[-1]
    else:
        with pytest.raises(ValueError, match="but no 'train'"):
            opened(put(), **splits)


def test_split_folders_beside_others_are_not_guessed(put, said):
    root = put('train/cat', 'train/dog', 'bus/a', count=2)
    with pytest.raises(ValueError, match="holds train beside bus; set data.layout='splits' .*'classes'") as error:
        opened(root)
    assert '\n' not in str(error.value)
    assert opened(root, layout='classes').class_names == ('bus', 'train')
    assert opened(root, layout='splits').class_names == ('cat', 'dog')
    put('val/cat', count=1)  # now both splits are there: no doubt, but a word
    assert len(opened(root, 'train')) == 4 and 'left out are the folders beside train: bus' in said()[-1]
    with pytest.raises(ValueError, match="data.layout='class' is not one of"):
        opened(root, layout='class')
    with pytest.raises(ValueError, match="data.layout='splits': .* has no folder called train"):
        opened(root / 'train', layout='splits')


def test_images_beside_split_folders_are_not_lost_in_silence(put, said):
    root = put('train/cat', 'val/cat', count=2)
    put('stray.png')
    assert len(opened(root, 'train')) == 2 and '1 image(s) in no folder' in said()[-1]


def test_flat_held_out_images_of_classes_are_refused(put):
    root = put('train/cat', 'train/dog', 'val', count=2)
    with pytest.raises(ValueError, match='val: its images lie in no class folders, but the training images have 2'):
        opened(root, 'heldout')
    flat = put('flat/train', 'flat/val', count=3) / 'flat'
    assert opened(flat, 'heldout').labels.tolist() == [0, 0, 0] and len(opened(flat, 'train')) == 3


@pytest.mark.parametrize('name', ['heldout', 'val', 'valid', 'validation', 'test', 'dev', 'Val'])
def test_every_name_of_a_held_out_split_is_read(put, name):
    root = put('train/cat', count=3)
    put(f'{name}/cat', count=2)
    assert (len(opened(root, 'train')), len(opened(root, 'heldout')), len(opened(root, name.lower()))) == (3, 2, 2)


def test_a_second_held_out_split_is_named(put, said):
    root = put('train/cat', 'valid/cat', 'test/cat', count=2)
    assert names(opened(root, 'heldout')) and 'in valid; left out: test' in said()[-1]
    assert len(opened(root, 'test')) == 2
    with pytest.raises(ValueError, match="data.split='all': .* has 'train', 'heldout' .*test, train, valid"):
        opened(root, 'all')


def test_held_out_splits_alone_are_refused(put):
    with pytest.raises(ValueError, match="has the folder.s. test, val but no 'train'; point data.path at one of them"):
        opened(put('val/cat', 'test/cat', count=1))


def test_splits_below_classes_are_named(put, said):
    assert opened(put('cat/train', 'cat/test', 'dog/train', count=1)).class_names == ('cat', 'dog')
    assert 'class folders hold folders called test, train, which are read as one set' in said()[-1]


# ---- Junk ----------------------------------------------------------------------------------------------------------

def test_system_files_and_folders_are_left_out_and_counted(put, said):
    root = put('cat/0.png', '.ipynb_checkpoints/0.png', '__MACOSX/0.png', '@eaDir/0.png', 'cat/@eaDir/0.png')
    (root / 'cat' / '._0.png').write_bytes(b'\0\5\x16\7' + bytes(60))
    (root / 'cat' / '.DS_Store').write_bytes(b'x')
    source = opened(root)
    assert source.class_names == ('cat',) and names(source) == ['cat/0.png'] and not source.skipped
    assert 'left out 5 hidden or system file(s) or folder(s)' in said()[-1]


def test_links_to_a_folder_above_are_not_followed(put, said):
    root = put('set/cat', 'elsewhere/dog', count=2) / 'set'
    (root / 'cat' / 'up').symlink_to(root)
    (root / 'cat' / 'self').symlink_to(root / 'cat')
    (root / 'dog').symlink_to(root.parent / 'elsewhere' / 'dog')  # as subsets of ImageNet are made
    assert names(opened(root)) == ['cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png']
    assert 'left out 2 link(s) to a folder they lie in' in said()[-1]


def test_pipes_are_not_opened(put, said):
    root = put('cat/0.png')
    os.mkfifo(root / 'cat' / '1.png')
    (root / 'cat' / '2.png').symlink_to('nowhere')
    source = opened(root)
    assert names(source) == ['cat/0.png', 'cat/2.png'] and 'left out 1 pipe(s) or device(s)' in said()[-1]
    assert source[1]['name'] == 'cat/0.png' and source.skipped == {'cat/2.png': 'no such file'}


def test_names_that_are_not_utf8_are_read_and_shown_escaped(tmp_path, said):
    folder = os.fsencode(tmp_path / 'caf') + b'\xe9'
    os.mkdir(folder)
    for name in (b'caf\xe9.png', b'red\x1b[31m.png'):
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(b'no picture')
    with open(os.path.join(folder, b'z.png'), 'wb') as file:
        Image.new('L', (8, 8), 7).save(file, format='PNG')
    source = opened(tmp_path)
    assert source[2]['image'].max() == 7 and source[0]['index'] == source[1]['index'] == 2
    assert all(line.isprintable() for line in said()) and any('caf\\udce9.png' in line for line in said())


# ---- Formats -------------------------------------------------------------------------------------------------------

KINDS = {'.jpe': 'JPEG', '.jfif': 'JPEG', '.jpg': 'JPEG', '.tif': 'TIFF', '.pnm': 'PPM', '.pgm': 'PPM', '.pbm': 'PPM'}


def test_every_format_that_is_decoded_is_listed(put, said):
    for suffix in SUFFIXES:
        put(f'a/x{suffix}', f'b/X{suffix.upper()}', format=KINDS.get(suffix, suffix[1:].upper()))
    put('c/photo.heic', 'c/photo.ico', format='PNG')
    source = opened(put())
    assert len(source) == 2 * len(SUFFIXES) and source.class_names == ('a', 'b')
    assert all(abs(int(source[i]['image'][0, 0, 0]) - 100) < 3 for i in range(len(source))) and not source.skipped
    assert 'left out 2 file(s) of a format that is not read here' in said()[-1]


POSTSCRIPT = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n'


def test_other_formats_are_not_opened_whatever_their_name(tmp_path, monkeypatch):
    """PostScript least of all: Pillow would run Ghostscript on it."""
    programs = tmp_path / 'programs'
    programs.mkdir()
    (programs / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n')
    (programs / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{programs}:{os.environ["PATH"]}')
    (tmp_path / 'a.png').write_bytes(POSTSCRIPT)
    Image.new('RGB', (8, 8)).save(tmp_path / 'b.png', format='ICO')
    for name in 'ab':
        with pytest.raises(Unreadable, match='none of PNG, JPEG'):
            decode_image(tmp_path / f'{name}.png')
    assert not (tmp_path / 'ran').exists()


# ---- Pictures that RGB cannot hold ---------------------------------------------------------------------------------

def test_orientation(tmp_path, said):
    exif, wide = Image.Exif(), np.zeros((8, 16, 3), np.uint8)
    exif[0x0112], wide[:, :8] = 6, 255
    for name, options in (('a.jpg', {}), ('b.png', {}), ('d.webp', dict(lossless=True))):
        Image.fromarray(wide).save(tmp_path / name, exif=exif.tobytes(), **options)
        image, notes = decode_image(tmp_path / name)
        assert image.shape == (8, 16, 3) and notes == ('orientation',), name
        image, notes = decode_image(tmp_path / name, Decoding(exif_orientation='apply'))
        assert image.shape == (16, 8, 3) and notes == () and image[:8].min() > 250 and image[8:].max() < 5, name
    source = opened(tmp_path, channels=3)
    assert [source[i]['image'].shape for i in range(3)] == [(8, 16, 3)] * 3 and source.notes['orientation'] == 3
    assert len(said()) == 1 and 'a.jpg) carry an EXIF orientation that is not applied' in said()[0]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'tRNS'])
def test_transparency(tmp_path, mode):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., :3], pixels[0, :, 3] = 60, 255  # the upper half is opaque
    picture = Image.fromarray(pixels)
    if mode == 'P':
        picture = picture.quantize(4)
    elif mode == 'tRNS':
        picture = Image.fromarray(np.array([[60, 60], [9, 9]], np.uint8))
    elif mode == 'LA':
        picture = picture.convert('LA')
    picture.save(tmp_path / 'x.png', **(dict(transparency=9) if mode == 'tRNS' else {}))
    below = 9 if mode == 'tRNS' else None
    for ground, value in (('drop', below), ('white', 255), ('black', 0)):
        image, notes = decode_image(tmp_path / 'x.png', Decoding(transparency=ground))
        assert (image[0] == 60).all() and (value is None or (image[1] == value).all())
        assert notes == (('transparency',) if ground == 'drop' else ())
    Image.new('RGBA', (4, 4), (9, 9, 9, 255)).save(tmp_path / 'opaque.png')
    assert decode_image(tmp_path / 'opaque.png')[1] == ()


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_32_bit_pixels(tmp_path, dtype):
    Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(dtype)).save(tmp_path / 'x.tif')
    with pytest.raises(Unreadable, match='32-bit pixels .*data.deep_pixels=stretch'):
        decode_image(tmp_path / 'x.tif')
    image, notes = decode_image(tmp_path / 'x.tif', Decoding(1, deep_pixels='stretch'))
    np.testing.assert_array_equal(image[..., 0], np.rint(np.arange(64).reshape(8, 8) * 255 / 63))
    image, notes = decode_image(tmp_path / 'x.tif', Decoding(1, deep_pixels='clip'))
    assert np.unique(image).tolist() == [0, 255] and notes == ('deep_pixels',)


def test_first_of_several_pictures(tmp_path):
    frames = [Image.new('L', (8, 8), value) for value in (10, 200)]
    for name in ('x.gif', 'x.tif'):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        image, notes = decode_image(tmp_path / name)
        assert image.max() == 10 and notes == ('frames',)


@pytest.mark.parametrize('field, value', [('exif_orientation', 'yes'), ('transparency', 'pink'),
                                          ('deep_pixels', 'cut')])
def test_options_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"data.{field}='{value}' is not one of"):
        opened(tmp_path, **{field: value})


def test_read_image_is_not_kept_waiting(tmp_path):
    os.mkfifo(tmp_path / 'x.png')
    for path in (tmp_path / 'x.png', tmp_path):
        with pytest.raises(OSError, match='not a file'):
            read_image(path)


# ---- Long pictures -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('crop', [lambda x: center_crop(x, 256), lambda x: resize_center_crop(x, 256, 224)])
@pytest.mark.parametrize('shape', [(1, 60_000), (20_000, 1), (3, 5_000)])
def test_a_long_picture_takes_little_memory(crop, shape, monkeypatch):
    largest, real = [], Image.Image.resize

    def resize(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return real(self, size, *args, **kwargs)
    monkeypatch.setattr(Image.Image, 'resize', resize)
    image = np.zeros((*shape, 3), np.uint8)
    middle = tuple(slice(side // 2 - 2, side // 2 + 2) if side > 4 else slice(None) for side in shape)
    image[middle] = 255
    out = crop(image)
    assert out.shape[0] == out.shape[1] and max(largest) < 5e6
    assert out[out.shape[0] // 2, out.shape[1] // 2].min() > 200  # the centre of the picture is that of the crop


def test_ordinary_pictures_are_cropped_as_before(monkeypatch):
    """The published crop, bit for bit, up to 32 : 1."""
    image = np.random.default_rng(0).integers(0, 256, (10, 320, 3), np.uint8)
    picture = Image.fromarray(image).resize((512, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(center_crop(image, 16), np.asarray(picture.crop((248, 0, 264, 16))))


# ---- Fuzz ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM'])
def test_damaged_pictures_are_read_or_unreadable(form):
    """Never a traceback of a decoder's own."""
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 3
    options = dict(exif=exif) if form in ('PNG', 'JPEG', 'WEBP', 'TIFF') else {}
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(buffer, form, **options)
    whole, unreadable = buffer.getvalue(), 0
    for trial in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            at = rng.integers(min(len(data), 80) if trial % 2 else len(data))
            if rng.integers(2):
                data[at] = rng.integers(256)
            else:
                del data[at:at + rng.integers(1, 8)]
        try:
            image, _ = decode_image(bytes(data), Decoding(3, 'apply', 'white', 'clip'))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        except Unreadable as error:
            assert '\n' not in str(error)
            unreadable += 1
    assert unreadable > 10

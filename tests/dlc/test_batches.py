import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dlc_jax.preprocess import CenterCrop
from dlc_jax.ssl.augment import MultiCrop, RandomResizedCrop
from dlc_jax.ssl.masking import BlockMasking
from experiments.dlc.data.batches import SmallMultiCrop, eval_batches, image_batches, ssl_batches
from experiments.dlc.data.images import ArrayImages, FakeImages, Unreadable
from experiments.runtime.stream import ArrayBatches, EpochOrder, Share

CROPS = MultiCrop(global_size=8, local_size=4, num_local=2)
MASKING = BlockMasking(grid=4, min_patches=1)


class Brittle(FakeImages):
    """Some images are damaged."""

    def read(self, i):
        if i in (3, 11):
            raise Unreadable('on purpose')
        return super().read(i)


def fake(num=20, kind=FakeImages):
    return kind(10, num)


def in_memory(num=20):
    source = fake(num)
    images = np.stack([source[i]['image'] for i in range(num)])
    return ArrayImages(images, np.arange(num) % 3, ('a', 'b', 'c'), prefix='x')


def arrays(num=23):
    return {'x': np.arange(num * 6, dtype=np.float32).reshape(num, 2, 3), 'cond': np.arange(num, dtype=np.uint8)}


STREAMS = {
    'arrays': lambda **kw: ArrayBatches(arrays(), 8, seed=1, **kw),
    'arrays, drop_last': lambda **kw: ArrayBatches(arrays(), 8, seed=1, drop_last=True, **kw),
    'ssl, vectorized': lambda **kw: ssl_batches(in_memory(), CROPS, MASKING, 8, groups=4, seed=1, **kw),
    'ssl, threads': lambda **kw: ssl_batches(fake(), CROPS, MASKING, 8, groups=4, seed=1, **kw),
    'images': lambda **kw: image_batches(fake(), RandomResizedCrop(6), 8, seed=1, **kw),
}


def take(stream, num):
    return [next(stream) for _ in range(num)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


# ---- What every stream owes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', STREAMS)
def test_resumes_exactly_anywhere(name):
    stream = STREAMS[name]()
    states, batches = [], []
    for _ in range(8):
        states.append(stream.get_state())
        batches.append(next(stream))
    for k in np.random.default_rng(0).permutation(8)[:4]:
        again = STREAMS[name]()
        next(again)  # a used stream can be moved as well
        again.set_state(states[k])
        assert again.get_state() == states[k]
        assert_same(take(again, 8 - k), batches[k:])
    assert json.loads(json.dumps(states)) == states


@pytest.mark.parametrize('name', STREAMS)
def test_processes_share_out_the_global_batch(name):
    whole = take(STREAMS[name](), 4)
    for count in (2, 4):
        parts = [take(STREAMS[name](share=Share((p,), count)), 4) for p in range(count)]
        assert_same([{k: np.concatenate([part[i][k] for part in parts]) for k in whole[i]} for i in range(4)], whole)


@pytest.mark.parametrize('name', STREAMS)
def test_seed_matters_and_batches_differ(name):
    first, second = take(STREAMS[name](), 2)
    assert any((first[k] != second[k]).any() for k in first)


def test_threads_and_workers_change_nothing():
    make = lambda **kw: ssl_batches(fake(kind=Brittle), CROPS, MASKING, 8, groups=2, seed=0, **kw)
    whole = take(make(num_threads=1), 6)
    assert_same(take(make(num_threads=5), 6), whole)
    source = fake(kind=Brittle)
    stream = ssl_batches(source, CROPS, MASKING, 8, groups=2, seed=0, num_workers=2)
    stream.set_state({'position': 8})
    assert_same(take(stream, 5), whole[1:])
    # What workers skipped is known here too, and the position is that of what was handed out, not of what is ahead.
    assert set(source.skipped) == {'fake/train/3', 'fake/train/11'}
    assert stream.get_state() == {'position': 48}


def test_workers_need_no_jax():
    """Nothing of ours brings jax into a worker process."""
    code = ('import sys, experiments.dlc.data.batches, experiments.dlc.data.sources\n'
            "assert not {'jax', 'tensorflow'} & set(sys.modules)")
    subprocess.run([sys.executable, '-c', code], check=True, cwd=pathlib.Path(__file__).resolve().parents[2])


# ---- Arrays --------------------------------------------------------------------------------------------------------

def test_every_epoch_visits_every_row_once():
    stream = ArrayBatches(arrays(), 23, seed=0)
    first, second = take(stream, 2)
    for batch in (first, second):
        np.testing.assert_array_equal(np.sort(batch['cond']), np.arange(23))
        np.testing.assert_array_equal(batch['x'], arrays()['x'][batch['cond']])
    assert (first['cond'] != second['cond']).any() and (first['cond'] != np.arange(23)).any()
    across = np.concatenate([b['cond'] for b in take(ArrayBatches(arrays(), 8, seed=0), 23)])  # 23 x 8 = 8 epochs
    np.testing.assert_array_equal(np.bincount(across), 8)


def test_drop_last_ends_each_epoch_early():
    rows = np.concatenate([b['cond'] for b in take(ArrayBatches(arrays(), 8, seed=0, drop_last=True), 4)])
    assert len(set(rows[:16])) == len(set(rows[16:])) == 16
    order = ArrayBatches(arrays(), 23, seed=0)
    np.testing.assert_array_equal(rows[:16], next(order)['cond'][:16])
    np.testing.assert_array_equal(rows[16:], next(order)['cond'][:16])


def test_order_spans_epochs_inside_a_batch():
    order = EpochOrder(5, seed=0)
    whole = order(np.arange(20))
    for start in range(15):
        np.testing.assert_array_equal(EpochOrder(5, seed=0)(np.arange(start, start + 5)), whole[start:start + 5])


def test_memory_mapped_rows_and_casts(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (30, 7)).astype(np.uint8)
    np.save(tmp_path / 'codes.npy', codes)
    mapped = np.load(tmp_path / 'codes.npy', mmap_mode='r')
    stream = ArrayBatches({'codes': mapped, 'row': np.arange(30)}, 10, seed=0,
                          casts={'codes': np.int32, 'row': lambda x: x * 2, 'absent': np.int8})
    batch = next(stream)
    assert batch['codes'].dtype == np.int32 and type(batch['codes']) is np.ndarray
    np.testing.assert_array_equal(batch['codes'], codes[batch['row'] // 2])


@pytest.mark.parametrize('make,match', [
    (lambda: ArrayBatches({'a': np.zeros(3), 'b': np.zeros(4)}, 2, seed=0), "'a': 3, 'b': 4"),
    (lambda: ArrayBatches({}, 2, seed=0), 'one length'),
    (lambda: ArrayBatches({'a': np.zeros(3)}, 4, seed=0, drop_last=True), 'batch_size=4'),
    (lambda: ArrayBatches({'a': np.zeros(9)}, 4, seed=0, share=Share((0,), 3)), 'batch_size=4 is not divisible into 3'),
    (lambda: ssl_batches(fake(), CROPS, MASKING, 8, groups=3, seed=0), 'groups=3'),
    (lambda: ssl_batches(fake(), CROPS, MASKING, 8, groups=2, seed=0, share=Share((0,), 4)), 'groups=2'),
    (lambda: ssl_batches(fake(), CROPS, BlockMasking(grid=3), 8, groups=1, seed=0), 'global_size=8'),
    (lambda: ssl_batches(fake(), CROPS, MASKING, 8, groups=1, seed=0, vectorized=True), 'in_memory'),
    (lambda: eval_batches(fake(), CenterCrop(4), 0), 'batch_size=0 must be at least 1'),
])
def test_bad_sizes_are_named(make, match):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert '\n' not in str(error.value)


# ---- Self-supervised -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['ssl, vectorized', 'ssl, threads'])
def test_ssl_contract(name):
    batch = next(STREAMS[name]())
    size = MASKING.max_masked(4)  # two images, four global crops a group
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'global_crops': ((8, 2, 8, 8, 3), 'float32'), 'local_crops': ((8, 2, 4, 4, 3), 'float32'),
        'masks': ((8, 2, 16), 'bool'), 'mask_indices': ((4, size), 'int32'), 'mask_weights': ((4, size), 'float32')}
    groups = batch['masks'].reshape(4, -1)
    for g in range(4):
        real = batch['mask_weights'][g] > 0
        np.testing.assert_array_equal(np.sort(batch['mask_indices'][g][real]), np.flatnonzero(groups[g]))
        assert (batch['masks'].reshape(4, 4, 16)[g].any(-1)).sum() == 2  # half of the crops of every group
    assert len({group.tobytes() for group in groups}) > 1


def test_small_images_take_the_numpy_route():
    assert isinstance(STREAMS['ssl, vectorized'](), SmallMultiCrop)
    assert not isinstance(STREAMS['ssl, threads'](), SmallMultiCrop)
    both = [next(ssl_batches(in_memory(), CROPS, MASKING, 8, groups=2, seed=0, vectorized=v)) for v in (True, False)]
    np.testing.assert_array_equal(both[0]['masks'], both[1]['masks'])
    assert abs(both[0]['global_crops'].mean() - both[1]['global_crops'].mean()) < 0.5


# ---- One pass ------------------------------------------------------------------------------------------------------

def test_eval_is_in_order_and_padded():
    source = fake()
    batches = list(eval_batches(source, CenterCrop(10, (0.0,), (1 / 255,)), 8))
    assert [b['image'].shape for b in batches] == [(8, 10, 10, 3)] * 3
    mask, index = (np.concatenate([b[k] for b in batches]) for k in ('mask', 'index'))
    np.testing.assert_array_equal(mask, np.arange(24) < 20)
    np.testing.assert_array_equal(index, np.minimum(np.arange(24), 19))
    for i, image, label in zip(index, *(np.concatenate([b[k] for b in batches]) for k in ('image', 'label'))):
        np.testing.assert_allclose(image, source[i]['image'], atol=1e-3)
        assert label == source[i]['label']


@pytest.mark.parametrize('num,cuts', [(20, (8,)), (21, (4, 16)), (5, (5,))])
def test_eval_of_parts_is_that_of_the_whole(num, cuts):
    bounds = (0, *cuts, num)
    seen = [batch['index'][batch['mask']] for start, stop in zip(bounds, bounds[1:])
            for batch in eval_batches(fake(num), CenterCrop(4), 4, part=range(start, stop))]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(num))


def test_eval_continues_and_takes_dicts():
    both = lambda image: {'small': CenterCrop(4)(image), 'large': CenterCrop(6)(image)}
    whole = list(eval_batches(fake(), both, 5))
    rest = list(eval_batches(fake(), both, 5, part=range(10, 20)))
    assert whole[0].keys() == {'small', 'large', 'label', 'index', 'mask'}
    assert_same(rest, whole[2:])


def test_eval_over_damaged_images():
    source = fake(kind=Brittle)
    (batch,) = eval_batches(source, CenterCrop(10, (0.0,), (1 / 255,)), 20)
    np.testing.assert_array_equal(np.flatnonzero(~batch['mask']), [3, 11])
    for i in np.flatnonzero(batch['mask']):
        np.testing.assert_array_equal(batch['image'][i], fake()[i]['image'])
    assert set(source.skipped) == {'fake/train/3', 'fake/train/11'}


def test_image_batches_follow_their_labels():
    batch = next(image_batches(fake(), lambda rng, image: image, 20, seed=0))
    seen = {fake()[i]['image'].tobytes(): fake()[i]['label'] for i in range(20)}
    assert [seen[image.tobytes()] for image in batch['image']] == batch['label'].tolist()

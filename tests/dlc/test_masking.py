import numpy as np
import pytest

from dlc_jax.ssl.masking import BlockMasking, pack_masks


def test_exact_number_of_masked_crops_each_in_its_part_of_the_range():
    masking = BlockMasking()
    for seed in range(5):
        masks = masking(np.random.default_rng(seed), 13)
        assert masks.shape == (13, 256) and masks.dtype == bool
        counts = np.sort(masks.sum(-1))
        assert (counts[:7] == 0).all() and (counts[7:] > 0).all()  # floor(13 / 2) have a mask
        # linspace(0.1, 0.5, 7): the i-th mask may not exceed the upper edge of the i-th part.
        assert (counts[7:] <= np.floor(256 * np.linspace(0.1, 0.5, 7)[1:])).all()


def test_aims_are_met_on_average():
    counts = np.concatenate([BlockMasking()(np.random.default_rng(s), 64).sum(-1) for s in range(4)])
    counts = counts[counts > 0]
    # Aims are uniform in [25.6, 128], mean 76.8; masks fall a little short.
    assert 68 < counts.mean() < 77 and counts.max() > 115 and counts.min() < 35


def test_masked_crops_are_shuffled():
    has = np.stack([BlockMasking()(np.random.default_rng(s), 8).any(-1) for s in range(200)])
    assert (np.abs(has.mean(0) - 0.5) < 0.15).all()


def test_a_mask_is_made_of_rectangles():
    masking = BlockMasking(max_patches=200)
    mask = masking.mask(np.random.default_rng(1), 12)
    assert 0 < mask.sum() <= 12
    single = BlockMasking(grid=(8, 8), min_patches=6, ratio=(0.1, 0.1), min_aspect=1.0)
    block = single.mask(np.random.default_rng(0), 6)  # one square of round(sqrt(6)) = 2 fits, then 2 more may follow
    rows, columns = np.nonzero(block)
    assert block[rows[0]:rows[0] + 2, columns[0]:columns[0] + 2].all()


@pytest.mark.parametrize('grid,min_patches', [((4, 4), 1), ((2, 2), 1), ((3, 5), 1)])
def test_small_grids(grid, min_patches):
    masking = BlockMasking(grid=grid, min_patches=min_patches, ratio=(0.25, 0.6))
    masks = np.stack([masking(np.random.default_rng(s), 8) for s in range(20)])
    counts = masks.sum(-1)
    assert (counts > 0).sum() >= 0.9 * 20 * 4
    assert masks.any((0, 1)).all()  # every patch is masked at some time


def test_static_bound_by_hand():
    # 4 crops -> 2 masks, parts end at 0.3 and 0.5: floor(76.8) + floor(128).
    assert BlockMasking().max_masked(4) == 76 + 128
    assert BlockMasking(share=0.0).max_masked(4) == 1
    for seed in range(20):
        assert BlockMasking()(np.random.default_rng(seed), 4).sum() <= 204


def test_pack_masks():
    masks = np.zeros((3, 5), bool)
    masks[0, [1, 4]] = True
    masks[2, 3] = True
    indices, weights = pack_masks(masks, 6)
    assert indices.dtype == np.int32 and weights.dtype == np.float32
    np.testing.assert_array_equal(indices, [1, 4, 13, 0, 0, 0])
    np.testing.assert_array_equal(weights, [0.5, 0.5, 1, 0, 0, 0])
    with pytest.raises(ValueError, match='size=2'):
        pack_masks(masks, 2)


def test_packed_masks_restore_the_masks():
    masking = BlockMasking(grid=(6, 6), min_patches=1)
    masks = masking(np.random.default_rng(3), 10)
    indices, weights = pack_masks(masks, masking.max_masked(10))
    again = np.zeros(masks.size, bool)
    again[indices[weights > 0]] = True
    np.testing.assert_array_equal(again.reshape(masks.shape), masks)
    np.testing.assert_allclose(weights.sum(), masks.any(-1).sum(), rtol=1e-6)


def test_deterministic_in_the_generator():
    one, two, other = (BlockMasking()(np.random.default_rng(s), 16) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize('field,value', [('grid', (0, 4)), ('share', 1.5), ('ratio', (0.5, 0.1)),
                                         ('min_patches', 0), ('max_patches', 0), ('min_aspect', 0.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        BlockMasking(**{field: value})

"""Blocks of a long computation: read again where they are whole and its own, computed again else."""
import numpy as np
import pytest

from experiments.runtime import blocks
from experiments.runtime.blocks import Blocks

ARRAYS = {'tokens': np.arange(6, dtype=np.int32).reshape(2, 3), 'mask': np.array([True, False]),
          'scores': np.array([np.pi, -0.0], np.float32)}


def unexpected():
    raise AssertionError('it is there already')


def test_a_block_is_computed_once(tmp_path):
    place = str(tmp_path / 'out.json.partial')
    make = lambda: Blocks.of(place, 'responses', ARRAYS['tokens'], 0.7)
    assert make().get('0', lambda: ARRAYS) is ARRAYS
    again = make().get('0', unexpected)
    assert again.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        assert again[name].dtype == x.dtype and again[name].tobytes() == x.tobytes()
    other = {'tokens': ARRAYS['tokens'] + 1}
    assert make().get('2', lambda: other) is other
    for decisive in ((ARRAYS['tokens'], 0.8), (ARRAYS['tokens'] + 1, 0.7), (ARRAYS['tokens'].reshape(3, 2), 0.7),
                     (ARRAYS['tokens'].astype(np.int64), 0.7)):
        assert Blocks.of(place, 'responses', *decisive).get('0', lambda: other) is other
    assert Blocks().get('0', lambda: other) is other
    blocks.remove(place)
    assert not list(tmp_path.iterdir())
    blocks.remove(place)
    blocks.remove('')


@pytest.mark.parametrize('damage', [lambda data: data[:-9], lambda data: b'', lambda data: data[:99],
                                    lambda data: data.replace(np.float32(np.pi).tobytes(), bytes(4))])
def test_a_damaged_block_is_computed_again(tmp_path, damage):
    computation = Blocks.of(str(tmp_path), 'responses')
    computation.get('0', lambda: ARRAYS)
    file, = tmp_path.glob('*/0.npz')
    file.write_bytes(damage(file.read_bytes()))
    assert computation.get('0', lambda: ARRAYS) is ARRAYS
    assert computation.get('0', unexpected).keys() == ARRAYS.keys()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match=r'file/scores-\w+/0.npz: cannot be written .*; make room, or choose another'):
        Blocks.of(str(tmp_path / 'file'), 'scores').get('0', lambda: ARRAYS)

"""Files of `torch.save` as people have them: both layouts, checkpoints of trainers, and what a pickle may not do."""
import argparse
import collections
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.weights import files

torch = pytest.importorskip('torch')
LAYOUTS = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before 1.6'])


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


@LAYOUTS
def test_views_dtypes_and_parameters(tmp_path, zipped):
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {'whole': x, 'transposed': x.t(), 'part': x[1:, ::2], 'row': x[2:3], 'scalar': x[3, 5], 'none': x[4:],
               'half': x.bfloat16(), 'many': torch.nn.Parameter(x.reshape(2, 3, 4).permute(2, 0, 1)),
               'other': torch.arange(5, dtype=torch.int16), 'double': x.double() / 3, 'noted': x + 1,
               'noted parameter': torch.nn.Parameter(x - 1)}
    tensors['noted'].note = tensors['noted parameter'].note = 'an attribute'
    save({'model': tensors, 'step': 3}, tmp_path / 'x.pt', zipped)
    state_dict = files.load_state_dict(tmp_path / 'x.pt')
    assert set(state_dict) == set(tensors)
    for name, tensor in tensors.items():
        assert state_dict[name].flags.c_contiguous
        np.testing.assert_array_equal(state_dict[name], tensor.detach().double().numpy(), err_msg=name)
    assert state_dict['half'].dtype == jnp.bfloat16 and state_dict['double'].dtype == np.float64
    data = (tmp_path / 'x.pt').read_bytes()
    for length in (len(data) // 2, len(data) - 9, 30):
        (tmp_path / 'x.pt').write_bytes(data[:length])
        with pytest.raises((OSError, ValueError), match='x.pt: (truncated|neither)'):
            files.load_state_dict(tmp_path / 'x.pt')


@LAYOUTS
def test_a_module_s_state_dict_with_its_metadata(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert isinstance(model.state_dict(), collections.OrderedDict) and model.state_dict()._metadata
    save(model.state_dict(), tmp_path / 'x.pth', zipped)
    state_dict = files.load_state_dict(tmp_path / 'x.pth')
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(state_dict[name], tensor.numpy())


def test_parts_of_storages_before_torch_0_4(tmp_path):
    """As the reader of PyTorch knows them: (key of the part, offset, size) at the end of a storage's record."""
    class Storage:
        def __init__(self, *record):
            self.record = record

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.record if isinstance(obj, Storage) else None

    class Rebuilt:
        def __init__(self, *args):
            self.args = args

        def __reduce__(self):
            return torch._utils._rebuild_tensor, self.args

    def write(size):
        part = Storage('storage', torch.FloatStorage, 'a', 'cpu', 6, ('b', 2, size))
        with open(tmp_path / 'x.pth', 'wb') as file:
            for head in (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}):
                pickle.dump(head, file, protocol=2)
            Pickler(file, protocol=2).dump({'x': Rebuilt(part, 1, (2,), (1,))})
            pickle.dump(['a'], file, protocol=2)
            file.write((6).to_bytes(8, 'little') + np.arange(6, dtype=np.float32).tobytes())
    write(4)
    np.testing.assert_array_equal(files.load_state_dict(tmp_path / 'x.pth')['x'], [3, 4])
    write(5)
    with pytest.raises(OSError, match='truncated or damaged .*part of storage a reaches outside'):
        files.load_state_dict(tmp_path / 'x.pth')


@LAYOUTS
def test_what_trainers_keep_beside_the_weights(tmp_path, zipped):
    """A checkpoint of facebookresearch/DiT: the average is what its own sampler reads."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = model.state_dict()
    average = {name: x + 1 for name, x in weights.items()}
    saved = {'model': weights, 'ema': average, 'opt': optimizer.state_dict(), 'args': argparse.Namespace(lr=1e-4),
             'rng': np.random.default_rng(0), 'device': torch.device('cpu'), 'size': torch.Size([1]), 'module': model,
             'history': collections.defaultdict(list, loss=[np.float64(1)]), 'dtype': torch.float16,
             'sparse': torch.eye(2).to_sparse()}
    save(saved, tmp_path / 'x.pt', zipped)
    for key, want in ((None, average), ('ema', average), ('model', weights)):
        state_dict = files.load_state_dict(tmp_path / 'x.pt', key=key)
        assert set(state_dict) == {'weight', 'bias'}
        np.testing.assert_array_equal(state_dict['weight'], want['weight'].numpy())
    for key, wanted in (('args', 'argparse.Namespace'), ('module', 'torch.nn.modules.linear.Linear')):
        with pytest.raises(ValueError, match=f'x.pt: refused, because reading it would run {wanted}'):
            files.load_state_dict(tmp_path / 'x.pt', key=key)
    save({'model': weights | {'bias': torch.eye(2).to_sparse()}}, tmp_path / 'x.pt', zipped)
    with pytest.raises(ValueError, match=r"holds 0 state dicts .*entries are \['model'\]"):
        files.load_state_dict(tmp_path / 'x.pt')
    with pytest.raises(ValueError, match="reading 'bias' would run torch._utils._rebuild_sparse_tensor"):
        files.load_state_dict(tmp_path / 'x.pt', key='model')
    save(model, tmp_path / 'x.pt', zipped)
    with pytest.raises(ValueError, match='would run torch.nn.modules.linear.Linear; export its state dict'):
        files.load_state_dict(tmp_path / 'x.pt')
    save({'student': weights, 'teacher': average}, tmp_path / 'x.pt', zipped)
    with pytest.raises(ValueError, match=r"holds 2 state dicts \['student', 'teacher'\]; choose one with key="):
        files.load_state_dict(tmp_path / 'x.pt')


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@LAYOUTS
def test_no_code_runs(tmp_path, zipped):
    ran = tmp_path / 'ran'
    weights = collections.OrderedDict(a=torch.ones(2))
    weights.hook, weights.values = Attack(ran), 'no method'  # attributes of the state dict itself
    save({'model': weights, 'extra': Attack(ran)}, tmp_path / 'x.pt', zipped)
    np.testing.assert_array_equal(files.load_state_dict(tmp_path / 'x.pt')['a'], [1, 1])
    save({'a': torch.ones(2), 'b': Attack(ran)}, tmp_path / 'x.pt', zipped)
    with pytest.raises(ValueError, match="x.pt: refused, because reading 'b' would run .*open"):
        files.load_state_dict(tmp_path / 'x.pt')
    assert not ran.exists()


def write_zip(path, pickled, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', pickled)
        for name, data in members.items():
            archive.writestr(f'archive/{name}', data)


def test_files_that_would_take_memory(tmp_path):
    path = tmp_path / 'x.pth'
    write_zip(path, bytes(10_000_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match='x.pth: compressed'):
        files.load_state_dict(path)
    write_zip(path, pickle.dumps({}), byteorder=b'big')
    with pytest.raises(ValueError, match='big-endian'):
        files.load_state_dict(path)
    # A number that the unpickler in C takes for the size of a table: 32 GB.
    write_zip(path, b'\x80\x02}r\xff\xff\xff\xff.')
    with pytest.raises(ValueError, match='holds 0 state dicts'):
        files.load_state_dict(path)
    write_zip(path, b'\x80\x02\x8e' + (1 << 40).to_bytes(8, 'little') + b'.')
    with pytest.raises(OSError, match='x.pth: truncated or damaged'):
        files.load_state_dict(path)
    torch.save({'a': torch.zeros(1).expand(10 ** 12)}, path)
    with pytest.raises(ValueError, match=r"x.pth: 'a' of shape \(1000000000000,\) repeats 1 numbers"):
        files.load_state_dict(path)
    torch.save({'a': torch.zeros(1).expand(10 ** 12), 'b': 1, 'model': {'c': torch.ones(2).expand(1, 2)}}, path)
    assert files.load_state_dict(path)['c'].shape == (1, 2)

"""Damaged and hostile weight files, indices and configs: one line that names the file, or what the file says."""
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.weights import files

TENSORS = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b.c': np.float16([1.5, -2.0])}
DEEP = '[' * 100_000


def write_header(path, header, data=b''):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + data)


def entry(dtype='F32', shape=(2,), begin=0, end=8):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


@pytest.mark.parametrize('header, size', [
    ({'a': entry(), 'b': entry()}, 8), ({'a': entry(), 'b': entry(begin=4, end=12)}, 12),  # overlapping
    ({'a': entry(), 'b': entry(begin=12, end=20)}, 20), ({'a': entry()}, 12),  # with holes
    (b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b'}', 8),  # twice
    (DEEP.encode(), 0), (b'{"a":' + DEEP.encode(), 0), (b'\xff\xfe', 0), ([], 0),
    ({'a': entry(shape=[-2])}, 8), ({'a': entry(shape=[2.0])}, 8), ({'a': entry(shape=[2 ** 40, 2 ** 40])}, 8),
    ({'a': entry(begin=-8, end=0)}, 8), ({'a': entry(end=1 << 62)}, 8), ({'a': 3}, 8), ({'a': {}}, 8),
])
def test_headers_that_do_not_describe_their_file(tmp_path, header, size):
    path = tmp_path / 'model.safetensors'
    write_header(path, header, bytes(size))
    with pytest.raises(OSError, match='model.safetensors: (truncated or )?not a safetensors file') as error:
        files.load_state_dict(path)
    assert '\n' not in str(error.value)


def test_names_and_types_that_are_not_read(tmp_path):
    path = tmp_path / 'model.safetensors'
    write_header(path, {'a': entry('F8_E4M3', (8,))}, bytes(8))
    with pytest.raises(ValueError, match='model.safetensors: a is F8_E4M3, which is not read'):
        files.load_state_dict(path)
    write_header(path, {'a\x1b[2J\n': entry()}, bytes(8))
    with pytest.raises(ValueError, match='is no name of a tensor') as error:
        files.load_state_dict(path)
    assert str(error.value).isprintable()
    with pytest.raises(ValueError, match="without entries such as key='teacher'"):
        save_file(TENSORS, path)
        files.load_state_dict(path, key='teacher')


@pytest.mark.timeout(20)
@pytest.mark.parametrize('weight_map, message', [
    ({'a': 'pipe'}, 'pipe: not a regular file'), ({'a': 'model.safetensors.index.json'}, 'is an index itself'),
    ({'a': 3}, 'shard 3 is not a plain file name'), ({'a': None}, 'shard None is not'), ({'a': '..'}, 'not a regular'),
    ({'a': ['x']}, 'not a plain'), ({'a': ''}, 'not a regular'),
    ({'a': 'none.safetensors'}, 'none.safetensors: no such'),
    ({}, 'not an index of shards'), ([], 'not an index of shards'), ('a', 'not an index of shards'),
])
def test_indices_that_lead_astray(tmp_path, weight_map, message):
    os.mkfifo(tmp_path / 'pipe')
    save_file(TENSORS, tmp_path / '1.safetensors')
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        files.load_state_dict(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize('text, message', [
    (DEEP, 'nested too deeply'), ('{"a": ' + DEEP, 'nested too deeply'), ('[]', 'a list, not an object'),
    ('{"weight_map": {}, "weight_map": {}}', "key 'weight_map' is there twice"), ('', 'not JSON'),
    ('{"a": 1' + '0' * 5000 + '}', 'not JSON'), (b'\xff\xfe', 'not JSON'),
])
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / 'model.safetensors.index.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f'index.json: not JSON.*{message}|index.json: {message}'):
        files.load_state_dict(tmp_path)
    (tmp_path / 'model.safetensors.index.json').rename(tmp_path / 'config.json')
    with pytest.raises(ValueError, match='config.json: not JSON'):
        files.read_config(tmp_path)


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / 'config.json')
    os.mkfifo(tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match='config.json: not a regular file'):
        files.read_config(tmp_path)
    with pytest.raises(ValueError, match='model.safetensors: not a regular file'):
        files.load_state_dict(tmp_path)


def mutations(data, count, seed):
    """`data` with bytes changed, cut out, repeated or put in; the first 300 bytes, where structure is, more often."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(min(len(changed), 300) if rng.random() < 0.7 else len(changed)))
            length = int(rng.integers(1, 9))
            kind = rng.integers(4)
            if kind == 0:
                changed[at] = rng.choice([0, 1, 0x7f, 0x80, 0xff, ord('['), ord('"'), ord('9'), rng.integers(256)])
            elif kind == 1:
                del changed[at:at + length]
            elif kind == 2:
                changed[at:at] = changed[at:at + length]
            else:
                changed[at:at + 8] = int(rng.integers(1 << 62)).to_bytes(8, 'little')
            if not changed:
                break
        yield bytes(changed)


def read_all(path):
    for tensor in files.load_state_dict(path).values():
        assert tensor.nbytes < 1e6


def torch_file(zipped):
    def write(path):
        torch = pytest.importorskip('torch')
        tensors = {name: torch.from_numpy(x.copy()) for name, x in TENSORS.items()}
        torch.save({'model': tensors, 'step': 1}, path, _use_new_zipfile_serialization=zipped)
    return write


@pytest.mark.timeout(120)
@pytest.mark.parametrize('name, write, read', [
    ('model.safetensors', lambda path: save_file(TENSORS, path), read_all),
    ('zip.pt', torch_file(True), read_all), ('legacy.pt', torch_file(False), read_all),
    ('model.safetensors.index.json', lambda path: path.write_text(json.dumps(
        {'metadata': {'total_size': 28}, 'weight_map': {name: '1.safetensors' for name in TENSORS}})), read_all),
    ('config.json', lambda path: path.write_text(json.dumps({'model_type': 'llama', 'rope_parameters': {'a': 1.5}})),
     lambda path: files.read_config(path.parent)),
], ids=lambda x: x if isinstance(x, str) else '')
def test_any_damage_is_one_line_or_harmless(tmp_path, name, write, read):
    save_file(TENSORS, tmp_path / '1.safetensors')
    path = tmp_path / name
    write(path)
    read(path)
    failures = 0
    for data in mutations(path.read_bytes(), 300, seed=len(name)):
        path.write_bytes(data)
        try:
            read(path)
        except (OSError, ValueError) as error:
            failures += 1
            assert str(tmp_path) in str(error) and str(error).isprintable() and len(str(error)) < 1000, error
    assert failures > 100

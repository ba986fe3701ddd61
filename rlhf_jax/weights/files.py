"""State dicts on disk, mapped rather than read: a model larger than memory converts tensor by tensor.

    state_dict = load_state_dict('Llama-3.1-8B')           # a folder with model.safetensors.index.json and its shards
    module, params = from_torch('llama', state_dict, config=read_config('Llama-3.1-8B'), shardings=...)
    save('exported', tensors('llama', module, params), config_of('llama', module))

Files of safetensors and of `torch.save` are read, one file or shards with an index; safetensors are written. The
former are a length, a JSON header of names, dtypes, shapes and offsets, and the bytes. The latter are pickles, which
can run any code; they are read without PyTorch and without running any (`torch_pickle.py`).
"""
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.weights import torch_file
from rlhf_jax.weights.json_file import check_regular, parse_json, read_json
from rlhf_jax.weights.tensor import Tensor

_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64,
           'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16,
           'U8': np.uint8, 'BOOL': np.bool_}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_INDEX_SUFFIX = '.index.json'
# Files with a suffix of weights that lie beside a model's own: a trainer's state, adapters of PEFT, and the same
# weights under the names of Meta and Mistral.
_BESIDE_WEIGHTS = re.compile(
    r'(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)|(adapter_model|consolidated)\..*')
_LONGEST_NAME = 1000
_SHARD = 5_000_000_000  # bytes a shard at most, as `transformers` 4 writes them


class StateDict(Mapping):
    """{name: array}, each a view of a file on disk, mapped when it is asked for and forgotten again."""

    def __init__(self, path: pathlib.Path, tensors: Mapping[str, Tensor]):
        self._path, self._tensors = path, tensors

    @property
    def specs(self) -> Mapping[str, Tensor]:
        """{name: what has its shape and dtype}; nothing is read."""
        return self._tensors

    def where(self, name: str) -> str:
        """' (in FILE)': the file that holds `name`, or would."""
        return f' (in {self._tensors[name].path if name in self._tensors else self._path})'

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would map the file
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


# ---- Reading ---------------------------------------------------------------------------------------------------------

def load_state_dict(path: str | pathlib.Path, *, key: str | None = None) -> StateDict:
    """The tensors of a file, or of a directory that holds one state dict; read when they are asked for.

    Args:
        path: `.safetensors`; `.pth`, `.pt`, `.bin` or `.pkl` as `torch.save` writes it; an index of shards
            (`*.index.json`); or a directory with an index, or else with a single such file.
        key: entry to take from a file of `torch.save` that holds more than a state dict ('teacher'). None: the file is
            a state dict, or holds exactly one, or an average 'ema' of the weights beside them.

    Raises:
        FileNotFoundError: nothing there.
        OSError: a truncated or damaged file.
        ValueError: not a format named above, an index that does not fit its shards, or a part that only code could
            build.
    """
    path = pathlib.Path(path)
    tensors = _tensors(_only_file(path) if path.is_dir() else path, key)
    for name in tensors:  # they appear in messages
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(f'{path}: {name[:40]!r}... is no name of a tensor')
    return StateDict(path, tensors)


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """`config.json` of the folder `path`.

    Raises:
        FileNotFoundError, ValueError: none there, or not one JSON object.
    """
    return read_json(pathlib.Path(path) / 'config.json')


def _only_file(directory: pathlib.Path) -> pathlib.Path:
    """The file of weights in `directory`: an index of shards, or the only file of the first suffix there is. What lies
    beside weights counts where there is nothing else, such as an adapter alone."""
    patterns = ('*.safetensors' + _INDEX_SUFFIX, '*.safetensors', '*' + _INDEX_SUFFIX, '*.bin', '*.pth', '*.pt')
    for beside, pattern in [(beside, pattern) for beside in (False, True) for pattern in patterns]:
        candidates = sorted(file for file in directory.glob(pattern)
                            if bool(_BESIDE_WEIGHTS.fullmatch(file.name)) == beside)
        if len(candidates) > 1:
            raise ValueError(f'{directory}: holds {len(candidates)} files {pattern}; name one of them')
        if candidates:
            return candidates[0]
    raise FileNotFoundError(f'{directory}: no .safetensors, .bin, .pth or .pt file in it')


def _tensors(path: pathlib.Path, key: str | None) -> dict[str, Tensor]:
    check_regular(path)
    if not path.name.endswith((_INDEX_SUFFIX, '.safetensors')):
        return torch_file.tensors(path, key)
    if key is not None:
        raise ValueError(f'{path}: holds one state dict, without entries such as key={key!r}; leave it out')
    return _of_shards(path) if path.name.endswith(_INDEX_SUFFIX) else _of_safetensors(path)


def _of_shards(index: pathlib.Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index}: not an index of shards (no weight_map)')
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise ValueError(f'{index}: shard {shard!r:.80} is not a plain file name beside the index')
        if shard.endswith(_INDEX_SUFFIX):
            raise ValueError(f'{index}: shard {shard!r:.80} is an index itself')
        if shard not in shards:
            shards[shard] = _tensors(index.parent / shard, None)
        if name not in shards[shard]:
            raise ValueError(f'{index.parent / shard}: tensor {name} is missing though the index places it there')
    return {name: shards[shard][name] for name, shard in weight_map.items()}


# The package checks a file: header, types, and that the tensors fill it without holes or overlaps. It does not say
# where a tensor lies, which a map of the file needs (its own reader copies), and of a name given twice it takes the
# last.
def _of_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, 'numpy'):
            pass
    except (SafetensorError, OSError) as error:
        raise OSError(f'{path}: truncated or not a safetensors file ({error})') from None
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise OSError(f'{path}: not a safetensors file ({error})') from None
    header.pop('__metadata__', None)
    tensors = {}
    for name, entry in header.items():
        if entry['dtype'] not in _DTYPES:
            raise ValueError(f'{path}: {name} is {entry["dtype"]}, which is not read; save it as F32, F16 or BF16')
        tensors[name] = Tensor(path, np.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape']),
                               8 + length + entry['data_offsets'][0])
    return tensors


# ---- Writing ---------------------------------------------------------------------------------------------------------

# The package writes from the memory of all tensors at once; here one is made, written and dropped before the next.
def save_state_dict(path: str | pathlib.Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes `state_dict` as one safetensors file, under a temporary name until it is complete. One tensor is in memory
    at a time where `state_dict` makes or reads them when asked. Folders on the way are created.

    Raises:
        ValueError: another ending, or a dtype that the format does not have.
        OSError: it cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != '.safetensors':
        raise ValueError(f'{path}: weights are written as .safetensors; change the name')
    specs = getattr(state_dict, 'specs', state_dict)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    # Wide numbers first, so that all are aligned.
    for name in sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name)):
        dtype = np.dtype(specs[name].dtype)
        if dtype not in _NAMES:
            raise ValueError(f'{path}: {name} is {dtype}, which safetensors do not hold')
        begin, end = end, end + math.prod(specs[name].shape) * dtype.itemsize
        header[name] = {'dtype': _NAMES[dtype], 'shape': list(specs[name].shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.partial')
    with open(partial, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name in list(header)[1:]:
            file.write(np.ascontiguousarray(state_dict[name]).reshape(-1).view(np.uint8).data)
    partial.replace(path)


def save(folder: str | pathlib.Path, state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any], *,
         name: str = 'model', shard_bytes: int = _SHARD) -> None:
    """Writes weights and `config.json`, which `transformers` (`diffusers`) loads, into `folder`: one file
    `name`.safetensors, or shards of at most `shard_bytes` and their index; the config last.

    Raises:
        ValueError, OSError: as `save_state_dict`.
    """
    folder = pathlib.Path(folder)
    specs = getattr(state_dict, 'specs', state_dict)
    shards: list[list[str]] = [[]]
    total = size = 0
    for tensor, spec in specs.items():
        count = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        total, size = total + count, size + count
    if len(shards) == 1:
        save_state_dict(folder / f'{name}.safetensors', state_dict)
    else:
        files = [f'{name}-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
        for file, part in zip(files, shards):
            save_state_dict(folder / file, _Part(state_dict, {tensor: specs[tensor] for tensor in part}))
        index = {'metadata': {'total_size': total},
                 'weight_map': {tensor: file for file, part in zip(files, shards) for tensor in part}}
        (folder / f'{name}.safetensors{_INDEX_SUFFIX}').write_text(json.dumps(index, indent=2) + '\n')
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


class _Part(Mapping):
    """Some tensors of a state dict."""

    def __init__(self, state_dict: Mapping[str, np.ndarray], specs: Mapping[str, Any]):
        self._state_dict, self.specs = state_dict, specs

    def __getitem__(self, name: str) -> np.ndarray:
        return self._state_dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

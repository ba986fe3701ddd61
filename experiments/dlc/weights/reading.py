"""Released PyTorch weights, and work directories, as the models that the commands use.

A folder of released weights holds tensors (and perhaps a config.json of its makers); a work directory holds our
config.json, which names an experiment, and checkpoints. `load` takes either.
"""
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections
import numpy as np

from dlc_jax import convert
from dlc_jax.models import dit
from experiments.dlc.weights import llada
from experiments.dlc.weights.kinds import KINDS, NOISE, published_config
from experiments.runtime import config_files, folders, storage
from rlhf_jax.weights.files import load_state_dict

T = TypeVar('T')

_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.pkl', '.index.json')
# Fields of a module that say how it is trained or run, not what it is: those of the config stay.
_NOT_OF_THE_WEIGHTS = ('parent', 'name', 'dtype', 'param_dtype', 'remat', 'unroll', 'attention_impl', 'drop_path',
                       'drop_path_groups', 'init_std', 'pos_init_std', 'time_init_std', 'code_init_std', 'cond_dropout',
                       'dropout')


def is_released(path: str | os.PathLike) -> bool:
    """Whether `path` is a file, or a folder of weights that is no work directory."""
    path = storage.resolve(path)
    if not path.is_dir():
        return path.exists()
    if _is_run(path):
        return False
    return any(file.name.endswith(_SUFFIXES) for file in path.iterdir())


def _is_run(folder: Any) -> bool:
    """Whether `folder` is a work directory; a damaged config.json, which `load` reports, is not one."""
    try:
        return folders.names_experiment(_settings_beside(folder))
    except ValueError:
        return False


def _settings_beside(folder: Any) -> Mapping[str, Any]:
    """The config.json in `folder`, {} where there is none."""
    file = folder / 'config.json'
    return folders.read_json(file) if file.exists() else {}


def load(cls: type[T], path: str | os.PathLike, *, step: int | None = None, **settings: Any) -> T:
    """`Encoder`, `Generator`, `CodeModel` or `TextToCode` of a work directory, or of released weights with the
    published settings.

    Args:
        step: which checkpoint of a work directory; None: the newest.
        settings: what the weights of a `TextToCode` do not say, see `llada.load`.

    Raises:
        ValueError, OSError: nothing of the kind there, or not that step.
    """
    if not is_released(path):
        return cls.load(path) if step is None else cls.load(path, step=step)
    if cls.__name__ == 'TextToCode':
        return llada.load(cls, path, **settings)
    kind = next(name for name, kind in KINDS.items() if kind.loader == cls.__name__)
    config = config_files.load(published_config(kind), noted_settings(kind, path))
    return cls(*as_run(kind, *read(kind, path, **fields_of(kind, config)), config))


def noted_settings(kind: str, path: str | os.PathLike) -> list[str]:
    """Overrides of a config from the config.json beside released weights: process and noise of a sedd."""
    if kind != 'sedd':
        return []
    folder = storage.resolve(path) if storage.resolve(path).is_dir() else storage.resolve(path).parent
    noted = _settings_beside(folder)
    graph, noise = _table(noted, 'graph').get('type'), _table(noted, 'noise')
    return [f'--config.diffusion.{name}={value}' for name, value in
            (('process', {'absorb': 'absorbing'}.get(graph, graph)), ('noise', noise.get('type')),
             *((name, noise.get(name)) for name in NOISE)) if value is not None]


def kind_of(path: str | os.PathLike) -> str:
    """Which of `KINDS` the released weights at `path` are.

    Raises:
        ValueError, OSError: none of them, or damaged.
    """
    tensors = load_state_dict(storage.local_copy(path))
    kinds = [name for name, kind in KINDS.items() if any(tensor.endswith(kind.sign) for tensor in tensors)]
    if not kinds:
        raise ValueError(f'{path}: these are the weights of no known kind ({", ".join(KINDS)})')
    return kinds[0]


def fields_of(kind: str, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `read` has to know of `config`."""
    return {'process': config.diffusion.process} if kind == 'sedd' else {}


def read(kind: str, path: str | os.PathLike, *, key: str | None = None, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """Module and parameters of released weights.

    What the tensors do not tell comes from `fields`, where not None; else from a config.json beside the tensors; else
    it is as published: 512 codes, heads as in the size of that width.

    Args:
        kind: one of `KINDS`.
        path: file or folder, as `load_state_dict` takes.
        key: entry of a file that holds several state dicts.

    Raises:
        ValueError, OSError: of one line, with the file and the tensor that does not fit.
    """
    local = storage.local_copy(path)
    tensors = load_state_dict(local, key=key)
    kinds = [name for name, k in KINDS.items() if any(tensor.endswith(k.sign) for tensor in tensors)]
    if kinds and kinds[0] != kind:
        raise ValueError(f'{path}: these are the weights of kind {kinds[0]} (they have {KINDS[kinds[0]].sign}), not of '
                         f'{kind}')
    given = {name: x for name, x in fields.items() if x is not None}
    noted = _settings_beside(local if local.is_dir() else local.parent)
    if kind in ('sem', 'dit', 'sedd', 'dinov2') and 'num_heads' not in given:
        heads = noted.get('num_heads', _table(noted, 'model').get('n_heads'))
        if heads is None and kind == 'dit':
            width = next((x.shape[0] for name, x in tensors.specs.items() if name.endswith(KINDS['dit'].sign)), 0)
            heads = {size['width']: size['num_heads'] for size in dit.SIZES.values()}.get(width)
            if kinds and heads is None:
                raise ValueError(f'{path}: no DiT of width {width} was published; give its --num_heads')
        if heads is not None or kind == 'dit':
            given['num_heads'] = heads or 1  # without the sign, from_torch names what is missing
    if kind == 'sem':
        if not {'num_codes', 'vocab_size'} & given.keys():
            given['num_codes'] = noted.get('L', 512)
        given.setdefault('temperature', float(noted.get('temp', 1.0)))
    try:
        return convert.from_torch(kind, tensors, **given)
    except ValueError as error:
        message = str(error).removeprefix('convert: ').removeprefix('sem: ')
        raise ValueError(f'{os.fspath(path)}: {message}') from None


def as_run(kind: str, module: Any, params: Mapping[str, Any],
           config: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, Mapping[str, Any]]:
    """Config of a run whose model is `module`, from the `config` of another size; and its parameters."""
    config = config.copy_and_resolve_references()
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in _NOT_OF_THE_WEIGHTS}
    with config.unlocked():
        if kind == 'sedd':
            fields['num_codes'] = fields.pop('length')
            config.diffusion.process = fields.pop('process')
        for name, value in fields.items():
            config.model[name] = value
        if kind == 'sem':
            config.data.channels = params['patch_embed']['kernel'].shape[0] // module.patch_size ** 2
            for name in ('mean', 'std'):  # of one channel: those of grey
                if len(config.data[name]) != config.data.channels:
                    config.data[name] = (float(np.mean(config.data[name])),) * config.data.channels
    return config, params


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return values[name] if isinstance(values.get(name), Mapping) else {}

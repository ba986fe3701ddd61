"""Weights of language models: from a work directory, or from a Hugging Face folder."""
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.rlhf.models import adapters, architecture
from experiments.runtime import folders, launch, modules, placement, runs, storage
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.models import heads
from rlhf_jax.weights import files
from rlhf_jax.weights.json_file import read_json

Params = dict[str, Any]
Config = ml_collections.ConfigDict

POLICIES = ('sft', 'dpo', 'policy')  # experiments whose runs hold a language model


def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is a work directory rather than a Hugging Face folder.

    Raises:
        FileNotFoundError: it is neither.
    """
    return folders.names_experiment(folders.read_settings(path))


def load_decoder(path: str | os.PathLike, config: Config, shardings: Any = None) -> Params:
    """Parameters of `architecture.decoder(config.model)`, float32, from a Hugging Face folder or a work directory of
    sft, dpo or policy; its adapter and `config.adapter`, one of PEFT, are merged.

    Args:
        shardings: a tree of them; None: on the host.

    Raises:
        FileNotFoundError, ValueError: nothing there, or weights of another model, with the field that differs.
    """
    module = architecture.decoder(config.model)
    params = _load(path, config, module, POLICIES, shardings)
    if not config.get('adapter'):
        return params
    params = with_peft(config.adapter, config.model.kind, module, params)
    return params if shardings is None else placement.place_tree(params, shardings)


def with_peft(path: str | os.PathLike, kind: str, module: Any, params: Params) -> Params:
    """`params` of `module`, with the adapter of PEFT in the folder `path` merged into them.

    Raises:
        FileNotFoundError, ValueError: no adapter there, a kind of it that is not supported, or one of another model.
    """
    folder = pathlib.Path(storage.local_copy(path))
    if not (folder / 'adapter_config.json').exists():
        raise FileNotFoundError(f'adapter={path}: no adapter_config.json there; give the folder of a PEFT adapter')
    settings = read_json(folder / 'adapter_config.json')
    file = next((folder / name for name in ('adapter_model.safetensors', 'adapter_model.bin')
                 if (folder / name).exists()), folder / 'adapter_model.safetensors')
    try:
        adapted = peft.from_torch(kind, files.load_state_dict(file), module, params, config=settings)
    except ValueError as error:
        raise ValueError(f'adapter={path}: {str(error).removeprefix("convert: ")}') from None
    return adapters.merged(adapted)


def complete(config: Config) -> None:
    """Where `config.model.size` is 'weights', sets the fields of `config.model` that are open to those of the model in
    `config.weights`, from its config.json alone.

    Raises:
        FileNotFoundError, ValueError: no model there, or one of another kind.
    """
    if config.model.size != architecture.FROM_WEIGHTS or not config.weights:
        return
    settings = folders.read_settings(config.weights, field='weights=')
    if folders.names_experiment(settings):
        trained = launch.read_config(config.weights)
        kind, module = trained.model.kind, architecture.decoder(trained.model)
    else:
        kind, module = settings.get('model_type'), _module_of(storage.resolve(config.weights), settings)
    if kind != config.model.kind:
        raise ValueError(f'model.kind={config.model.kind!r}, but weights={config.weights} are of a {kind!r}')
    architecture.fill(config.model, module)


def load_trained(path: str | os.PathLike, kinds: tuple[str, ...] = (*POLICIES, 'reward_model'),
                 dtype: str = '', step: int | None = None) -> tuple[Any, Params, Config]:
    """Module, float32 parameters on the host with their adapter, and config of the run in a work directory, as its
    newest checkpoint has them, or that of `step`.

    Raises:
        ValueError: no run there, or one of another of `kinds`.
    """
    config = runs.read_config(path, *kinds)
    if dtype:
        config.model.dtype = dtype
    make = architecture.reward_model if config.experiment == 'reward_model' else architecture.decoder
    module = make(config.model)
    return module, _restore(path, config, module, step), config


def load_policy(path: str | os.PathLike, dtype: str = '', adapter: str = '',
                step: int | None = None) -> tuple[Any, Params, Config | None]:
    """Module, float32 parameters on the host, adapters merged, and config of the policy in `path`: a work directory of
    sft, dpo or policy; or a Hugging Face folder, which has no config.

    Args:
        dtype: to compute in; '': as the run's config says, float32 for a folder.
        adapter: folder of a PEFT adapter to merge as well.
        step: which checkpoint of a work directory; None: the newest.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no language model.
    """
    if is_run(path):
        module, params, trained = load_trained(path, POLICIES, dtype, step)
        params = adapters.merged(params)
        params = with_peft(adapter, trained.model.kind, module, params) if adapter else params
        return module, params, trained
    if step is not None:
        raise ValueError(f'--step={step}: {path} is no work directory and has no checkpoints; leave the flag out')
    folder = storage.resolve(path)
    saved = files.read_config(folder)
    fields = {'dtype': modules.dtype(dict(dtype=dtype or 'float32'))}
    module, params = _open_folder(folder, saved, **fields)
    if isinstance(module, heads.RewardModel):
        raise ValueError(f'{path}: holds a reward model, not a policy')
    module, params = getattr(module, 'backbone', module), params.get('backbone', params)
    return module, with_peft(adapter, saved['model_type'], module, params) if adapter else params, None


def load_reward_model(path: str | os.PathLike, model: Mapping[str, Any] | None = None,
                      step: int | None = None) -> tuple[Any, Params]:
    """Module and float32 parameters on the host of a reward model: a Hugging Face folder of a sequence classifier with
    one label, or a work directory of a reward_model run.

    Args:
        model: how it is to compute (`dtype`, ...); None: as the config of the run says, float32 for a folder.
        step: which checkpoint of a work directory; None: the newest.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no reward model.
    """
    folder, saved = storage.resolve(path), folders.read_settings(path)
    if folders.names_experiment(saved):
        trained = runs.read_config(path, 'reward_model')
        module = architecture.reward_model(trained.model)
        return module, adapters.merged(_restore(path, trained, module, step))
    if step is not None:
        raise ValueError(f'--step={step}: {path} is no work directory and has no checkpoints; leave the flag out')
    fields = {'dtype': modules.dtype(model)} if model else {}
    module, params = _open_folder(folder, saved, **fields)
    if not isinstance(module, heads.RewardModel):
        raise ValueError(f'{path}: holds a language model without a score head, not a reward model')
    return module, params


def reward_module(path: str | os.PathLike, model: Mapping[str, Any]) -> heads.RewardModel:
    """Module of the reward model that `load_reward_model` loads, without its tensors."""
    folder, saved = storage.resolve(path), folders.read_settings(path)
    if folders.names_experiment(saved):
        return architecture.reward_model(runs.read_config(path, 'reward_model').model)
    module = _module_of(folder, saved, dtype=modules.dtype(model))
    return module if isinstance(module, heads.RewardModel) else heads.RewardModel(module)


def filled(fresh: Mapping[str, Any], loaded: Mapping[str, Any]) -> Params:
    """`fresh`, with the leaves of `loaded` in place of those that both have; what is new in `loaded` is left out."""
    return {name: (filled(leaf, loaded[name]) if isinstance(leaf, Mapping) else loaded[name]) if name in loaded
            else leaf for name, leaf in fresh.items()}


def _module_of(folder: Any, saved: Mapping[str, Any], **fields: Any) -> Any:
    """The module of the config.json `saved` in `folder`, which an error names."""
    kind = saved.get('model_type')
    if kind not in convert.KINDS:
        raise ValueError(f'{folder}/config.json: model_type={kind!r:.60} is not one of {convert.KINDS}')
    try:
        return convert.module_of(kind, saved, **fields)
    except ValueError as error:
        raise ValueError(f'{folder}/config.json: {str(error).removeprefix("convert: ")}') from None


def _open_folder(folder: Any, saved: Mapping[str, Any], **fields: Any) -> tuple[Any, Params]:
    """Module and parameters of a Hugging Face folder, read tensor by tensor."""
    _module_of(folder, saved)
    return convert.from_torch(saved['model_type'], files.load_state_dict(folder), config=saved, **fields)


def check_decoder(path: str | os.PathLike, config: Config) -> None:
    """Raises what `load_decoder` would raise of the model that lies there, without reading its tensors."""
    _load(path, config, architecture.decoder(config.model), POLICIES, None, read=False)


def _load(path: str | os.PathLike, config: Config, module: Any, kinds: tuple[str, ...], shardings: Any,
          read: bool = True) -> Params | None:
    folder, saved = storage.resolve(path), folders.read_settings(path, field='weights=')
    if folders.names_experiment(saved):
        trained = runs.read_config(path, *kinds, field='weights=')
        theirs = architecture.decoder(trained.model)
        architecture.check_same(path, theirs, module)
        if not read:
            return None
        params = adapters.merged(_restore(path, trained, theirs))
        return params if shardings is None else placement.place_tree(params, shardings)
    kind = saved.get('model_type')
    if kind != config.model.kind:
        raise ValueError(f'model.kind={config.model.kind!r}, but weights={path} are of a {kind!r}')
    architecture.check_same(path, _module_of(folder, saved), module)
    if not read:
        return modules.check_released(lambda stop: _open_folder(folder, saved, shardings=stop))
    placed = None if shardings is None else lambda shapes: shardings
    opened, params = _open_folder(folder, saved, shardings=placed)
    return params['backbone'] if hasattr(opened, 'backbone') else params


def _restore(path: Any, config: Config, module: Any, step: int | None = None) -> Params:
    """The stage's parameters on the host, with its adapter; of a policy run, the policy's."""
    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        return architecture.with_adapter(config, params, key)
    part = 'params/policy' if config.experiment == 'policy' else 'params'
    return runs.restore_part(path, part, jax.eval_shape(init, jax.random.key(0)), step)

"""Weights of language models: from a work directory, or from a Hugging Face folder."""
import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.rlhf.models import adapters, architecture
from experiments.runtime import config_files, folders, modules, partition, placement, programs, runs, storage
from experiments.runtime import mesh as mesh_lib
from rlhf_jax import convert
from rlhf_jax.convert import peft
from rlhf_jax.models import decoder, heads
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


def load_decoder(path: str | os.PathLike, config: Config, mesh: Mesh | None = None) -> Params:
    """Parameters of `architecture.decoder(config.model)`, float32, from a Hugging Face folder or a work directory of
    sft, dpo or policy; its adapter and `config.adapter`, one of PEFT, are merged.

    Args:
        mesh: they are laid out over it (`layout`), and each of its processes reads its own parts; None: on the host.

    Raises:
        FileNotFoundError, ValueError: nothing there, or weights of another model, with the field that differs.
    """
    module = architecture.decoder(config.model)
    params = _load(path, config, module, POLICIES, mesh)
    if not config.get('adapter'):
        return params
    params = with_peft(config.adapter, config.model.kind, module, params)
    return params if mesh is None else placement.place_tree(params, layout(config.model.kind, mesh)(params))


def layout(kind: str, mesh: Mesh, prefix: str = '') -> Callable[[Any], Any]:
    """Arrays or shapes of a decoder's parameters -> shardings over `mesh`: by the rules of `kind`, or, where these
    cannot divide the parameters, whole on every device.

    Args:
        prefix: where the decoder's parameters sit, as of `architecture.rules`.
    """
    rules = architecture.rules(dict(kind=kind), prefix)

    def shardings(params: Any) -> Any:
        if modules.divisible(params, rules, mesh):
            return partition.param_shardings(params, rules, mesh)
        return jax.tree.map(lambda _: mesh_lib.replicated(mesh), params)
    return shardings


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
        trained = config_files.read(config.weights)
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


def load_reward_model(path: str | os.PathLike, model: Mapping[str, Any] | None = None, step: int | None = None, *,
                      mesh: Mesh | None = None, compact: bool = False) -> tuple[Any, Params]:
    """Module and float32 parameters of a reward model: a Hugging Face folder of a sequence classifier with one label,
    or a work directory of a reward_model run.

    Args:
        model: how it is to compute (`dtype`, ...); None: as the config of the run says, float32 for a folder.
        step: which checkpoint of a work directory; None: the newest.
        mesh: the parameters are laid out over it (`layout`), and each of its processes reads its own parts; None: on
            the host.
        compact: see `compacted`.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no reward model.
    """
    folder, saved = storage.resolve(path), folders.read_settings(path)
    if folders.names_experiment(saved):
        trained = _reward_config(path, model)
        module = architecture.reward_model(trained.model)
        # The devices of a reward model need not be those of the step that is being built meanwhile.
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            params = adapters.merged(_restore(path, trained, module, step, mesh))
            if not compact:
                return module, params
            return module, compacted(module, params) if mesh is None else jax.jit(
                functools.partial(compacted, module), donate_argnums=0,
                out_shardings=layout(trained.model.kind, mesh, 'backbone')(params))(params)
    if step is not None:
        raise ValueError(f'--step={step}: {path} is no work directory and has no checkpoints; leave the flag out')
    fields = {'dtype': modules.dtype(model)} if model else {}
    backbone = _module_of(folder, saved, **fields)

    def placed(shapes: Any) -> Any:
        if 'score_head' not in shapes:
            raise ValueError(f'{path}: holds a language model without a score head, not a reward model')
        if mesh is None:
            return None
        if compact:
            shapes = jax.eval_shape(functools.partial(compacted, heads.RewardModel(backbone)), shapes)
        return programs.placed(shapes, layout(saved['model_type'], mesh, 'backbone')(shapes))
    module, params = _open_folder(folder, saved, shardings=placed, **fields)
    return module, compacted(module, params) if compact and mesh is None else params


def _reward_config(path: str | os.PathLike, model: Mapping[str, Any] | None) -> Config:
    """The config of a reward_model run, which is to compute in the dtype of `model`, if given."""
    config = runs.read_config(path, 'reward_model')
    if model:
        config.model.dtype = model['dtype']
    return config


def compacted(module: heads.RewardModel, params: Params) -> Params:
    """A reward model's parameters with the backbone's matrices in the dtype that it computes in; scores do not
    change."""
    backbone = decoder.in_compute_dtype(params['backbone'], module.backbone.dtype)
    return dict(params) | {'backbone': backbone}


def reward_module(path: str | os.PathLike, model: Mapping[str, Any]) -> heads.RewardModel:
    """Module of the reward model that `load_reward_model` loads, without its tensors."""
    folder, saved = storage.resolve(path), folders.read_settings(path)
    if folders.names_experiment(saved):
        return architecture.reward_model(_reward_config(path, model).model)
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


def _load(path: str | os.PathLike, config: Config, module: Any, kinds: tuple[str, ...], mesh: Mesh | None,
          read: bool = True) -> Params | None:
    folder, saved = storage.resolve(path), folders.read_settings(path, field='weights=')
    if folders.names_experiment(saved):
        trained = runs.read_config(path, *kinds, field='weights=')
        theirs = architecture.decoder(trained.model)
        architecture.check_same(path, theirs, module)
        if not read:
            return None
        return adapters.merged(_restore(path, trained, theirs, mesh=mesh))
    kind = saved.get('model_type')
    if kind != config.model.kind:
        raise ValueError(f'model.kind={config.model.kind!r}, but weights={path} are of a {kind!r}')
    architecture.check_same(path, _module_of(folder, saved), module)
    if not read:
        return modules.check_released(lambda stop: _open_folder(folder, saved, shardings=stop))
    placed = None if mesh is None else lambda shapes: layout(kind, mesh, 'backbone' if 'backbone' in shapes else '')(
        shapes)
    opened, params = _open_folder(folder, saved, shardings=placed)
    return params['backbone'] if hasattr(opened, 'backbone') else params


def _restore(path: Any, config: Config, module: Any, step: int | None = None, mesh: Mesh | None = None) -> Params:
    """The stage's parameters with its adapter, on the host or laid out over `mesh`; of a policy run, the policy's."""
    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        return architecture.with_adapter(config, params, key)
    part = 'params/policy' if config.experiment == 'policy' else 'params'
    shapes = jax.eval_shape(init, jax.random.key(0))
    prefix = 'backbone' if isinstance(module, heads.RewardModel) else ''
    shardings = None if mesh is None else layout(config.model.kind, mesh, prefix)(shapes)
    return runs.restore_part(path, part, shapes, step, shardings)

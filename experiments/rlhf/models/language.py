"""Language models of the experiments: module, tokenizer and starting weights from a config."""
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.runtime import launch, modules, partition, storage
from experiments.runtime.checkpoint import Checkpointer
from rlhf_jax import convert, tokenizers
from rlhf_jax.weights import files
from rlhf_jax.models import gpt2, gpt_neox, heads, llama, lora

Params = dict[str, Any]
Config = ml_collections.ConfigDict

KINDS = {'gpt2': (gpt2, gpt2.GPT2), 'gpt_neox': (gpt_neox, gpt_neox.GPTNeoX), 'llama': (llama, llama.Llama)}
POLICIES = ('sft', 'dpo', 'policy')  # experiments whose runs hold a language model
# How a model computes, not what it computes: may differ from the weights' own config.
_MANNER = ('dtype', 'param_dtype', 'remat', 'unroll', 'attention_impl', 'stacked', 'init_std', 'parent', 'name')
# What 0 stands for in a field.
_IMPLIED = {'hidden': lambda m: 4 * m.width, 'num_kv_heads': lambda m: m.num_heads,
            'head_dim': lambda m: m.width // m.num_heads}


# ---- Modules ---------------------------------------------------------------------------------------------------------

def kind_of(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """(file, class) that `model.kind` names.

    Raises:
        ValueError: another kind.
    """
    launch.check_choice('model.kind', model['kind'], KINDS)
    return KINDS[model['kind']]


def kind_name(module: Any) -> str:
    """The `model.kind` of a decoder."""
    return next(kind for kind, (_, cls) in KINDS.items() if isinstance(module, cls))


def decoder(model: Mapping[str, Any]) -> Any:
    """The decoder that a `model` config describes."""
    file, cls = kind_of(model)
    fields = {name: value for name, value in dict(model).items() if name != 'kind'}
    known = cls.__dataclass_fields__
    for name in ('num_kv_heads', 'hidden', 'max_length'):
        if name not in known and not fields.get(name):
            fields.pop(name, None)
    return modules.build(cls, file.SIZES, fields)


def reward_model(model: Mapping[str, Any]) -> heads.RewardModel:
    return heads.RewardModel(decoder(model))


def rules(model: Mapping[str, Any], prefix: str = '') -> partition.Rules:
    """Partition rules of the decoder, its adapter and scalar heads; `prefix`: where the decoder's parameters sit."""
    own = kind_of(model)[0].PARTITION_RULES
    own = partition.prefixed(prefix, own) if prefix else own
    return (*lora.PARTITION_RULES, (r'(.*/)?(score|value)_head/.*', jax.sharding.PartitionSpec()), *own)


def init_decoder(config: Config) -> Callable[[jax.Array], Params]:
    """key -> fresh parameters, with an adapter where `config.lora.rank` is set."""
    module = decoder(config.model)

    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        return with_adapter(config, params, jax.random.fold_in(key, 1))
    return init


def with_adapter(config: Config, params: Params, key: jax.Array) -> Params:
    if not config.lora.rank:
        return params
    targets = tuple(config.lora.targets) or kind_of(config.model)[0].LORA_TARGETS
    return lora.init(key, params, rank=config.lora.rank, alpha=config.lora.alpha, targets=targets)


def divide(params: Params, also: Sequence[str] = ()) -> tuple[Params, Params]:
    """(what stays frozen, what is trained) of parameters with an adapter: A and B, and paths that a regex of `also`
    matches. `lora.join` puts them together again."""
    def visit(tree, path):
        frozen, trained = {}, {}
        for name, leaf in tree.items():
            here = f'{path}{name}'
            if isinstance(leaf, Mapping):
                parts = visit(leaf, f'{here}/')
                for out, part in zip((frozen, trained), parts):
                    if part:
                        out[name] = part
            elif name in ('lora_a', 'lora_b') or any(re.fullmatch(pattern, here) for pattern in also):
                trained[name] = leaf
            else:
                frozen[name] = leaf
        return frozen, trained
    return visit(params, '')


# ---- Tokenizers ------------------------------------------------------------------------------------------------------

def open_tokenizer(name: str) -> Any:
    """'bytes', or a tokenizer.json or its folder.

    Raises:
        FileNotFoundError, ValueError: no such file, or no EOS.
    """
    found = tokenizers.ByteTokenizer() if name == 'bytes' else tokenizers.JsonTokenizer(name)
    if found.eos is None:
        raise ValueError(f'tokenizer={name}: it names no eos token, so that no response could end; add '
                         'eos_token to the tokenizer_config.json beside it')
    return found


def tokenizer(config: Config) -> Any:
    """The tokenizer that `config.tokenizer` names, checked against the model's vocabulary.

    Raises:
        FileNotFoundError, ValueError: no such file, no EOS, or ids that the model does not have.
    """
    found = open_tokenizer(config.tokenizer)
    size = decoder(config.model).vocab_size
    if found.vocab_size > size:
        raise ValueError(f'tokenizer={config.tokenizer} has {found.vocab_size} ids, the model model.vocab_size={size}; '
                         'they do not belong together')
    return found


# ---- Weights ---------------------------------------------------------------------------------------------------------

def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is a work directory rather than a Hugging Face folder.

    Raises:
        FileNotFoundError: it is neither.
    """
    file = storage.resolve(path) / 'config.json'
    if not file.exists():
        raise FileNotFoundError(f'{path}: no config.json there; give a Hugging Face folder or a work directory')
    return 'experiment' in json.loads(file.read_text())


def load_decoder(path: str | os.PathLike, config: Config, shardings: Any = None) -> Params:
    """Parameters of `decoder(config.model)`, float32, from a Hugging Face folder or a work directory of sft, dpo or
    policy; adapters are merged.

    Args:
        shardings: a tree of them; None: on the host.

    Raises:
        FileNotFoundError, ValueError: nothing there, or weights of another model, with the field that differs.
    """
    return _load(path, config, decoder(config.model), POLICIES, shardings)


def load_trained(path: str | os.PathLike, kinds: tuple[str, ...] = (*POLICIES, 'reward_model'),
                 dtype: str = '') -> tuple[Any, Params, Config]:
    """Module, float32 parameters on the host with their adapter, and config of the run in a work directory.

    Raises:
        ValueError: no run there, or one of another of `kinds`.
    """
    own = launch.read_config(path)
    if own.get('experiment') not in kinds:
        raise ValueError(f'{path}: holds a run of experiment={own.get("experiment")!r}; expected one of {kinds}')
    if dtype:
        own.model.dtype = dtype
    module = reward_model(own.model) if own.experiment == 'reward_model' else decoder(own.model)
    return module, _restore(path, own, module, 'policy' if own.experiment == 'policy' else None), own


def load_policy(path: str | os.PathLike, dtype: str = '') -> tuple[Any, Params, Config | None]:
    """Module, float32 parameters on the host, adapters merged, and config of a policy as it lies there: a work
    directory of sft, dpo or policy; or a Hugging Face folder, which has no config.

    Args:
        dtype: to compute in; '': as the run's config says, float32 for a folder.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no language model.
    """
    if is_run(path):
        module, params, own = load_trained(path, POLICIES, dtype)
        return module, merged(params), own
    folder = storage.resolve(path)
    saved = files.read_config(folder)
    fields = {'dtype': modules.dtype(dict(dtype=dtype or 'float32'))}
    module, params = _open_folder(folder, saved, **fields)
    if isinstance(module, heads.RewardModel):
        raise ValueError(f'{path}: holds a reward model, not a policy')
    return getattr(module, 'backbone', module), params.get('backbone', params), None


def load_reward_model(path: str | os.PathLike, model: Mapping[str, Any] | None = None) -> tuple[Any, Params]:
    """Module and float32 parameters on the host of a reward model: a Hugging Face folder of a sequence classifier with
    one label, or a work directory of a reward_model run.

    Args:
        model: how it is to compute (`dtype`, ...); None: as its own config says, float32 for a folder.

    Raises:
        FileNotFoundError, ValueError: nothing there, or no reward model.
    """
    folder = storage.resolve(path)
    if not (folder / 'config.json').exists():
        raise FileNotFoundError(f'{path}: no config.json there; give a Hugging Face folder or a work directory')
    saved = json.loads((folder / 'config.json').read_text())
    if 'experiment' in saved:
        own = launch.read_config(path)
        if own.experiment != 'reward_model':
            raise ValueError(f'{path}: holds a run of experiment={own.experiment!r}, not of a reward_model')
        return reward_model(own.model), merged(_restore(path, own, reward_model(own.model), None))
    fields = {'dtype': modules.dtype(model)} if model else {}
    module, params = _open_folder(folder, saved, **fields)
    if not isinstance(module, heads.RewardModel):
        raise ValueError(f'{path}: holds a language model without a score head, not a reward model')
    return module, params


def _module_of(folder: Any, saved: Mapping[str, Any], **fields: Any) -> Any:
    """The module of the config.json `saved` in `folder`, which an error names."""
    try:
        return convert.module_of(saved.get('model_type'), saved, **fields)
    except ValueError as error:
        raise ValueError(f'{folder}/config.json: {str(error).removeprefix("convert: ")}') from None


def _open_folder(folder: Any, saved: Mapping[str, Any], **fields: Any) -> tuple[Any, Params]:
    """Module and parameters of a Hugging Face folder, read tensor by tensor."""
    _module_of(folder, saved)
    return convert.from_torch(saved['model_type'], files.load_state_dict(folder), config=saved, **fields)


def _load(path: str | os.PathLike, config: Config, module: Any, kinds: tuple[str, ...], shardings: Any) -> Params:
    folder = storage.resolve(path)
    if not (folder / 'config.json').exists():
        raise FileNotFoundError(f'weights={path}: no config.json there; give a Hugging Face folder or a work directory')
    saved = json.loads((folder / 'config.json').read_text())
    if 'experiment' in saved:
        own = launch.read_config(path)
        if own.experiment not in kinds:
            raise ValueError(f'weights={path}: holds a run of experiment={own.experiment!r}; expected one of {kinds}')
        check_same(path, decoder(own.model), module)
        params = merged(_restore(path, own, decoder(own.model), 'policy' if own.experiment == 'policy' else None))
        return params if shardings is None else jax.device_put(params, shardings)
    kind = saved.get('model_type')
    if kind != config.model.kind:
        raise ValueError(f'model.kind={config.model.kind!r}, but weights={path} are of a {kind!r}')
    check_same(path, _module_of(folder, saved), module)
    placed = None if shardings is None else lambda shapes: shardings
    found, params = _open_folder(folder, saved, shardings=placed)
    return params['backbone'] if hasattr(found, 'backbone') else params


def _meant(module: Any, name: str) -> Any:
    value = getattr(module, name, None)
    return _IMPLIED[name](module) if name in _IMPLIED and not value else value


def check_same(path: Any, theirs: Any, ours: Any, field: str = 'weights') -> None:
    """Raises a ValueError unless both decoders are the same but for how they compute; `field`: which names `path`."""
    for name in type(ours).__dataclass_fields__:
        if name in _MANNER:
            continue
        a, b = (_meant(module, name) for module in (ours, theirs))
        if a != b and not (isinstance(a, float) and isinstance(b, (int, float)) and np.isclose(a, b, rtol=1e-6)):
            raise ValueError(f'model.{name}={a!r}, but {field}={path} have {b!r}')


def _restore(path: Any, own: Config, module: Any, part: str | None) -> Params:
    """The stage's parameters on the host, with its adapter."""
    def init(key):
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))['params']
        return with_adapter(own, params, key)
    like = jax.eval_shape(init, jax.random.key(0))
    checkpointer = Checkpointer(storage.resolve(path) / 'checkpoints', read_only=True)
    host = jax.sharding.SingleDeviceSharding(modules.host())
    name = f'params/{part}' if part else 'params'
    params = checkpointer.restore_part(name, like, jax.tree.map(lambda _: host, like))
    checkpointer.close()
    if params is None:
        raise ValueError(f'{path}: no checkpoint there yet; let experiments.train reach its first one')
    return jax.device_get(params)  # tied to no device, so that a program over any mesh takes them


@jax.jit
def _merge(params: Params) -> Params:
    return lora.merge(params)


def merged(params: Params) -> Params:
    """Without adapters, which become part of the weights."""
    has = any(name.endswith('/lora_a') for name in partition.flatten(params))
    return _merge(params) if has else params

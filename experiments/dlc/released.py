"""Released PyTorch weights as the models that the commands use, as work directories, and back.

A folder of released weights holds tensors (and perhaps a config.json of its makers); a work directory holds our
config.json, which names an experiment, and checkpoints. `load` takes either.
"""
import importlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import ml_collections
import numpy as np

from dlc_jax import convert
from rlhf_jax.weights.files import load_state_dict, save_state_dict
from dlc_jax.models import dit, vit
from dlc_jax.models.vae import SCALING_FACTOR
from experiments.runtime import launch, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.checkpoint import Checkpointer
from rlhf_jax.weights import files as language_files
from rlhf_jax.tokenizers import JsonTokenizer

T = TypeVar('T')


class Kind(NamedTuple):
    """
    Attributes:
        experiment: whose work directory these weights make; '' for networks that are used as they were released.
        file: what the originals call the file.
        sign: the end of a tensor's name that only this kind has.
    """
    experiment: str
    file: str
    sign: str


KINDS = {  # the first whose sign is there is what a file holds
    'sem': Kind('encoder', 'model.safetensors', 'sem_embed.weight'),
    'dit': Kind('generator', 'model.safetensors', 'x_embedder.proj.weight'),
    'sedd': Kind('code_model', 'model.safetensors', 'vocab_embed.embedding'),
    'sd_vae': Kind('', 'diffusion_pytorch_model.safetensors', 'post_quant_conv.weight'),
    'inception': Kind('', 'model.safetensors', 'Mixed_7c.branch_pool.conv.weight'),
    'dinov2': Kind('', 'model.safetensors', 'cls_token'),
}
CONFIGURED = tuple(name for name, kind in KINDS.items() if kind.experiment)  # those that make work directories
_SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.pkl', '.index.json')
# Fields of a module that say how it is trained or run, not what it is: those of the config stay.
_NOT_OF_THE_WEIGHTS = ('parent', 'name', 'dtype', 'param_dtype', 'remat', 'unroll', 'attention_impl', 'drop_path',
                       'drop_path_groups', 'init_std', 'pos_init_std', 'time_init_std', 'code_init_std', 'cond_dropout',
                       'dropout')


def published_config(kind: str) -> str:
    """`--config` of the published settings of `kind`."""
    return f'{pathlib.Path(__file__).resolve().parents[2] / "configs" / "dlc" / "released.py"}:{kind}'


def is_released(path: str | os.PathLike) -> bool:
    """Whether `path` is a file, or a folder of weights that is no work directory."""
    path = storage.resolve(path)
    if not path.is_dir():
        return path.exists()
    if 'experiment' in _read_json(path / 'config.json', damaged={}):
        return False
    return any(file.name.endswith(_SUFFIXES) for file in path.iterdir())


def load(cls: type[T], path: str | os.PathLike, **told: Any) -> T:
    """`Encoder`, `Generator`, `CodeModel` or `TextToCode` of a work directory, or of released weights with the
    published settings. `told`: what weights of a `TextToCode` do not tell, see `load_llada`."""
    if not is_released(path):
        return cls.load(path)
    if cls.__name__ == 'TextToCode':
        return load_llada(cls, path, **told)
    kind = {'Encoder': 'sem', 'Generator': 'dit', 'CodeModel': 'sedd'}[cls.__name__]
    config = launch.load_config(published_config(kind), noted_settings(kind, path))
    return cls(*as_run(kind, *read(kind, path, **fields_of(kind, config)), config))


def load_llada(cls: type[T], path: str | os.PathLike, *, num_codes: int) -> T:
    """The `TextToCode` of a folder with config.json, weights and tokenizer.json, in bfloat16 as it was released.

    Args:
        num_codes: L, which neither the weights nor the tokenizer say: all positions share the V code tokens.

    Raises:
        FileNotFoundError, ValueError: an incomplete folder, a tokenizer without code tokens (a LLaDA that was never
            trained to write codes), or one that does not fit the weights.
    """
    folder = storage.local_copy(path)
    for name in ('config.json', 'tokenizer.json'):
        if not (folder / name).exists():
            raise FileNotFoundError(f'{path}: no {name} there; give a whole folder of LLaDA, with its tokenizer')
    tokenizer, saved = JsonTokenizer(folder), language_files.read_config(folder)
    start, config = tokenizer.id_of('<|start_sem|>'), launch.load_config(published_config('llada'))
    if start is None:
        raise ValueError(f'{path}: its tokenizer has no <|start_sem|>, so that it writes no codes yet; train it with '
                         f'--config=configs/dlc/text_to_code_llada.py --config.pretrained={path}')
    count = 0
    while tokenizer.id_of(f'<|sem_vocab_{count}|>') == start + 1 + count:
        count += 1
    tensors = language_files.load_state_dict(folder)
    try:
        module, params = convert.from_torch('llada', tensors, config=saved, param_dtype=jax.numpy.bfloat16)
    except ValueError as error:
        raise ValueError(f'{path}: {str(error).removeprefix("convert: ")}') from None
    if count < 1 or module.vocab_size < start + 1 + count:
        raise ValueError(f'{path}: {count} code tokens after <|start_sem|> = {start}, and {module.vocab_size} rows of '
                         'words; tokenizer and weights do not belong together')
    with config.unlocked():
        config.model.update(dict(
            num_codes=num_codes, vocab_size=count, text_vocab_size=module.vocab_size, width=module.width,
            depth=module.depth, num_heads=module.num_heads, num_kv_heads=module.num_kv_heads, hidden=module.hidden,
            max_length=module.max_length))
        for name in ('rope_base', 'eps', 'tied'):
            config.model[name] = getattr(module, name)
        config.words.update(dict(separator=start, mask_token=saved.get('mask_token_id') or config.words.mask_token))
        config.words.pad_token = config.words.pad_token if tokenizer.pad is None else tokenizer.pad
        config.tokenizer = os.fspath(path)
    return cls(config, params, tokenizer)


def noted_settings(kind: str, path: str | os.PathLike) -> list[str]:
    """Overrides of a config from the config.json beside released weights: the process of a sedd."""
    if kind != 'sedd':
        return []
    folder = storage.resolve(path) if storage.resolve(path).is_dir() else storage.resolve(path).parent
    noted = _read_json(folder / 'config.json')
    graph, noise = _table(noted, 'graph').get('type'), _table(noted, 'noise').get('type')
    return [f'--config.diffusion.{name}={value}' for name, value in
            (('process', {'absorb': 'absorbing'}.get(graph, graph)), ('noise', noise)) if value]


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
    found = [name for name, k in KINDS.items() if any(tensor.endswith(k.sign) for tensor in tensors)]
    if found and found[0] != kind:
        raise ValueError(f'{path}: these are the weights of kind {found[0]} (they have {KINDS[found[0]].sign}), not of '
                         f'{kind}')
    given = {name: x for name, x in fields.items() if x is not None}
    noted = _read_json((local if local.is_dir() else local.parent) / 'config.json')
    if kind in ('sem', 'dit', 'sedd', 'dinov2') and 'num_heads' not in given:
        heads = noted.get('num_heads', _table(noted, 'model').get('n_heads'))
        if heads is None and kind == 'dit':
            width = next((x.shape[0] for name, x in tensors.items() if name.endswith(KINDS['dit'].sign)), 0)
            heads = {size['width']: size['num_heads'] for size in dit.SIZES.values()}.get(width)
            if found and heads is None:
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


def write_run(kind: str, config: ml_collections.ConfigDict, params: Mapping[str, Any],
              workdir: str | os.PathLike) -> None:
    """A work directory from which sampling, encoding and evaluation load `params`; config.json last.

    Raises:
        ValueError: the config does not fit the weights.
    """
    experiment = _experiment(kind).build(_on_one_device(config), mesh_lib.make_mesh({}, jax.devices()[:1]))
    wanted = jax.eval_shape(experiment.init, jax.random.key(0)).ema
    if kind == 'sem':
        wanted, params = wanted['encoder'], {'encoder': params}
    if jax.tree.map(np.shape, wanted) != jax.tree.map(np.shape, params['encoder'] if kind == 'sem' else params):
        raise ValueError(f'--config: not the model that these weights of a {kind} are of; leave config.model out')
    checkpointer = Checkpointer(storage.resolve(workdir) / 'checkpoints')
    checkpointer.save(0, {'ema': params})
    checkpointer.wait()
    checkpointer.close()
    launch.save_config(config, workdir)


def read_run(kind: str, workdir: str | os.PathLike) -> tuple[Any, Mapping[str, Any], ml_collections.ConfigDict]:
    """Module, averaged weights (the teacher's, of an encoder) and config of the run in `workdir`. Kind
    dinov2 is the backbone of an encoder.

    Raises:
        ValueError: no run there, or one of another kind.
    """
    if kind not in ('sem', 'dinov2', 'dit', 'sedd'):
        raise ValueError(f'{workdir}: no {kind} is trained here; give a folder of released weights')
    experiment = _experiment('sem' if kind == 'dinov2' else kind)
    cls = {'sem': 'Encoder', 'dinov2': 'Encoder', 'dit': 'Generator', 'sedd': 'CodeModel'}[kind]
    run = getattr(experiment, cls).load(workdir)
    module, params = experiment.make_model(run.config), run.params
    if kind == 'dinov2':
        names = set(vit.VisionTransformer.__dataclass_fields__) - {'parent', 'name'}
        module = vit.VisionTransformer(**{name: getattr(module, name) for name in names})
        params = {name: x for name, x in params.items() if not name.startswith('sem_')}
    return module, jax.tree.map(np.asarray, params), run.config


def write_released(kind: str, module: Any, params: Mapping[str, Any], folder: str | os.PathLike, *,
                   noise: str = 'loglinear') -> None:
    """`folder` with the tensors under their released names, and a config.json of what they do not tell.

    Args:
        noise: of a sedd.
    """
    config = _released_config(kind, module, noise)
    with storage.local_folder(folder, last='config.json') as local:
        save_state_dict(local / KINDS[kind].file, convert.tensors(kind, module, params))
        with storage.write_whole(local / 'config.json') as file:
            file.write((json.dumps(config, indent=1) + '\n').encode())


def _released_config(kind: str, m: Any, noise: str) -> dict[str, Any]:
    """The fields of the originals' config.json, as far as it says what the tensors are."""
    if kind == 'sedd':
        graph = 'absorb' if m.process == 'absorbing' else m.process
        return dict(tokens=m.vocab_size, graph=dict(type=graph), noise=dict(type=noise), model=dict(
            hidden_size=m.width, cond_dim=m.cond_dim, length=m.length, n_blocks=m.depth, n_heads=m.num_heads,
            scale_by_sigma=m.scale_by_sigma, dropout=m.dropout))
    if kind == 'sd_vae':
        levels = len(m.widths)
        return dict(_class_name='AutoencoderKL', act_fn='silu', block_out_channels=list(m.widths),
                    down_block_types=['DownEncoderBlock2D'] * levels, up_block_types=['UpDecoderBlock2D'] * levels,
                    in_channels=m.image_channels, out_channels=m.image_channels, latent_channels=m.latent_channels,
                    layers_per_block=m.depth, norm_num_groups=m.num_groups, scaling_factor=SCALING_FACTOR)
    if kind == 'inception':
        return dict(num_classes=m.num_classes)
    common = dict(num_heads=m.num_heads, hidden_size=m.width, depth=m.depth, patch_size=m.patch_size)
    if kind == 'dit':
        codes = dict(L=m.num_codes, V=m.vocab_size) if m.condition == 'code' else {}
        return common | dict(input_size=m.input_size, in_channels=m.channels) | codes
    common['num_register_tokens'] = m.num_registers
    return common | (dict(L=m.num_codes, V=m.vocab_size, temp=m.temperature) if kind == 'sem' else {})


def _experiment(kind: str) -> Any:
    return importlib.import_module(f'experiments.dlc.{KINDS[kind].experiment}')


def _on_one_device(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.accumulate = 1
    return config


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return values[name] if isinstance(values.get(name), Mapping) else {}


def _read_json(path: Any, damaged: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The mapping in a JSON file, {} where there is none; `damaged`, if given, in place of an error."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        if damaged is not None:
            return damaged
        raise ValueError(f'{path}: damaged ({error}); mend it or take it away') from None
    return values if isinstance(values, Mapping) else {}

"""Weights of text-to-image: LLaDA, and the text-to-code model made of it, in the form they were released and back.

A released folder (GSAI-ML/LLaDA-8B-Base, lavoies/DLC_LLADA_L512) holds config.json, tensors in shards and tokenizer
files. Everything goes tensor by tensor: of 16 GB in bfloat16 no second copy is made.
"""
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import convert
from dlc_jax.convert import llada
from experiments.dlc import text_to_code
from experiments.dlc.weights.kinds import published_config
from experiments.runtime import config_files, folders, modules, runs, storage
from rlhf_jax.models.llama import SIZES, Llama
from rlhf_jax.tokenizers import JsonTokenizer
from rlhf_jax.weights import files

SEPARATOR, CODE_TOKEN = '<|start_sem|>', '<|sem_vocab_{}|>'  # names in the released tokenizer
T = TypeVar('T')


def read_released(path: str | os.PathLike, *, key: str | None = None,
                  **fields: Any) -> tuple[Llama, dict[str, Any], dict[str, Any]]:
    """Module, parameters and config.json of a released folder.

    Args:
        key: entry of a torch.save file that holds several state dicts.
        **fields: of the module. `param_dtype` is by default that of the tensors.

    Raises:
        FileNotFoundError, OSError, ValueError: of one line, with the file, and the tensor or setting that does not fit.
    """
    config = dict(folders.read_settings(path, wanted='the folder as it was released'))
    tensors = files.load_state_dict(storage.local_copy(path), key=key)
    try:
        llada.fields_of(config)
    except ValueError as error:
        raise ValueError(f'{path}/config.json: {str(error).removeprefix("convert: ")}') from None
    stored = next((spec.dtype for spec in tensors.specs.values() if spec.dtype in (jnp.bfloat16, np.float16)),
                  np.dtype(np.float32))
    try:
        module, params = convert.from_torch('llada', tensors, config=config, **{'param_dtype': stored} | fields)
    except ValueError as error:
        raise ValueError(f'{path}: {str(error).removeprefix("convert: ")}') from None
    return module, params, config


def read_run(workdir: str | os.PathLike, step: int | None = None) -> tuple[Llama, Mapping[str, Any], Any]:
    """Module, parameters on the host and config of the run in `workdir`, whose words are as many as its checkpoint (the
    newest, or that of `step`) has.

    Raises:
        ValueError: no run of text_to_code or align there, or no checkpoint yet.
    """
    config = runs.read_config(workdir, *text_to_code.RUNS)
    if config.experiment == 'align':  # whose checkpoint has more in it, an adapter perhaps
        config, params = text_to_code.load_run(workdir, step=step)
        return text_to_code.make_model(config), params, config
    saved = runs.saved_shapes(workdir, step).get('params/embed')
    if saved is None:
        raise runs.no_checkpoint(workdir)
    known = {'size', *Llama.__dataclass_fields__}
    fields = {name: value for name, value in dict(config.model).items() if name in known}
    module = modules.build(Llama, SIZES, fields | {'vocab_size': saved[0][0], 'causal': False})
    return module, runs.restore_part(workdir, 'params', llada.shapes_of(module), step), config


def load(cls: type[T], path: str | os.PathLike, *, num_codes: int) -> T:
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
    tokenizer = JsonTokenizer(folder)
    separator = tokenizer.id_of(SEPARATOR)
    if separator is None:
        raise ValueError(f'{path}: its tokenizer has no {SEPARATOR}, so that it writes no codes yet; train it with '
                         f'--config=configs/dlc/text_to_code_llada.py --config.pretrained={path}')
    vocab_size = 0
    while tokenizer.id_of(CODE_TOKEN.format(vocab_size)) == separator + 1 + vocab_size:
        vocab_size += 1
    module, params, settings = read_released(path, param_dtype=jnp.bfloat16)
    if vocab_size < 1 or module.vocab_size < separator + 1 + vocab_size:
        raise ValueError(f'{path}: {vocab_size} code tokens after {SEPARATOR} = {separator}, and {module.vocab_size} '
                         'rows of words; tokenizer and weights do not belong together')
    config = config_files.load(published_config('llada'))
    with config.unlocked():
        config.model.update(dict(num_codes=num_codes, vocab_size=vocab_size, text_vocab_size=module.vocab_size))
        for name in ('width', 'depth', 'num_heads', 'num_kv_heads', 'hidden', 'max_length', 'rope_base', 'eps', 'tied'):
            config.model[name] = getattr(module, name)
        mask_token = settings.get('mask_token_id') or config.words.mask_token
        config.words.update(dict(separator=separator, mask_token=mask_token))
        config.words.pad_token = config.words.pad_token if tokenizer.pad is None else tokenizer.pad
        config.tokenizer = os.fspath(path)
    return cls(config, params, tokenizer)


def with_code_tokens(path: pathlib.Path, separator: int, num_codes: int) -> Any:
    """The tokenizer of the file `path` with the separator and code tokens under their released names, or as it is where
    it has them.

    Raises:
        ValueError: not a tokenizer, or the separator would not become token `separator`.
    """
    import tokenizers
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f'{path}: not a tokenizer.json ({error})') from None
    if tokenizer.token_to_id(SEPARATOR) is None:
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if size != separator:
            raise ValueError(f'{path}: {size} tokens, but the run was trained with its separator as token {separator}; '
                             'its tokenizer must be the one it was trained with')
        names = (SEPARATOR, *(CODE_TOKEN.format(i) for i in range(num_codes)))
        tokenizer.add_tokens([tokenizers.AddedToken(name, single_word=True, normalized=False) for name in names])
    return tokenizer


def write(src: str | os.PathLike, dst: str | os.PathLike, *, reverse: bool, dtype: str | None = None,
          key: str | None = None, step: int | None = None) -> str:
    """Writes the model in `src`, a released folder or (`reverse`) a work directory, to the folder `dst`: shards of
    safetensors under the released names, config.json, and what tokenizer files there are. Says in one line what it is.

    Args:
        dtype: of the tensors written; None: as they are in `src`.
        step: which checkpoint of a work directory; None: the newest.
    """
    words = None
    if reverse:
        module, params, run = read_run(src, step)
        config = {f'{name}_token_id': run.words[f'{name}_token'] for name in ('mask', 'pad')} if 'words' in run else {}
        tokenizer = run.get('tokenizer') or run.get('pretrained') or 'bytes'
        tokenizer = tokenizer if storage.resolve(tokenizer).exists() else 'bytes'
        if tokenizer != 'bytes':
            local = storage.local_copy(tokenizer)
            words = with_code_tokens(local / 'tokenizer.json' if local.is_dir() else local, run.words.separator,
                                     run.model.vocab_size)
    else:
        module, params, config = read_released(src, key=key)
        tokenizer = os.fspath(src)
    stored = np.dtype(params['embed'].dtype) if dtype is None else np.dtype(modules.dtype({'dtype': dtype}))
    config = {**config, **llada.config_of(module), 'torch_dtype': stored.name}
    with storage.local_folder(dst, last='config.json') as folder:
        files.save(folder, convert.tensors('llada', module, params, dtype=stored), config)
        copied = folders.copy_tokenizer(tokenizer, folder)
        if words is not None:
            words.save(str(folder / 'tokenizer.json'))
    count = sum(np.size(x) for x in jax.tree.leaves(params))
    return (f'llada: {count:,} parameters, vocabulary of {module.vocab_size}, {stored.itemsize * count / 1e9:.3g} GB '
            f'in {stored.name} -> {dst}' + ('' if copied else ' (no tokenizer files beside it)'))

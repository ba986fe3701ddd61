"""Trained language models in the form that `transformers` and PEFT load: weights, config.json, tokenizer files."""
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.rlhf.models import adapters, loading
from experiments.rlhf.models.tokenizer import open_tokenizer
from experiments.runtime import folders, modules, storage
from rlhf_jax import convert, tokenizers
from rlhf_jax.convert import peft
from rlhf_jax.models import lora
from rlhf_jax.weights import files


def export(kind: str, src: str | os.PathLike, dst: str | os.PathLike, *, adapter: bool = False, base: str | None = None,
           dtype: str = 'float32', step: int | None = None) -> str:
    """Writes the model of the run in `src` to the folder `dst`, tensor by tensor, and says in one line what it is.

    Args:
        kind: of `rlhf_jax.convert.KINDS`, what the run must be of.
        adapter: only the LoRA adapter, as PEFT has it, in float32; otherwise it is merged into the weights.
        base: name or folder of the model that the adapter belongs to, for its adapter_config.json; None: the Hugging
            Face folder that the run started from, or null where it started from something else.
        dtype: of the tensors written.
        step: which checkpoint of the run; None: the newest.

    Raises:
        FileNotFoundError, ValueError: no run of a language or reward model there, one of another kind, or no adapter.
    """
    if not loading.is_run(src):
        raise ValueError(f'--src={src}: a Hugging Face folder already; --reverse takes a work directory')
    module, params, config = loading.load_trained(src, step=step)
    if config.model.kind != kind:
        raise ValueError(f'--kind={kind}: --src={src} holds a {config.model.kind}')
    if adapter and not config.lora.rank:
        raise ValueError(f'--adapter: --src={src} was trained without one (lora.rank=0)')
    base = (base or _base_of(config)) if adapter else None
    tokenizer = open_tokenizer(config.tokenizer)
    params = jax.tree.map(np.asarray, params if adapter else adapters.merged(params))
    with storage.local_folder(dst, last='adapter_config.json' if adapter else 'config.json') as folder:
        if adapter:
            tensors, saved = peft.to_torch(kind, module, params)
            saved['base_model_name_or_path'] = base
            files.save_state_dict(folder / 'adapter_model.safetensors', tensors)
            storage.write_json(folder / 'adapter_config.json', saved)
            params = lora.split(params)[1]
        else:
            written = convert.tensors(kind, module, params, dtype=modules.dtype(dict(dtype=dtype)), tied=False)
            files.save(folder, written,
                       convert.config_of(kind, module) | special_ids(tokenizer) | {'torch_dtype': dtype})
        copied = folders.copy_tokenizer(config.tokenizer, folder)
        if copied and config.get('bos') not in (None, tokenizer.adds_bos):
            tokenizers.set_bos(folder, tokenizer, config.bos)
    count, dtype = sum(np.size(x) for x in jax.tree.leaves(params)), 'float32' if adapter else dtype
    return (f'{kind}{" adapter" if adapter else ""} of a {config.experiment} run: {count:,} parameters, '
            f'{np.dtype(dtype).itemsize * count / 1e9:.3g} GB in {dtype} -> {dst}'
            + ('' if copied else ' (no tokenizer files: bytes are ids)')
            + (' (no base_model_name_or_path: the run started from no Hugging Face folder; --base names one)'
               if adapter and base is None else ''))


def _base_of(config: ml_collections.ConfigDict) -> str | None:
    """The Hugging Face folder whose weights the adapter of a run changes; None where PEFT could not load them: fresh
    weights, a work directory, or weights with an earlier adapter merged into them."""
    if not config.weights or config.get('adapter') or loading.is_run(config.weights):
        return None
    return config.weights


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of a config.json.

    Without a padding token of its own there is none: `transformers` reads a reward model before the first pad from the
    right, and with `pad_token_id` = `eos_token_id` that is one token before the EOS that the score belongs to.
    """
    ends = tuple(tokenizer.stops)
    return {'bos_token_id': tokenizer.bos, 'eos_token_id': tokenizer.eos if len(ends) == 1 else list(ends),
            'pad_token_id': None if tokenizer.pad in ends else tokenizer.pad}

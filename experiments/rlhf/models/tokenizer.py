"""The tokenizers that configs name."""
from typing import Any

import ml_collections

from experiments.rlhf.models import architecture
from rlhf_jax import tokenizers


def open_tokenizer(name: str) -> Any:
    """The tokenizer `name`: 'bytes', or a tokenizer.json or its folder.

    Raises:
        FileNotFoundError, ValueError: no such file, or no EOS.
    """
    tokenizer = tokenizers.ByteTokenizer() if name == 'bytes' else tokenizers.JsonTokenizer(name)
    if tokenizer.eos is None:
        raise ValueError(f'tokenizer={name}: it names no eos token, so that no response could end; add '
                         'eos_token to the tokenizer_config.json beside it')
    return tokenizer


def tokenizer_of(config: ml_collections.ConfigDict) -> Any:
    """The tokenizer that `config.tokenizer` names, checked against the model's vocabulary.

    Raises:
        FileNotFoundError, ValueError: no such file, no EOS, or ids that the model does not have.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    size = architecture.decoder(config.model).vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(f'tokenizer={config.tokenizer} has {tokenizer.vocab_size} ids, the model '
                         f'model.vocab_size={size}; they do not belong together')
    return tokenizer

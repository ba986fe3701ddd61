"""Fields of a module <-> keys of a `config.json` of `transformers`, one table read in both directions."""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REQUIRED = object()
# Names of `transformers` -> ours; of several for one function the first is written.
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh', 'gelu': 'gelu',
               'relu': 'relu', 'silu': 'silu'}


class Setting(NamedTuple):
    """
    Attributes:
        default: what an absent (or null) key means.
    """
    field: str
    key: str
    default: Any = REQUIRED


# Of GPT-NeoX and LLaMA alike.
COMMON = (
    Setting('vocab_size', 'vocab_size'), Setting('width', 'hidden_size'), Setting('depth', 'num_hidden_layers'),
    Setting('num_heads', 'num_attention_heads'), Setting('hidden', 'intermediate_size'),
    Setting('max_length', 'max_position_embeddings', 2048), Setting('tied', 'tie_word_embeddings', False),
    Setting('init_std', 'initializer_range', 0.02))


def fields_of(config: Mapping[str, Any], settings: Sequence[Setting]) -> dict[str, Any]:
    """Fields of the module that `config` gives.

    Raises:
        ValueError: a key that is missing, or an activation that the modules do not have.
    """
    fields = {}
    for field, key, default in settings:
        value = default if config.get(key) is None else config[key]
        if value is REQUIRED:
            raise ValueError(f'convert: config has no {key}')
        if field == 'activation':
            if value not in ACTIVATIONS:
                raise ValueError(f'convert: config has {key}={value!r}, not one of {sorted(ACTIVATIONS)}')
            value = ACTIVATIONS[value]
        fields[field] = value
    return fields


def config_of(module: Any, settings: Sequence[Setting]) -> dict[str, Any]:
    """Keys of the `config.json` of `module`."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config = {key: getattr(module, field) for field, key, _ in settings}
    return config | {key: names[module.activation] for field, key, _ in settings if field == 'activation'}

"""Fields of a module <-> keys of a `config.json` of `transformers`, one table read in both directions."""
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REQUIRED = object()
# Names of `transformers` -> ours; of several for one function the first is written.
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh', 'gelu': 'gelu',
               'relu': 'relu', 'silu': 'silu'}
_LARGEST = 1 << 24  # of a size, so that nothing made of a wrong one takes memory


class Setting(NamedTuple):
    """A field of a module and the key of `config.json` that says it.

    Attributes:
        default: what an absent (or null) key means.
        type: of the value; 'size' is an int of at least 1, 'count' one of at least 0, 'real' a positive number, 'share'
            one of at most 1.
    """
    field: str
    key: str
    default: Any = REQUIRED
    type: str = 'size'


# Of GPT-NeoX and LLaMA alike.
COMMON = (
    Setting('vocab_size', 'vocab_size'), Setting('width', 'hidden_size'), Setting('depth', 'num_hidden_layers'),
    Setting('num_heads', 'num_attention_heads'), Setting('hidden', 'intermediate_size'),
    Setting('max_length', 'max_position_embeddings', 2048), Setting('tied', 'tie_word_embeddings', False, 'bool'),
    Setting('init_std', 'initializer_range', 0.02, 'real'))


def fields_of(config: Mapping[str, Any], settings: Sequence[Setting]) -> dict[str, Any]:
    """Fields of the module that `config` gives.

    Raises:
        ValueError: a key that is missing, a value of another type, or an activation that the modules do not have.
    """
    fields = {}
    for field, key, default, type_ in settings:
        value = default if config.get(key) is None else config[key]
        if value is REQUIRED:
            raise ValueError(f'convert: config has no {key}')
        fields[field] = ACTIVATIONS[_choice(key, value)] if type_ == 'activation' else checked(key, value, type_)
    return fields


def checked(key: str, value: Any, type_: str) -> Any:
    """`value` of the key `key` of a config.json, once it is of `type_` (see `Setting`).

    Raises:
        ValueError: it is not.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = {
        'bool': isinstance(value, bool),
        'size': number and isinstance(value, int) and 1 <= value < _LARGEST,
        'count': number and isinstance(value, int) and 0 <= value < _LARGEST,
        'real': number and math.isfinite(value) and value > 0,
        'share': number and 0 < value <= 1,
    }[type_]
    if not right:
        meant = {'bool': 'true or false', 'size': 'a positive integer', 'count': 'an integer of at least 0',
                 'real': 'a positive number', 'share': 'a number in (0, 1]'}[type_]
        raise ValueError(f'convert: config has {key}={value!r:.60}, not {meant}')
    return value


def token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Ids that `config`, a config.json or generation_config.json, gives the special token `name` ('bos', 'eos', 'pad');
    () where it gives none. Of several the first is what `transformers` generates.

    Raises:
        ValueError: something else than an id or a list of them.
    """
    key = f'{name}_token_id'
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(checked(key, x, 'count') for x in ids)


def _choice(key: str, value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f'convert: config has {key}={value!r:.60}, not one of {sorted(ACTIVATIONS)}')
    return value


def config_of(module: Any, settings: Sequence[Setting]) -> dict[str, Any]:
    """Keys of the `config.json` of `module`."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {setting.key: names[module.activation] if setting.type == 'activation' else getattr(module, setting.field)
            for setting in settings}

"""Sizes of the GPU benchmark: the published ones, and tiny ones that only show that every row runs."""
import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Train:
    """A training step of images.

    Attributes:
        batch: images or codes.
        parts: microbatches, on both sides.
        model: fields of `config.model`.
        ours: those that say how ours computes.
        crops, head: fields of `config.data` and `config.head` of the encoder.
    """
    batch: int
    parts: int
    model: Mapping[str, Any]
    ours: Mapping[str, Any]
    crops: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Language:
    """A row of language: prompts of `prompt` tokens, responses of `new`.

    Attributes:
        model: size or fields of GPT-NeoX.
        batch: rows; two a prompt where there are pairs.
        parts: microbatches of the learner.
        ours: fields of the model that say how ours computes.
        iterations: of a stream, timed together.
    """
    model: Any
    batch: int
    prompt: int
    new: int
    parts: int = 1
    ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    iterations: int = 4


UNROLLED = {'unroll': True, 'attention_impl': 'auto'}
_TINY = dict(vocab_size=97, width=32, depth=2, num_heads=2)
_LARGE = 100 * 2 ** 30  # bytes of a GPU on which no batch needs to be split


def sizes(name: str, memory: int) -> dict[str, Any]:
    """Row -> what it measures, most telling rows first.

    Args:
        name: 'published' or 'tiny'.
        memory: bytes of the GPU; where it is short a batch is split into microbatches, on both sides.
    """
    if name == 'tiny':
        codes = dict(num_codes=4, vocab_size=8)
        pair = dict(model=_TINY | dict(depth=1), batch=4, prompt=8, new=4, iterations=1)
        return {
            'dit': Train(4, 2, dict(size='S', width=32, depth=1, num_heads=2, input_size=8, **codes), UNROLLED),
            'decode_410m_x64': Language(_TINY, 2, 8, 4),
            'sedd': Train(4, 1, dict(size='small', width=32, depth=1, num_heads=2, num_codes=8, vocab_size=16,
                                     cond_dim=16), UNROLLED),
            'learner_410m': Language(**pair, ours=UNROLLED, parts=2),
            'vit': Train(4, 1, dict(size='S', width=32, depth=1, num_heads=2, patch_size=4, pos_grid=4, **codes),
                         UNROLLED, dict(global_size=16, local_size=8, num_local=2),
                         dict(hidden=32, bottleneck=16, prototypes=32)),
            'iteration_410m': Language(**pair, ours=UNROLLED),
        }
    codes, split = dict(num_codes=512, vocab_size=256), 1 if memory >= _LARGE else 2
    text = dict(prompt=397, new=53)
    decode = lambda model, batch: Language(model, batch, **text)
    return {
        'dit': Train(256, split, dict(size='XL', **codes), UNROLLED),
        'decode_410m_x64': decode('410m', 64),
        'decode_410m_x256': decode('410m', 256),
        'sedd': Train(128, split, dict(size='medium', **codes), UNROLLED),
        'learner_410m': Language('410m', 128, **text, parts=split, ours=UNROLLED),
        'vit': Train(32, 1, dict(size='L', patch_size=14, pos_grid=37, **codes), UNROLLED,
                     dict(global_size=224, local_size=98, num_local=8),
                     dict(hidden=2048, bottleneck=256, prototypes=65536)),
        'decode_2.8b_x64': decode('2.8b', 64),
        'decode_2.8b_x256': decode('2.8b', 256),
        'decode_1b_x64': decode('1b', 64),
        'decode_1b_x256': decode('1b', 256),
        'iteration_410m': Language('410m', 128, **text, parts=split, ours=UNROLLED),
        'learner_1b': Language('1b', 128, **text, parts=2 * split, ours=UNROLLED),
    }

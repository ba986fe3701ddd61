"""What codes and pictures of a text-to-code model are worth, and how far the model has drifted from where it began."""
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dlc_jax import likelihood
from dlc_jax.metrics import frechet, vendi
from experiments.align.rollouts import code_distance
from experiments.align.writer import CodeWriter
from experiments.dlc.judge import PictureJudge
from experiments.dlc.text_to_code import TextToCode

Array = jax.Array


def drift(policy: TextToCode, start: TextToCode, captions: Sequence[str], codes: np.ndarray, *, num_masks: int = 32,
          seed: int = 0, batch_size: int = 64) -> np.ndarray:
    """How many nats likelier each code is under `policy` than under `start`: float32 [N].

    Both bounds are estimated at the same sets of masked positions. Over codes of the policy the mean estimates its KL
    from the start, as the difference of two lower bounds, which is no bound itself.

    Args:
        captions: N texts.
        codes: int [N, L].
        num_masks: sets of positions a code.
    """
    tokens, mask = policy.checked(captions)
    run = _bounds(start.config.to_json(), num_masks, tokens.shape[1])  # one program for all that began there
    out, keys = [], jax.random.split(jax.random.key(seed), len(codes))
    size = min(batch_size, len(codes))
    for begin in range(0, len(codes), size):
        at = np.minimum(np.arange(begin, begin + size), len(codes) - 1)  # the last batch is filled up
        rows = tokens[at], mask[at], codes[at].astype(np.int32), keys[at]
        out.append(np.asarray(run(policy.params, *rows) - run(start.params, *rows)))
    return np.concatenate(out)[:len(codes)]


@functools.lru_cache(maxsize=4)
def _bounds(text: str, num_masks: int, length: int) -> Any:
    """(params, captions, mask, codes, keys) -> bounds [B], compiled for a model and captions of `length` tokens."""
    import json
    config = ml_collections.ConfigDict(json.loads(text))
    with config.unlocked():
        config.vocabulary = tuple(config.vocabulary)
        config.caption_length, config.lora = length, dict(rank=0)
        config.likelihood = dict(kind='bound', num=num_masks)
    writer, num_codes = CodeWriter(config), config.model.num_codes
    offset = config.words.separator + 1

    @jax.jit
    def run(params: Any, captions: Array, mask: Array, codes: Array, keys: Array) -> Array:
        masks = jax.vmap(lambda key: likelihood.draw_masks(key, num_masks, num_codes))(keys)
        rows = {'tokens': jnp.concatenate([captions, codes + offset], 1), 'prompt_mask': mask,
                'mask': jnp.ones(codes.shape, bool), 'masks': masks}
        rows = {name: x[:, None] for name, x in rows.items()}
        return writer.forward({'policy': params}, rows)[0].sum((1, 2))
    return run


def frechet_distance(judge: PictureJudge, images: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of pictures to real ones in the features of `judge`; both uint8 [N, H, W, C]."""
    return frechet.frechet_distance(*(frechet.statistics(judge.features(x)) for x in (images, reference)))


def right(judge: PictureJudge, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [N]: whether each region of pictures uint8 [N, H, W, C] is, to the judge, what its label says."""
    seen = np.stack([judge.judge.predict(part) for part in judge.parts(images)], 1)
    return (seen == judge.classes_of(labels)).all(1)


def diversity(judge: PictureJudge, codes: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """`code_distance` and `vendi` of K draws of each caption.

    Args:
        codes: int [N, K, L].
        images: uint8 [N, K, H, W, C].

    Returns:
        Mean share of positions in which two codes of a caption differ; Vendi score of all pictures, an effective number
        of different ones.
    """
    return {'code_distance': code_distance(codes),
            'vendi': float(vendi.vendi_score(judge.features(images.reshape(-1, *images.shape[2:]))))}

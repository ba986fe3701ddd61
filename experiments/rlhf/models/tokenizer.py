"""The tokenizers that configs name, whether their texts begin with BOS, and whether two stages share one.

Whether a text begins with BOS is decided once: by `config.bos`, else by the run whose weights are taken, else by the
tokenizer's own files. A run keeps the answer in its config.json (`settled`), and whatever reads the run asks there.
"""
import dataclasses
import logging
import os
import pathlib
from typing import Any

import ml_collections

from experiments.rlhf.data import texts
from experiments.rlhf.models import architecture
from experiments.rlhf.models.classifier import is_classifier
from experiments.runtime import config_files, storage
from rlhf_jax import tokenizers
from rlhf_jax.weights.json_file import read_json

log = logging.getLogger(__name__)

Config = ml_collections.ConfigDict


def open_tokenizer(name: str) -> Any:
    """The tokenizer `name`: 'bytes', or a tokenizer.json or its folder.

    Raises:
        FileNotFoundError, ValueError: no such file, or no EOS.
    """
    tokenizer = _open(name)
    if tokenizer.eos is None:
        raise ValueError(f'tokenizer={name}: it names no eos token, so that no response could end; add '
                         'eos_token to the tokenizer_config.json beside it')
    return tokenizer


def _open(name: str) -> Any:
    return tokenizers.ByteTokenizer() if name == 'bytes' else tokenizers.JsonTokenizer(name)


def tokenizer_of(config: Config) -> Any:
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


def encoder_of(config: Config) -> texts.Encoder:
    """How a run reads texts.

    Raises:
        FileNotFoundError, ValueError: no such tokenizer, one that the model does not belong to, or a BOS that it lacks.
    """
    tokenizer = tokenizer_of(config)
    return texts.Encoder(tokenizer, _bos(config, tokenizer), config.tokenizer)


def settled(config: Config) -> Config:
    """A copy of `config` whose `bos` is True or False; the same where its tokenizer is not there (compile checks)."""
    try:
        bos = _bos(config, _open(config.tokenizer))
    except FileNotFoundError:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.bos = bos
    return config


def _bos(config: Config, tokenizer: Any) -> bool:
    if config.get('bos') is not None:
        return config.bos
    stage = stage_of(config.weights) if config.get('weights') else None
    return stage.bos if stage and stage.is_run else tokenizer.adds_bos


# ---- Stages ----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Stage:
    """What a folder of weights says of its texts.

    Attributes:
        is_run: whether it is a work directory rather than a Hugging Face folder.
        name: of the tokenizer.
        tokenizer: None where its files are not there.
        bos: whether texts begin with BOS.
    """
    is_run: bool
    name: str
    tokenizer: Any
    bos: bool


def stage_of(path: str | os.PathLike) -> Stage | None:
    """What the work directory or Hugging Face folder `path` says of its texts; None: there is none.

    Raises:
        ValueError: a damaged config.json or tokenizer.
    """
    folder = storage.resolve(path)
    if not (folder / 'config.json').exists():
        return None
    is_run = 'experiment' in read_json(folder / 'config.json')
    config = config_files.read(path) if is_run else Config()
    name = config.get('tokenizer', '') if is_run else os.fspath(path)
    if not isinstance(name, str) or not isinstance(config.get('bos'), bool | None):
        raise ValueError(f'{path}/config.json: tokenizer must be a name and bos true or false; they are {name!r} and '
                         f'{config.get("bos")!r}')
    try:
        tokenizer = _open(name)
    except FileNotFoundError:
        tokenizer = None
    bos = config.get('bos')
    return Stage(is_run, name, tokenizer, bool(tokenizer and tokenizer.adds_bos) if bos is None else bos)


def check_stage(field: str, path: str | os.PathLike, encode: texts.Encoder) -> None:
    """Checks that what `field` names was made with the tokenizer of `encode`, as far as its files are there.

    A BOS of one and not of the other is a warning.

    Raises:
        ValueError: ids stand for other tokens there.
    """
    stage = stage_of(path)
    if stage is None:
        return
    if stage.tokenizer is None:
        log.warning('%s=%s: its tokenizer%s is not there; it cannot be compared with tokenizer=%s', field, path,
                    f' {stage.name}' if stage.is_run else '.json', encode.name)
        return
    check_same_tokenizer(f'{field}={path}', stage.tokenizer, stage.name, encode)
    if stage.bos != encode.bos:
        log.warning('%s=%s: its texts begin %s BOS, those of this run %s (--config.bos)', field, path,
                    *(('with a', 'without') if stage.bos else ('without', 'with a')))


def check_same_tokenizer(what: str, tokenizer: Any, name: str, encode: texts.Encoder) -> None:
    """Raises a ValueError where an id stands for one token in `tokenizer` and another in that of `encode`; warns where
    ids of `encode` are not in `tokenizer`."""
    if _same_file(name, encode.name):
        return
    theirs, ours = tokenizer.tokens, encode.tokenizer.tokens
    for i, token in sorted(ours.items()):
        if theirs.get(i, token) != token:
            raise ValueError(f'{what} was made with tokenizer={name}, in which id {i} is {theirs[i]!r}; in '
                             f'tokenizer={encode.name} it is {token!r}; one tokenizer serves all stages')
    missing = [token for i, token in ours.items() if i not in theirs]
    if missing:
        log.warning('%s was made with tokenizer=%s, which lacks %d of the tokens of tokenizer=%s, such as %r', what,
                    name, len(missing), encode.name, missing[0])


def _same_file(name: str, other: str) -> bool:
    if name == other:
        return True
    return 'bytes' not in (name, other) and pathlib.Path(name).exists() and pathlib.Path(other).exists() and (
        pathlib.Path(name).resolve() == pathlib.Path(other).resolve())


def check_stages(config: Config, encode: texts.Encoder) -> None:
    """`check_stage` of every folder that a config takes weights from, before anything is compiled; not of classifiers,
    which read text.

    Raises:
        ValueError: one was made with another tokenizer.
    """
    reward, algorithm = config.get('reward', {}), config.get('algorithm', {})
    named = {'weights': config.get('weights', ''),
             'reward.model': reward.get('model', '') if reward.get('kind') == 'model' else '',
             'reward.gold': reward.get('gold', ''), 'algorithm.critic_weights': algorithm.get('critic_weights', '')}
    for field, path in named.items():
        if path and ':' not in path.replace('://', '') and not is_classifier(path):
            check_stage(field, path, encode)

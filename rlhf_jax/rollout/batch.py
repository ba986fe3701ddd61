"""What a rollout batch holds, its minibatches, its staleness, and its form in a checkpoint.

A batch is a dict of arrays over B prompts and K completions of each:

    tokens          int [B, K, P + L], prompt (padded on the left) and response
    mask            [B, K, L], True at the response's tokens up to and including EOS
    logprobs        float32 [B, K, L], as the sampler drew them
    rewards         float32 [B, K], NaN where a completion has none
    policy_version  int32 [B, K, L], of the weights that drew each token

and whatever else the task wants to carry (prompt ids, reference log-probabilities), each [B, K, ...].
"""
import base64
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

Batch = dict[str, np.ndarray]

FIELDS = ('tokens', 'mask', 'logprobs', 'rewards', 'policy_version')


def check(batch: Mapping[str, Any], where: str = 'rollout', vocab_size: int | None = None) -> None:
    """Refuses a batch that a learner would choke on, or worse, not choke on.

    Args:
        batch: see above.
        where: begins the errors.
        vocab_size: ids that the learner's model has; None: not known here.

    Raises:
        ValueError: a field is missing or has another shape than the others, there is no completion, a token is no id of
            the model (an embedding would be read past its end, as NaN or as the last row), no completion has a reward,
            one is infinite, or a log-probability of a counted token is not finite.
    """
    for name in FIELDS:
        if name not in batch:
            raise ValueError(f'{where}: field {name} is missing; a batch holds {FIELDS}')
    shape = np.shape(batch['logprobs'])
    if len(shape) != 3 or not shape[0] * shape[1]:
        raise ValueError(f'{where}: logprobs have shape {shape}, expected [prompts, completions, response tokens] and '
                         'at least one completion')
    axes = f'{shape[0]}, {shape[1]}'
    for name in ('mask', 'policy_version'):
        if np.shape(batch[name]) != shape:
            raise ValueError(f'{where}: {name} has shape {np.shape(batch[name])}, expected {shape} as logprobs')
    tokens = np.shape(batch['tokens'])
    if len(tokens) != 3 or tokens[2] < shape[2]:
        raise ValueError(f'{where}: tokens have shape {tokens}, expected [{axes}, at least {shape[2]}]')
    ids = np.asarray(batch['tokens'])
    if ids.size and (ids.min() < 0 or vocab_size is not None and ids.max() >= vocab_size):
        raise ValueError(f'{where}: tokens lie in {ids.min()}..{ids.max()}, outside the ids of the model, '
                         f'0..{"" if vocab_size is None else vocab_size - 1}')
    if np.shape(batch['rewards']) != shape[:2]:
        raise ValueError(f"{where}: rewards have shape {np.shape(batch['rewards'])}, expected {shape[:2]}, one a "
                         'completion')
    for name, x in batch.items():
        if np.shape(x)[:2] != shape[:2]:
            raise ValueError(f'{where}: {name} has shape {np.shape(x)}, expected [{axes}, ...]')
    if np.isnan(batch['rewards']).all():
        raise ValueError(f'{where}: all rewards are missing (NaN)')
    for name, bad in (('rewards', np.isinf(batch['rewards'])),
                      ('logprobs', ~np.isfinite(np.where(batch['mask'], batch['logprobs'], 0)))):
        if bad.any():
            raise ValueError(f'{where}: {int(bad.sum())} of {bad.size} {name} are not finite')


def complete(batch: Batch, version: int) -> None:
    """Writes `version` as the `policy_version` of every token where the batch does not say it itself."""
    if 'policy_version' not in batch and 'logprobs' in batch:
        batch['policy_version'] = np.full(np.shape(batch['logprobs']), version, np.int32)


def staleness(batch: Mapping[str, np.ndarray], version: int) -> int:
    """By how many versions the oldest counted token of `batch` lags behind the learner's `version`."""
    counted = np.asarray(batch['mask']) > 0
    versions = np.asarray(batch['policy_version'])
    return int(version - (versions[counted] if counted.any() else versions).min())


def optimizer_steps_behind(lag: int, num_minibatches: int, num_epochs: int, minibatch: int, epoch: int) -> int:
    """Staleness in optimizer steps of one minibatch of a batch that lags `lag` versions (async RLHF §1.2):
    `lag N T + epoch N + minibatch`, with N minibatches and T epochs a batch, both counted from 0."""
    return lag * num_minibatches * num_epochs + epoch * num_minibatches + minibatch


def minibatches(batch: Mapping[str, np.ndarray], num_minibatches: int, *,
                rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """Splits a batch between prompts: every minibatch holds all K completions of its prompts.

    Args:
        batch: arrays [B, ...].
        num_minibatches: N; must divide B.
        rng: shuffles the prompts first; None keeps their order.

    Raises:
        ValueError: prompts that do not divide.
    """
    prompts = len(batch['rewards'])
    if num_minibatches < 1 or prompts % num_minibatches:
        raise ValueError(f'num_minibatches={num_minibatches} does not divide the {prompts} prompts of a batch')
    order = np.arange(prompts) if rng is None else rng.permutation(prompts)
    for part in order.reshape(num_minibatches, -1):
        yield {name: x[part] for name, x in batch.items()}


def to_json(batch: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The batch bit for bit as JSON values, for the data position in a checkpoint."""
    def one(x):
        x = np.ascontiguousarray(x)
        return {'dtype': x.dtype.name, 'shape': list(x.shape),
                'data': base64.b64encode(zlib.compress(x.tobytes(), 1)).decode('ascii')}
    return {name: one(x) for name, x in batch.items()}


def from_json(saved: Mapping[str, Mapping[str, Any]]) -> Batch:
    """The batch that `to_json` was given.

    Raises:
        ValueError: it was given no such thing, or what it gave is damaged.
    """
    try:
        return {name: np.frombuffer(zlib.decompress(base64.b64decode(x['data'])), jax.numpy.dtype(x['dtype']))
                .reshape(x['shape']).copy() for name, x in saved.items()}
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise ValueError(f'a rollout batch is damaged ({" ".join(repr(error).split())})') from None

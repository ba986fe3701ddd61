"""Rewards of completions as `config.reward` names them: a task's rule, a reward model, or a function of the user's."""
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf import language
from experiments.rlhf.tasks import Task
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition, storage
from rlhf_jax.models import heads
from rlhf_jax.rollout.rewards import score


@dataclasses.dataclass(frozen=True)
class Completions:
    """What is to be scored, N of them.

    Attributes:
        texts: up to EOS, which is left out.
        rows: of the data set, one a completion.
        tokens, mask: int32 and bool [N, T], prompt and response, EOS included.
        ended: bool [N], whether there is an EOS.
    """
    texts: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    tokens: np.ndarray
    mask: np.ndarray
    ended: np.ndarray


Reward = Callable[[Completions], np.ndarray]


class Scorer:
    """`config.reward`: completions -> rewards, and what is logged beside them.

    Args:
        mesh: of the devices that reward models run on.

    Raises:
        ValueError, FileNotFoundError: a reward that is not there, before anything is compiled.
    """

    def __init__(self, config: ml_collections.ConfigDict, task: Task, mesh: Mesh):
        r = config.reward
        self._timeout = r.timeout or None
        self._missing_eos = number('reward.missing_eos', r.missing_eos)
        self._replacement = number('reward.replacement', r.replacement)
        self._reward = _named(config, task, mesh, 'reward.kind', kind_of(r))
        self._gold = _named(config, task, mesh, 'reward.gold', r.gold, gold=True) if r.gold else None

    def __call__(self, completions: Completions) -> dict[str, np.ndarray]:
        """`rewards` float32 [N], `replaced` bool [N], and `gold` float32 [N] where there is one.

        Raises:
            ValueError, TimeoutError, Exception: as of `rlhf_jax.rollout.rewards.score`.
        """
        count = len(completions.texts)
        rewards, replaced = score(self._reward, completions, num=count, timeout=self._timeout,
                                  replacement=self._replacement)
        if self._missing_eos is not None:
            rewards = np.where(completions.ended, rewards, np.float32(self._missing_eos))
        # Which ones does not matter to anybody; how many is logged.
        out = {'rewards': rewards, 'replaced': np.arange(count) < replaced}
        if self._gold:
            out['gold'] = score(self._gold, completions, num=count, timeout=self._timeout)[0]
        return out


def kind_of(r: Mapping[str, Any]) -> str:
    """What `reward.gold` would be to say the same as `reward.kind` with its field."""
    if r['kind'] == 'task':
        return 'task'
    if r['kind'] not in ('model', 'function'):
        raise ValueError(f"reward.kind={r['kind']!r} is not one of ('task', 'model', 'function')")
    if not r[r['kind']]:
        raise ValueError(f"reward.{r['kind']} is empty, but reward.kind={r['kind']!r} needs it")
    return r[r['kind']]


def number(name: str, text: Any) -> float | None:
    """A number that may be left out: '' is None.

    Raises:
        ValueError: other text.
    """
    if text == '' or text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} must be a number, or '' for none") from None


def _named(config: ml_collections.ConfigDict, task: Task, mesh: Mesh, field: str, name: str, *,
           gold: bool = False) -> Reward:
    if name == 'task':
        rule = (task.gold or task.reward) if gold else task.reward
        if rule is None:
            raise ValueError(f"{field}: the task {config.data.task!r} has no rule to reward by; give a reward model "
                             '(reward.kind=model) or a function (reward.kind=function)')
        return lambda c: rule(c.texts, c.rows)
    if (storage.resolve(name) / 'config.json').exists():
        return RewardModel(name, config, mesh)
    module, colon, attribute = name.partition(':')
    if not colon:
        raise FileNotFoundError(f'{field}: {name} is neither a folder with a config.json nor a package.module:function')
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'{field}: cannot import {name} ({error})') from None
    return lambda c: function(c.texts, c.rows)


class RewardModel:
    """A reward model read at the last token of each row.

    Args:
        path: a work directory or a Hugging Face folder.
        config: of the policy; the reward model computes in its `model.dtype`.
    """

    def __init__(self, path: str, config: ml_collections.ConfigDict, mesh: Mesh):
        module, params = language.load_reward_model(path, config.model)
        size, ids = module.backbone.vocab_size, language.tokenizer(config).vocab_size
        if ids > size:
            raise ValueError(f'{path}: the reward model has {size} tokens, the tokenizer {ids}; they do not belong '
                             'together')
        if config.reward.batch_size < 1:
            raise ValueError(f'reward.batch_size={config.reward.batch_size} must be at least 1')
        self._max_length, self._path = module.backbone.max_length, path
        shards = mesh_lib.batch_shards(mesh)
        self._rows = -(-config.reward.batch_size // shards) * shards
        own = ml_collections.ConfigDict(dict(kind=_kind(module.backbone)))
        rules = language.rules(own, 'backbone')
        self._params = jax.device_put(params, partition.param_shardings(params, rules, mesh))
        self._sharding = mesh_lib.batch_sharding(mesh)
        self._run = jax.jit(lambda p, t, m: heads.at_last_token(module.apply({'params': p}, t, mask=m), m))

    def __call__(self, completions: Completions) -> np.ndarray:
        tokens, mask = completions.tokens, completions.mask
        if tokens.shape[1] > self._max_length:
            raise ValueError(f'{self._path}: reads at most {self._max_length} tokens, rows have {tokens.shape[1]}')
        out = []
        for start in range(0, len(tokens), self._rows):
            part = [x[start:start + self._rows] for x in (tokens, mask)]
            padded = [np.concatenate([x, np.repeat(x[-1:], self._rows - len(x), 0)]) for x in part]
            out.append(self._run(self._params, *(jax.device_put(x, self._sharding) for x in padded)))
        return np.concatenate(jax.device_get(out))[:len(tokens)]


def _kind(backbone: Any) -> str:
    return next(kind for kind, (_, cls) in language.KINDS.items() if isinstance(backbone, cls))

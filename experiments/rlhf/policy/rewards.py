"""Rewards of completions as `config.reward` names them: a task's rule, a reward model, or a function of the user's."""
import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data.tasks import Task
from experiments.rlhf.models.classifier import TextClassifier, is_classifier
from experiments.rlhf.models.tokenizer import tokenizer_of
from experiments.rlhf.policy.completions import Reward
from experiments.rlhf.policy.reward_model import RewardModel, shared
from experiments.runtime import checks, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.signals import signals
from rlhf_jax.rollout.rewards import score
from rlhf_jax.tasks import tldr

log = logging.getLogger(__name__)


def wins(gold: np.ndarray, reference_gold: np.ndarray) -> dict[str, float]:
    """How gold rewards [N, K] do against those of the data's own responses [N]: `win_rate` counts strict wins,
    `win_ties` equal ones, `win_margin` is the mean difference. What has no reward (NaN) is left out."""
    theirs = np.repeat(reference_gold, gold.shape[1])
    known = np.isfinite(gold.reshape(-1)) & np.isfinite(theirs)
    if not known.any():
        return {}
    found = tldr.win_rate(gold.reshape(-1)[known], theirs[known])
    return {'win_rate': found.win_rate, 'win_ties': found.ties, 'win_margin': found.margin}


class Scorer:
    """`config.reward`: completions -> rewards, and what is logged beside them.

    In a job of several processes each scores its own completions: a function sees those of some prompts of a batch, a
    reward model runs over the whole mesh on those of all.

    Args:
        section: `config.reward`, for what is done with rewards that are late, missing or not finite.
        reward: that is trained on.
        gold: that is logged beside it; None: none is.

    Raises:
        ValueError: a replacement or penalty that is no number.
    """

    def __init__(self, section: Mapping[str, Any], reward: Callable[[Any], Any],
                 gold: Callable[[Any], Any] | None = None):
        self._timeout = section['timeout'] or None
        self._missing_eos = number('reward.missing_eos', section['missing_eos'])
        self._replacement = number('reward.replacement', section['replacement'])
        self._warned = False
        self._reward, self._gold = reward, gold

    @property
    def has_gold(self) -> bool:
        """Whether there is a second reward, which is never trained on."""
        return self._gold is not None

    def gold(self, completions: Any) -> np.ndarray:
        """float32 [N]: the second reward, NaN where a completion has none; errors as of calling this. N may be 0 in a
        process of several."""
        return self._score(self._gold, completions)[0]

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, task: Task, mesh: Mesh) -> 'Scorer':
        """The rewards of texts that `config.reward` names.

        Args:
            mesh: of the devices that reward models run on.

        Raises:
            ValueError, FileNotFoundError: a reward that is not there, before anything is compiled.
        """
        section, task_name = config.reward, config.data.task
        num_ids = tokenizer_of(config).vocab_size

        def model(path):
            over = mesh_lib.reshaped(mesh, section.mesh)
            if is_classifier(path):
                return shared(path, over, TextClassifier, label=section.get('label', ''), batch_size=section.batch_size)
            return shared(path, over, dtype=config.model.dtype, num_ids=num_ids, batch_size=section.batch_size,
                          length_buckets=config.length_buckets)

        check_label(section)
        reward = find('reward.kind', reward_name(section), task, task_name, model)
        gold = find('reward.gold', section.gold, task, task_name, model, gold=True) if section.gold else None
        return cls(section, reward, gold)

    def __call__(self, completions: Any) -> dict[str, np.ndarray]:
        """Scores N completions (`Completions`, or what else the rewards take) with `rows` and `ended` of each.

        Returns `rewards` float32 [N], `replaced` bool [N], and `gold` float32 [N] where there is one.

        A reward is NaN where a completion has none (and `reward.replacement` puts nothing in its place).

        Raises:
            ValueError, TimeoutError, Exception: as of `rlhf_jax.rollout.rewards.score`.
        """
        count = len(completions.rows)
        rewards, replaced = self._score(self._reward, completions, replacement=self._replacement)
        if self._missing_eos is not None:
            rewards = penalized(rewards, completions, self._missing_eos)
        missing = int(np.isnan(rewards).sum())
        if missing and not self._warned:
            self._warned = True
            log.warning('%d of %d completions have no reward (None or NaN): they are left out of their groups and not '
                        'trained on; the metric missing_rewards counts them', missing, count)
        # Which ones were replaced does not matter to anybody; how many is logged.
        scored = {'rewards': rewards, 'replaced': np.arange(count) < replaced}
        if self._gold:
            scored['gold'] = self._score(self._gold, completions)[0]
        return scored

    def _score(self, reward: Reward, completions: Any, **how: Any) -> tuple[np.ndarray, int]:
        """As `rlhf_jax.rollout.rewards.score`, of the part of a batch that this process rewards."""
        num, alone = len(completions.rows), jax.process_count() == 1
        if isinstance(reward, RewardModel | TextClassifier) and not alone:
            # One program of all processes, which none may give up alone, nor leave out where it has no completions.
            return score(reward, completions, num=num, may_miss=True, may_miss_all=True, **how)
        if not num:
            return np.zeros(0, np.float32), 0
        # Where the main thread waits, it answers signals; a thread that makes batches is waited for elsewhere, and
        # several processes stop between two steps, together.
        waits = alone and threading.current_thread() is threading.main_thread()
        return score(reward, completions, num=num, timeout=self._timeout, may_miss=True, may_miss_all=not alone,
                     check=signals.check_late if waits else None, **how)


def penalized(rewards: np.ndarray, completions: Any, missing_eos: float) -> np.ndarray:
    """Rewards [N] with `missing_eos` in place of those of responses that do not end."""
    return np.where(completions.ended, rewards, np.float32(missing_eos))


def with_missing_eos(reward: Reward, missing_eos: float) -> Reward:
    """`reward`, penalized for responses that do not end."""
    return lambda completions: penalized(np.asarray(reward(completions)), completions, missing_eos)


def reward_name(section: Mapping[str, Any]) -> str:
    """The training reward in the notation of `reward.gold`: 'task', a folder, or 'package.module:function'.

    Raises:
        ValueError: an unknown `reward.kind`, or the field it needs is empty.
    """
    kind = section['kind']
    if kind == 'task':
        return 'task'
    checks.choice('reward.kind', kind, ('task', 'model', 'function'))
    if not section[kind]:
        raise ValueError(f'reward.{kind} is empty, but reward.kind={kind!r} needs it')
    return section[kind]


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


def find(field: str, name: str, task: Task, task_name: str, model: Callable[[str], Reward], *,
         gold: bool = False) -> Reward:
    """The reward that `name` says: 'task', a reward model's folder, or 'package.module:function'.

    Args:
        field: what the user calls it, for messages.
        model: path -> reward, for a folder.
        gold: of the task's rules, the one of what is really wanted.

    Raises:
        ValueError, FileNotFoundError: no such reward.
    """
    if name == 'task':
        rule = (task.gold or task.reward) if gold else task.reward
        if rule is None:
            raise ValueError(f'{field}: the task {task_name!r} has no rule to reward by; give a reward model '
                             '(reward.kind=model) or a function (reward.kind=function)')
        return lambda c: rule(c.texts, c.rows)
    if (storage.resolve(name) / 'config.json').exists():
        return model(name)
    function = function_of(field, name)
    return lambda c: function(c.texts, c.rows)


def function_of(field: str, name: str) -> Callable[..., Any]:
    """The function that 'package.module:function' names.

    Raises:
        ValueError, FileNotFoundError: there is none; `field` begins the message.
    """
    module, colon, attribute = name.partition(':')
    if not colon:
        raise FileNotFoundError(f'{field}: {name} is neither a folder with a config.json nor a package.module:function')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'{field}: cannot import {name} ({error})') from None


def check_code(names: Mapping[str, str], source: str, trust: bool) -> None:
    """Raises a ValueError if one of `names` ({field: reward's name}), which stand in a folder that was read, is code.

    Names of code are the user's to give, on the command line or in a config file. A folder may be anybody's.

    Args:
        source: what was read, for the message.
        trust: the user vouches for it (`--trust`).
    """
    for field, name in names.items():
        code = name not in ('', 'task') and ':' in name and not (storage.resolve(name) / 'config.json').exists()
        if code and not trust:
            raise ValueError(f'{source}: its config.json names code to run, {field}={name!r}; add --trust if you trust '
                             'whoever wrote that folder')


def check_label(section: Mapping[str, Any]) -> None:
    """Raises a ValueError where `reward.label` is given and neither reward is a classifier, which alone has labels."""
    names = [section['model'] if section['kind'] == 'model' else '', section['gold']]
    label = section.get('label', '')
    if label and not any(is_classifier(name) for name in names):
        raise ValueError(f'reward.label={label!r}: neither reward.model nor reward.gold is a BERT or '
                         'DistilBERT classifier; leave it empty')

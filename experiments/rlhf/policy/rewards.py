"""Rewards of completions as `config.reward` names them: a task's rule, a reward model, or a function of the user's."""
import dataclasses
import functools
import importlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data.tasks import Task
from experiments.rlhf.data.texts import Encoder
from experiments.rlhf.models import architecture, loading
from experiments.rlhf.models.classifier import TextClassifier, is_classifier
from experiments.rlhf.models.tokenizer import tokenizer_of
from experiments.runtime import exchange, launch, modules, partition, placement, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.programs import placed
from experiments.runtime.signals import signals
from rlhf_jax import generate as generate_lib
from rlhf_jax.models import decoder, heads
from rlhf_jax.rollout.rewards import score
from rlhf_jax.tasks import tldr

log = logging.getLogger(__name__)


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

    def part(self, which: slice) -> 'Completions':
        """Some of them."""
        return Completions(*(x[which] for x in (self.texts, self.rows, self.tokens, self.mask, self.ended)))


Reward = Callable[[Completions], np.ndarray]


class TooLong(ValueError):
    """A completion has more tokens than a reward model reads."""


def given(encode: Encoder, prompts: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]]) -> Completions:
    """The `reference` of each row as a completion of its prompt's ids, an EOS at its end."""
    replies = [[*encode.continuing(row['reference']), encode.tokenizer.eos] for row in rows]
    whole = [[*prompt, *reply] for prompt, reply in zip(prompts, replies)]
    tokens, mask = generate_lib.pad_prompts(whole, buckets=(max(map(len, whole)),), pad_token=encode.tokenizer.pad,
                                            left=False)
    return Completions([row['reference'] for row in rows], rows, tokens, mask, np.ones(len(rows), bool))


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
        """float32 [N]: the second reward, NaN where a completion has none; errors as of calling this."""
        return score(self._gold, completions, num=len(completions.rows), timeout=self._timeout, may_miss=True)[0]

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
            return shared(path, over, dtype=config.model.dtype, num_ids=num_ids, batch_size=section.batch_size)

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
        if isinstance(reward, RewardModel) and not alone:  # one program of all processes, which none may give up alone
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
    launch.check_choice('reward.kind', kind, ('task', 'model', 'function'))
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


def abstract(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, tuple[heads.RewardModel, Any]]:
    """The reward models of a run that generates on `mesh`, by path: module, and parameters as `jax.ShapeDtypeStruct`
    with shardings. One whose folder is not there is taken to be of the policy's size; classifiers are left out."""
    section, over = config.reward, mesh_lib.reshaped(mesh, config.reward.mesh)
    paths = [section.model if section.kind == 'model' else '', section.gold]
    out = {}
    for path in (path for path in paths if path not in ('', 'task') and ':' not in path):
        if is_classifier(path):
            continue
        module = architecture.reward_model(config.model)
        if (storage.resolve(path) / 'config.json').exists():
            module = loading.reward_module(path, dict(dtype=config.model.dtype))
        shapes = jax.eval_shape(
            lambda key, module=module: compact(module, module.init(key, jnp.zeros((1, 2), jnp.int32))['params']),
            jax.random.key(0))
        out[path] = module, placed(shapes, layout(module, shapes, over))
    return out


def check_label(section: Mapping[str, Any]) -> None:
    """Raises a ValueError where `reward.label` is given and neither reward is a classifier, which alone has labels."""
    names = [section['model'] if section['kind'] == 'model' else '', section['gold']]
    label = section.get('label', '')
    if label and not any(is_classifier(name) for name in names):
        raise ValueError(f'reward.label={label!r}: neither reward.model nor reward.gold is a BERT or '
                         'DistilBERT classifier; leave it empty')


def shared(path: str, mesh: Mesh, make: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """`make(path, mesh, ...)`, a `RewardModel` by default, or the same one where this process still uses it: a run that
    generates and evaluates on the same devices needs its weights but once."""
    make = make or RewardModel
    key = (make, str(path), mesh, *sorted(settings.items()))
    model = _MODELS.get(key)
    if model is None:
        model = _MODELS[key] = make(path, mesh, **settings)
    return model


_MODELS: 'weakref.WeakValueDictionary[Any, Any]' = weakref.WeakValueDictionary()


class RewardModel:
    """A reward model read at the last token of each row.

    Args:
        path: a work directory or a Hugging Face folder.
        mesh: of the devices it runs on.
        dtype: to compute in; '': as its own config says.
        num_ids: of the tokenizer that makes the rows.
        batch_size: rows it reads at once.
        before_eos: of a row that ends, read at the token before EOS, as the published gold scores were.
        step: which checkpoint of a work directory; None: the newest.

    Raises:
        FileNotFoundError, ValueError: nothing there, no reward model, or one of another tokenizer.
    """

    def __init__(self, path: str, mesh: Mesh, *, dtype: str = '', num_ids: int = 0, batch_size: int = 64,
                 before_eos: bool = False, step: int | None = None):
        module, params = loading.load_reward_model(path, dict(dtype=dtype) if dtype else None, step)
        size = module.backbone.vocab_size
        if num_ids > size:
            raise ValueError(f'{path}: the reward model has {size} tokens, the tokenizer {num_ids}; they do not belong '
                             'together')
        if batch_size < 1:
            raise ValueError(f'reward.batch_size={batch_size} must be at least 1')
        self.max_length, self._path, self._before_eos = module.backbone.max_length, path, before_eos
        shards = mesh_lib.batch_shards(mesh)
        self._rows = -(-batch_size // shards) * shards
        params = compact(module, params)
        self._params = placement.place_tree(params, layout(module, params, mesh))
        self._mesh, self._sharding = mesh, mesh_lib.batch_sharding(mesh)
        self._run = jax.jit(functools.partial(last_scores, module))

    def __call__(self, completions: Completions) -> np.ndarray:
        """Scores float32 [N] of this process's completions; all processes of the mesh call it, each with its own."""
        process = np.full(len(completions.tokens), jax.process_index(), np.int32)
        tokens, mask, ended, owners = exchange.gather_rows(
            self._mesh, (completions.tokens, completions.mask, completions.ended, process))
        if tokens.shape[1] > self.max_length:
            raise TooLong(f'{self._path}: reads at most {self.max_length} tokens, rows have {tokens.shape[1]}')
        out, back = [], ended.astype(np.int32) * self._before_eos
        with jax.set_mesh(self._mesh):
            for start in range(0, len(tokens), self._rows):
                part = [x[start:start + self._rows] for x in (tokens, mask, back)]
                padded = [np.concatenate([x, np.repeat(x[-1:], self._rows - len(x), 0)]) for x in part]
                out.append(self._run(self._params, *placement.place_tree(padded, self._sharding)))
        scores = np.concatenate(exchange.fetch(out))[:len(tokens)]
        return scores[owners == jax.process_index()]


def compact(module: heads.RewardModel, params: Any) -> Any:
    """Parameters with the backbone's matrices in the dtype that it computes in; scores do not change."""
    backbone = decoder.in_compute_dtype(params['backbone'], module.backbone.dtype)
    return dict(params) | {'backbone': backbone}


def layout(module: heads.RewardModel, params: Any, mesh: Mesh) -> Any:
    """Shardings of a reward model's parameters: by the backbone's rules, or, where these cannot divide it over `mesh`,
    whole on every device."""
    family = ml_collections.ConfigDict(dict(kind=architecture.family_name(module.backbone)))
    rules = architecture.rules(family, 'backbone')
    if modules.divisible(params, rules, mesh):
        return partition.param_shardings(params, rules, mesh)
    return jax.tree.map(lambda _: mesh_lib.replicated(mesh), params)


def last_scores(module: heads.RewardModel, params: Any, tokens: jax.Array, mask: jax.Array,
                back: jax.Array) -> jax.Array:
    """Scores float32 [N] of rows [N, T], read `back` [N] tokens before the last."""
    values = module.apply({'params': params}, tokens, mask=mask)
    return jnp.take_along_axis(values, heads.last_token(mask)[:, None] - back[:, None], 1)[:, 0]

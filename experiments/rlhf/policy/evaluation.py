"""What a trained policy is worth, and how far it has drifted, on prompts that it was not trained on.

`evaluate_policy` measures a policy that has been loaded; `HeldOutPrompts` is the hook that measures one in training.
"""
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data import tasks
from experiments.rlhf.data.texts import TooLong
from experiments.rlhf.models.classifier import TextClassifier, texts_of
from experiments.rlhf.models.inference import Policy, Progress, Prompt, Responses
from experiments.rlhf.policy import roles, rollouts
from experiments.rlhf.policy.completions import Completions, Reward
from experiments.rlhf.policy.kind import Kind
from experiments.rlhf.policy.reward_model import RewardModel
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import placement, shards
from experiments.runtime.blocks import Blocks, digest_of
from experiments.runtime.evaluation import Evaluation
from rlhf_jax.generate import Sampling
from rlhf_jax.rollout.rewards import score
from rlhf_jax.tasks import imdb, perplexity, stackexchange, tldr

log = logging.getLogger(__name__)

Metrics = dict[str, float]
Rows = Sequence[Mapping[str, Any]]


def evaluate_policy(policy: Policy, prompts: Sequence[Prompt], rows: Rows, sampling: Sampling, *, key: jax.Array,
                    num_samples: int = 1, batch_size: int = 64, task: tasks.Task | None = None,
                    reward: Reward | None = None, gold: Reward | None = None, reference: Policy | None = None,
                    human_text: str = '', progress: Callable[[str, int], Progress] | None = None,
                    place: str = '') -> tuple[Metrics, Responses]:
    """Samples `num_samples` responses to each prompt and measures them.

    Args:
        prompts: texts, or ids of those that were cut.
        rows: of the data set, one a prompt; those with a `reference` give the response to win against.
        task: whose metrics are measured too.
        reward, gold: see `rewards.find`; of rewards that are 0 or 1 there is also pass@k.
        reference: what the policy started from, of the same tokenizer: KL, and perplexity of the responses.
        human_text: on which the policy's own perplexity is its drift.
        progress: (what, how many) -> callback that takes how many are done.
        place: folder where responses and log-probabilities are written batch by batch, until somebody removes it
            (`runtime.blocks`): interrupted, the same call computes the missing ones. '': they are not written.

    Returns:
        The metrics, `length` in tokens (EOS included), and the responses. See `of_drift`, `of_text`, and `of_wins`,
        whose metrics are left out, with a warning, where a response of the data is longer than a model reads.

    Raises:
        ValueError: prompts that do not fit, rewards that are not finite.
    """
    bar = progress or (lambda what, total: None)
    responses = policy.sample(prompts, sampling, key, batch_size=batch_size, num_samples=num_samples,
                              progress=bar('sampling', len(prompts)), place=place)
    at_once = policy.rows_at_once(batch_size, len(prompts))
    completions = completions_of(responses, rows)
    out = {'num_prompts': len(prompts), 'num_samples': num_samples, 'temperature': sampling.temperature,
           'length': float(responses.mask.sum(-1).mean()), 'ended': float(responses.ended.mean())}
    if task is not None and task.metrics is not None:
        out |= task.metrics(completions.texts, completions.rows)
    for name, scorer in (('reward', reward), ('gold', gold)):
        if scorer is not None:
            scores = scores_of(scorer, completions, at_once * num_samples, bar(name, len(completions.texts)))
            out |= {name: float(scores.mean()), f'{name}_std': float(scores.std())}
            if name == 'reward':
                out |= of_passes(scores.reshape(len(prompts), num_samples))
            elif all('reference' in row for row in rows):
                try:
                    out |= of_wins(policy, prompts, rows, scores, gold, at_once)
                except TooLong as error:  # such as the second half of a whole review
                    log.warning("there is no win rate: of the data's own responses one is too long (%s)", error)
    if reference is not None:
        out |= of_drift(policy, reference, responses, batch_size=batch_size, bar=bar, place=place)
    if human_text:
        out |= of_text(policy, human_text, batch_size=batch_size, progress=bar, place=place)
    return out | of_variety(responses), responses


def completions_of(responses: Responses, rows: Rows) -> Completions:
    """The responses as rewards take them, prompt by prompt."""
    tokens, mask = responses.rows()
    texts = [text for row in responses.texts for text in row]
    return Completions(texts, [row for row in rows for _ in range(responses.num_samples)], tokens, mask,
                       responses.ended.reshape(-1))


# ---- Rewards ---------------------------------------------------------------------------------------------------------

def scores_of(reward: Reward, completions: Completions, at_once: int, progress: Progress | None = None) -> np.ndarray:
    """Rewards float32 [N] of completions, of `at_once` of them in a call; the processes of a job share the calls out.

    Raises:
        ValueError: rewards that are not finite, or not one a completion.
    """
    num = len(completions.texts)

    def of_part(part: range) -> np.ndarray:
        out = []
        for start in range(part.start, part.stop, at_once):
            some = completions.part(slice(start, min(start + at_once, part.stop)))
            out.append(score(reward, some, num=len(some.texts))[0])
            if progress:
                progress(min((start - part.start + at_once) * jax.process_count(), num))
        return np.concatenate(out)
    return shards.gathered(of_part, num, at_once)


def written(model: RewardModel | TextClassifier, place: str) -> Reward:
    """A reward that writes the scores of `model` to the folder `place`, call by call, and reads those that are there
    (`runtime.blocks`); '': the model itself."""
    if not place:
        return model
    blocks = Blocks.of(place, 'scores', model.identity())

    def scores(completions: Completions) -> np.ndarray:
        read = completions.tokens, completions.mask, completions.ended, texts_of(completions)
        return blocks.get(digest_of(*read), lambda: {'scores': np.asarray(model(completions))})['scores']
    return scores


# ---- Measures --------------------------------------------------------------------------------------------------------

def of_passes(scores: np.ndarray) -> Metrics:
    """`pass_at_k` for k = 1, 2, 4, ... and K of [N, K] rewards that are all 0 or 1, unbiased; else nothing."""
    if not np.isin(scores, (0, 1)).all():
        return {}
    num_samples = scores.shape[1]
    ks = sorted({2 ** i for i in range(num_samples.bit_length()) if 2 ** i <= num_samples} | {num_samples})
    right = scores.sum(1).astype(int)
    return {f'pass_at_{k}': float(np.mean([stackexchange.pass_at_k(num_samples, int(c), k) for c in right]))
            for k in ks}


def of_wins(policy: Policy, prompts: Sequence[Prompt], rows: Rows, scores: np.ndarray, gold: Reward,
            at_once: int = 64) -> Metrics:
    """Gold scores [N K] of the responses against those of the data's own, each with an EOS: `win_rate` counts strict
    wins, `win_ties` equal scores, `win_margin` is the mean difference. `gold` is called with `at_once` of the latter.
    """
    references = policy.given(prompts, [row['reference'] for row in rows])
    theirs = scores_of(gold, completions_of(references, rows), at_once)
    wins = tldr.win_rate(scores, np.repeat(theirs, len(scores) // len(theirs)))
    return {'win_rate': wins.win_rate, 'win_ties': wins.ties, 'win_margin': wins.margin,
            'reference_gold': float(theirs.mean())}


def of_drift(policy: Policy, reference: Policy, responses: Responses, *, batch_size: int = 64,
             bar: Callable[[str, int], Progress | None] = lambda what, total: None, place: str = '') -> Metrics:
    """How far the responses are from what `reference` would say, both at temperature 1; `place` as of
    `evaluate_policy`.

    `kl` in nats a response, `kl_per_token`; `perplexity` of the responses under the reference; and
    `legacy_kl_perplexity`, which published TL;DR tables call "KL": it divides by the prompt's tokens too, so compare it
    over the same prompts alone (`tldr.legacy_perplexity`). KL is unbiased for samples drawn at temperature 1; of others
    it is the mean log-ratio of those samples.
    """
    rows = responses.mask.shape[0] * responses.mask.shape[1]
    policy_logprobs, ref_logprobs = (
        model.logprobs(responses, batch_size=batch_size, progress=bar(what, rows), place=place).reshape(rows, -1)
        for what, model in (('policy', policy), ('reference', reference)))
    mask = responses.mask.reshape(rows, -1)
    lengths = np.repeat(responses.prompt_mask.sum(1), responses.num_samples)
    out = {name: float(x) for name, x in tldr.response_drift(policy_logprobs, ref_logprobs, mask).items()}
    return out | {'legacy_kl_perplexity': float(tldr.legacy_perplexity(ref_logprobs, mask, lengths).mean())}


def of_text(policy: Policy, text: str, *, size: int = imdb.WINDOW, stride: int = imdb.STRIDE, batch_size: int = 64,
            progress: Callable[[str, int], Progress | None] = lambda what, total: None, place: str = '') -> Metrics:
    """Perplexity of the policy on human text, read through a window of `size` tokens that moves by `stride`; `place` as
    of `evaluate_policy`.

    `drift_perplexity` is over tokens (published for IMDB); `drift_perplexity_unweighted` the mean over windows
    (published for StackExchange), in which a short last window counts as much as a full one.
    """
    tokens = np.asarray(policy.encode(text), np.int32)
    size = min(size, policy.module.max_length)
    places = perplexity.windows(len(tokens), size=size, stride=min(stride, size - 1))
    rows, mask = np.full((len(places), size), policy.tokenizer.pad, np.int32), np.zeros((len(places), size), bool)
    counted = np.zeros((len(places), size - 1), bool)  # of tokens 1, 2, ... of a row: nothing predicts the first
    for i, w in enumerate(places):
        rows[i, :w.end - w.begin], mask[i, :w.end - w.begin] = tokens[w.begin:w.end], True
        counted[i, w.first - w.begin - 1:w.end - w.begin - 1] = True
    logprobs = policy.token_logprobs(rows, mask, size - 1, batch_size=batch_size,
                                     progress=progress('human text', len(rows)), place=place)
    sums, counts = -np.where(counted, logprobs, 0).sum(1, dtype=np.float64), counted.sum(1)
    return {'drift_perplexity': perplexity.perplexity(sums, counts),
            'drift_perplexity_unweighted': perplexity.perplexity(sums, counts, weighted=False)}


def human_text(task: tasks.Task, data: Mapping[str, Any], split: str, num_rows: int) -> str:
    """The first `num_rows` demonstrations of a split as one text for `of_text`."""
    demonstrations = tasks.require(task, 'demonstrations', data)(data, split)
    return imdb.drift_text(''.join(map(str, parts)) for parts in demonstrations[:num_rows])


def of_variety(responses: Responses) -> Metrics:
    """`distinct_n`, `entropy_n` and `msttr` over all responses, by words, as far as they have words enough; of several
    samples `distinct_samples`, the share of different ones among those of a prompt."""
    flat = [text for row in responses.texts for text in row]
    longest = max(len(text.split()) for text in flat)
    out = imdb.diversity(flat, orders=tuple(n for n in (1, 2, 3) if n <= longest))
    if responses.num_samples > 1:
        out['distinct_samples'] = float(np.mean([len(set(row)) / len(row) for row in responses.texts]))
    return out


# ---- In training -----------------------------------------------------------------------------------------------------

def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for an evaluation in training that means nothing."""
    for name, least in (('eval_every', 0), ('eval_prompts', 1)):
        if config[name] < least:
            raise ValueError(f'{name}={config[name]} must be at least {least}')


class HeldOutPrompts(Evaluation):
    """The current policy on the first `eval_prompts` held-out prompts in a fixed order, sampled and rewarded as in
    training; `eval_reward`, `eval_kl`, ... as a row of metrics. Its draws do not depend on those of training.

    Args:
        kind: of the policy.
        measure: (state, batch) -> {name: [B]}, means over a prompt's completions.
        columns: fields of a batch that it reads.
        writer: None: nothing is written.
        published: version -> weights for decoding of it, where they are on these devices already; else None.
    """

    def __init__(self, kind: Kind, config: ml_collections.ConfigDict, mesh: Mesh,
                 measure: Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]], columns: Sequence[str],
                 writer: Any, *, published: Callable[[int], Any] = lambda version: None):
        super().__init__(config.eval_every, config.num_steps, writer)
        heldout = kind.held_out(config)
        # Where the learner's devices generate, they are evaluated on as they generate.
        apart = config.rollout.devices or config.rollout.transport != 'devices'
        sampling = mesh if apart else roles.generator_mesh(config, mesh)
        parts = math.lcm(mesh_lib.batch_shards(mesh) * config.accumulate * config.algorithm.num_minibatches,
                         mesh_lib.batch_shards(sampling))
        heldout.batch_size = min(-(-config.eval_prompts // parts) * parts, config.batch_size)
        self._config, self._mesh, self._columns = heldout, mesh, columns
        self._generate, self._published = kind.generator(heldout, sampling, None), published
        self._num = min(config.eval_prompts, self._generate.num_prompts)
        self._generate.prepare(self._num)
        decoding = kind.decoding(heldout, sampling)
        self._convert = rollouts.snapshots(decoding, sampling, mesh)
        self._measure = jax.jit(measure, out_shardings=mesh_lib.replicated(mesh))

    def measure(self, state: Any) -> Metrics:
        """`eval_...` metrics of the policy in `state`."""
        size = self._config.batch_size
        parts: list[dict[str, np.ndarray]] = []
        batches, rows = [], []
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            weights = self._published(int(state.step))
            if weights is None:
                weights = self._convert(rollouts.sampler_params(state))
            for index in range(-(-self._num // size)):
                keep = min(size, self._num - index * size)  # prompts of the next epoch fill the last batch up
                batch = self._generate(weights, index=index, version=0)
                placed = placement.place_tree({name: batch[name] for name in self._columns if name in batch},
                                              mesh_lib.batch_sharding(self._mesh))
                measured = {name: batch[name] for name in ('rewards', 'gold', 'ended', 'replaced') if name in batch}
                measured |= {'length': batch['mask'].sum(-1)} | jax.device_get(self._measure(state, placed))
                parts.append({name: x[:keep] for name, x in measured.items()})
                batches.append({name: x[:keep] for name, x in batch.items()})
                rows += self._generate.rows(index)[:keep]
        out = {name: float(np.nanmean(np.concatenate([part[name] for part in parts]))) for name in parts[0]}
        out |= {'reward': out.pop('rewards'), 'kl_per_token': out['kl'] / out['length']}
        out |= self._generate.measures(batches, rows)
        return {f'eval_{name}': value for name, value in out.items()}

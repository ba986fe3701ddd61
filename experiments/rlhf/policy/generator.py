"""What a generator makes: prompts, completions and rewards, each batch a function of its index and of the weights."""
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data import tasks
from experiments.rlhf.data import texts as text_arrays
from experiments.rlhf.models import architecture
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.policy import completions as completions_lib
from experiments.rlhf.policy import rewards, waves
from experiments.rlhf.policy.models import carries_stop_tokens, sampler_module, sampling_of
from experiments.runtime import exchange, partition, placement
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.stream import EpochOrder
from rlhf_jax import generate as generate_lib
from rlhf_jax import refill, responses
from rlhf_jax.models import decoder, lora

log = logging.getLogger(__name__)


# ---- Weights for decoding --------------------------------------------------------------------------------------------

class SamplerWeights:
    """A policy's weights as a sampler wants them: adapter merged, matrices in compute dtype, a tree a block.

    Args:
        stacked: the decoder of the policy's parameters.
        init: key -> these parameters.
        rules: their partition rules.
        adapted: whether they hold an adapter.
        mesh: of the devices that generate.

    Attributes:
        module: the decoder for such weights.
        convert: the policy's parameters -> such weights.
        shapes, shardings: of such weights, on the generators' mesh.
    """

    def __init__(self, stacked: Any, init: Callable[[jax.Array], Any], rules: partition.Rules, adapted: bool,
                 mesh: Mesh):
        self.module = stacked.clone(stacked=False)

        def convert(policy):
            plain = lora.merge(policy) if adapted else policy
            return decoder.split_blocks(stacked, plain, dtype=stacked.dtype)[1]

        self.convert = jax.jit(convert)
        self.shapes = jax.eval_shape(convert, jax.eval_shape(init, jax.random.key(0)))
        self.shardings = partition.param_shardings(self.shapes, decoder.split_rules(rules), mesh)


class Decoding(SamplerWeights):
    """The weights of a policy that is a decoder; with `algorithm.mask`, those of `{'policy': ..., 'mask': ...}`."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        super().__init__(architecture.decoder(config.model), architecture.init_decoder(config),
                         architecture.rules(config.model), bool(config.lora.rank), mesh)
        if config.algorithm.mask.top_p:
            both = lambda x: {'policy': x, 'mask': x}
            self.module, convert = sampler_module(config), self.convert
            self.convert = jax.jit(lambda weights: {name: convert(weights[name]) for name in ('policy', 'mask')})
            self.shapes, self.shardings = both(self.shapes), both(self.shardings)


# ---- Batches ---------------------------------------------------------------------------------------------------------

class Batches:
    """`Generate` of a `RolloutStream`: batch `index` of the run, its prompts in an order that the seed gives.

    A kind of policy says in `complete` how prompts are completed and rewarded.

    Args:
        rows: of the data set, one a prompt.
        mesh: of the devices that generate.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, rows: Sequence[Mapping[str, Any]]):
        self._config, self._mesh, self._rows = config, mesh, rows
        self._order = EpochOrder(len(rows), config.seed)
        shards = mesh_lib.batch_shards(mesh)
        if config.batch_size % shards:
            raise ValueError(f'batch_size={config.batch_size} prompts are not divisible by the {shards} generating '
                             'shards (rollout.mesh data x fsdp); use a multiple')

    @property
    def num_prompts(self) -> int:
        return len(self._rows)

    def rows(self, index: int) -> list[Mapping[str, Any]]:
        """Of the data set, one for each of the B prompts of batch `index`."""
        return [self._rows[i] for i in self._order(self._draws(index))]

    def prepare(self, num: int) -> None:
        """Nothing has to be known of the first `num` prompts before they are measured."""

    def _draws(self, index: int) -> np.ndarray:
        return index * self._config.batch_size + np.arange(self._config.batch_size)

    def complete(self, params: Any, version: int, prompts: np.ndarray, draws: np.ndarray,
                 keys: jax.Array) -> dict[str, np.ndarray]:
        """A rollout batch [B, K, ...], see `rlhf_jax.rollout.batch`.

        Where several processes generate, all of them call it with the same arguments and return the whole batch:
        `placement.place_tree` lays out what all have, `exchange.fetch` collects what was drawn, `exchange.portion` says
        whose completions this process decodes and rewards, and `exchange.gather_rows` puts the rewards together.

        Args:
            params: of `version`, as the kind's `decoding` converted them.
            prompts: int [B], which of the data set.
            draws: int [B], their positions in the run.
            keys: typed keys [B, K], one a completion.
        """
        raise NotImplementedError

    def __call__(self, params: Any, *, index: int, version: int) -> dict[str, np.ndarray]:
        """A batch of B prompts and K completions of each, [B, K, ...]: see `rlhf_jax.rollout.batch`."""
        # All of it, keys and reward models too: without a thread of its own this runs under the learner's mesh.
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            draws = self._draws(index)
            # By the draw, not the prompt: one that comes twice (a small set, the seam of two epochs) is answered anew.
            keys = responses.sample_keys(jax.random.key(self._config.seed), draws, self._config.algorithm.num_samples,
                                         version)
            return self.complete(params, version, self._order(draws), draws, keys)


class Generator(Batches):
    """`Batches` of a decoder, under weights that `Decoding` converted.

    Args:
        mesh: of the devices that generate.
        weights: the transport, asked for newer weights on the way where `rollout.chunk` is set.

    Raises:
        ValueError, OSError: data, tokenizer or rewards that do not fit, before anything is compiled.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, weights: Any = None):
        encode = tokenizer_lib.encoder_of(config)
        tokenizer_lib.check_stages(config, encode)
        self._weights = weights
        self.tokenizer = encode.tokenizer
        self._module = sampler_module(config, tuple(self.tokenizer.stops))
        self.task = tasks.get(config.data, encode)
        self._prompts, rows = prompts_of(config, self.task, encode, config.data.split)
        if jax.process_count() > 1:
            exchange.check_same(mesh, json.dumps(self._prompts).encode(), 'data: the processes of this job read '
                                'different prompts; give all of them the same files and tokenizer')
        self._scorer = rewards.Scorer.of(config, self.task, mesh)
        self._sampling = sampling_of(config, tuple(self.tokenizer.stops), self.tokenizer.pad)
        self._buckets = tuple(config.sampling.buckets) or (config.sampling.max_prompt,)
        self._encode, self._reference_gold = encode, None
        super().__init__(config, mesh, rows)
        self._waves = waves.count(config, mesh)

    def complete(self, params, version, prompts, draws, keys):
        tokens, mask = generate_lib.pad_prompts([self._prompts[i] for i in prompts], buckets=self._buckets,
                                                pad_token=self.tokenizer.pad)
        drawn, versions = self._draw(params, version, tokens, mask, keys)
        batch = finish(self.tokenizer, self._scorer, tokens, mask, drawn, [self._rows[i] for i in prompts],
                       self._mesh)
        if carries_stop_tokens(self._config):
            stops = np.array(self._sampling.stop_tokens, np.int32)
            batch['stop_tokens'] = np.broadcast_to(stops, (*drawn.mask.shape[:2], len(stops))).copy()
        return batch | versions

    def measures(self, batches: Sequence[Mapping[str, np.ndarray]],
                 rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Of the responses in `batches`, whose prompts have `rows`: the task's metrics, where it has some, and how
        often they win against the data's own, where `prepare` has scored those."""
        wins = {}
        if self._reference_gold is not None and batches:
            wins = rewards.wins(np.concatenate([batch['gold'] for batch in batches]), self._reference_gold)
        if self.task.metrics is None:
            return wins
        texts, of_texts = [], iter(rows)
        rows_of_texts = []
        for batch in batches:
            num_prompts, num_samples, length = batch['mask'].shape
            flat = lambda x: x.reshape(num_prompts * num_samples, -1)
            texts += text_arrays.decoded(self.tokenizer, flat(batch['tokens'][..., -length:]), flat(batch['mask']),
                                         flat(batch['tokens'][..., :-length]), flat(batch['prompt_mask']))[0]
            rows_of_texts += [row for _, row in zip(range(num_prompts), of_texts) for _ in range(num_samples)]
        return self.task.metrics(texts, rows_of_texts) | wins

    def prepare(self, num: int) -> None:
        """Scores the data's own responses to the first `num` prompts by the gold reward, if there are both and it can
        read them."""
        which = self._order(np.arange(num))
        rows = [self._rows[i] for i in which]
        if self._scorer.has_gold and all(isinstance(row.get('reference'), str) for row in rows):
            try:
                with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
                    own = completions_lib.given(self._encode, [self._prompts[i] for i in which], rows).part(
                        exchange.portion(self._mesh, num))
                    gold = exchange.gather_rows(self._mesh, {'gold': self._scorer.gold(own)})
                self._reference_gold = gold['gold']
            except text_arrays.TooLong as error:
                log.warning('evaluation has no win rate: of the data\'s own responses one is too long (%s)', error)

    def _draw(self, params, version, tokens, mask, keys):
        rollout, num_samples = self._config.rollout, self._config.algorithm.num_samples
        if not (rollout.chunk or rollout.slots):
            parts, over, size = [], mesh_lib.batch_sharding(self._mesh), len(tokens) // self._waves
            for first in range(0, len(tokens), size):
                wave: Any = tokens, mask, keys
                if self._waves > 1:
                    wave = tuple(x[first:first + size] for x in wave)
                wave = placement.place_tree(wave, over)
                drawn = generate_lib.generate(self._module, params, *wave, self._sampling, num_samples=num_samples)
                parts.append(exchange.fetch(drawn))  # before the next wave takes memory of its own
            return jax.tree.map(lambda *parts: np.concatenate(parts), *parts), {}
        current = [params, version]

        def newest():
            published = self._weights.newest() if rollout.chunk else None
            if published is not None and published > current[1]:
                current[:] = self._weights.fetch(published), published
            return tuple(current)
        drawn = refill.generate_refilled(self._module, newest, tokens, mask, keys, self._sampling,
                                         slots=rollout.slots or keys.size, chunk=rollout.chunk or refill.CHUNK,
                                         num_samples=num_samples, shards=mesh_lib.batch_shards(self._mesh))
        drawn = jax.device_get(drawn)
        # Past the end of a response no version is meant; the newest there is keeps minima over tokens right.
        return drawn, {'policy_version': np.where(drawn.mask, drawn.versions, current[1]).astype(np.int32)}


def prompts_of(config: ml_collections.ConfigDict, task: tasks.Task, encode: text_arrays.Encoder,
               split: str) -> tuple[list[list[int]], list[Mapping[str, Any]]]:
    """Tokens and rows of the prompts that fit `sampling.max_prompt`.

    Raises:
        ValueError: the task has no prompts, one is empty or ends in EOS, or none fits.
    """
    prompts = tasks.require(task, 'prompts', config.data)(config.data, split)
    longest = config.sampling.max_prompt
    text_arrays.count_spelled(encode, (prompt.text for prompt in prompts), 'data')
    tokens, rows = [], []
    for i, prompt in enumerate(prompts):
        ids = list(encode(prompt.text))
        if not ids or ids[-1] == encode.tokenizer.eos:
            raise ValueError(f'data: prompt {i} ' + ('has no token' if not ids else 'ends in the EOS token'))
        if task.cut_prompts:
            ids = encode.cut(ids, longest)
        if len(ids) <= longest:
            tokens.append(ids)
            rows.append({'prompt': str(prompt.text)} | dict(prompt.row))
    if len(tokens) < len(prompts):
        log.warning('%d of %d prompts are longer than sampling.max_prompt=%d tokens and left out',
                    len(prompts) - len(tokens), len(prompts), longest)
    if not tokens:
        raise ValueError(f'sampling.max_prompt={longest}: none of {len(prompts)} prompts is that short; raise it')
    return tokens, rows


def finish(tokenizer: Any, scorer: rewards.Scorer, prompts: np.ndarray, prompt_mask: np.ndarray,
           samples: generate_lib.Samples, rows: Sequence[Mapping[str, Any]], mesh: Mesh) -> dict[str, np.ndarray]:
    """A rollout batch: completions, each with its prompt, and their rewards.

    Each process of `mesh` decodes and rewards the completions of some prompts, in the order of the batch, and all get
    the whole.

    Args:
        prompts, prompt_mask: int32 and bool [B, P].
        samples: arrays [B, K, L].
        rows: of the data set, B.

    Returns:
        Arrays [B, K, ...]; see `rlhf_jax.rollout.batch`.
    """
    num_prompts, num_samples = samples.mask.shape[:2]
    for_each_sample = lambda x: np.repeat(x[:, None], num_samples, 1)
    tokens = np.concatenate([for_each_sample(prompts), samples.tokens], -1)
    prompt_mask = for_each_sample(prompt_mask)
    mask = np.concatenate([prompt_mask, samples.mask], -1)
    dealt = exchange.portion(mesh, num_prompts)
    own = lambda x: x[dealt].reshape(-1, x.shape[-1])  # rewards are of a list of completions
    texts, ended = text_arrays.decoded(tokenizer, own(samples.tokens), own(samples.mask),
                                       np.repeat(prompts[dealt], num_samples, 0), own(prompt_mask))
    scored = scorer(completions_lib.Completions(
        texts, [row for row in rows[dealt] for _ in range(num_samples)], own(tokens), own(mask), ended))
    scored = exchange.gather_rows(mesh, scored | {'ended': ended})
    grouped = {name: x.reshape(num_prompts, num_samples) for name, x in scored.items()}
    return {'tokens': tokens, 'prompt_mask': prompt_mask, 'mask': samples.mask, 'logprobs': samples.logprobs} | grouped

"""Where a policy's batches come from: prompts, samples and rewards on the generating devices, and the stream of them.

One code path for every way to run: synchronously (max_staleness=0), from earlier weights on devices of their own
(max_staleness=S, devices=n), or with generators in processes of their own (transport='files' or 'transfer', and
`python -m experiments.generate`). A batch is a function of its index and of the weights alone, so they all give the
same batches for the same versions.
"""
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data import tasks
from experiments.rlhf.data import texts as text_arrays
from experiments.rlhf.models import architecture
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.rlhf.policy import rewards, waves
from experiments.rlhf.policy.kind import Kind
from experiments.rlhf.policy.models import carries_stop_tokens, sampling_of
from experiments.runtime import exchange, launch, partition, placement, storage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.signals import GRACE_SECONDS, Interrupted, signals
from experiments.runtime.stream import EpochOrder
from rlhf_jax import generate as generate_lib
from rlhf_jax import refill, responses
from rlhf_jax.models import decoder, lora
from rlhf_jax.rollout import batch as batch_lib
from rlhf_jax.rollout import processes, publish
from rlhf_jax.rollout.stream import RolloutStream

log = logging.getLogger(__name__)

TRANSPORTS = ('devices', 'files', 'transfer')


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for rollout settings that cannot work, before any data is read."""
    rollout = config.rollout
    if rollout.max_staleness < 0:
        raise ValueError(f'rollout.max_staleness={rollout.max_staleness} must be at least 0')
    launch.check_choice('rollout.transport', rollout.transport, TRANSPORTS)
    if rollout.devices and rollout.transport != 'devices':
        raise ValueError(f'rollout.devices={rollout.devices}: with rollout.transport={rollout.transport!r} generators '
                         'have devices of their own process; set it to 0')
    for name in ('devices', 'chunk', 'slots', 'memory', 'timeout'):
        if rollout[name] < 0:
            raise ValueError(f'rollout.{name}={rollout[name]} must be at least 0')
    host, colon, port = rollout.address.rpartition(':')
    if not (host and colon and port.isdigit()):
        raise ValueError(f'rollout.address={rollout.address!r} must be host:port, with port 0 for any that is free')
    if host in ('0.0.0.0', '[::]'):
        raise ValueError(f'rollout.address={rollout.address!r} is no address that generators can be told; give the one '
                         'of this machine in the network that they share with it')
    if rollout.num_generators < 1:
        raise ValueError(f'rollout.num_generators={rollout.num_generators} must be at least 1')
    if rollout.chunk and not rollout.max_staleness:
        raise ValueError(f'rollout.chunk={rollout.chunk} looks for newer weights while generating, but with '
                         'rollout.max_staleness=0 none come meanwhile; set one of them')
    if rollout.chunk and not rollout.threaded:
        raise ValueError('rollout.threaded=False generates in the loop, where no newer weights can come; set '
                         'rollout.chunk=0')
    if jax.process_count() > 1:
        check_processes(rollout)


def check_processes(rollout: ml_collections.ConfigDict) -> None:
    """Raises a ValueError for what one process can do and several cannot."""
    count = jax.process_count()
    if rollout.slots:
        raise ValueError(f'rollout.slots={rollout.slots} of {count} processes: which rows have ended is read between '
                         'chunks by one process that has them all; set it to 0')
    if rollout.timeout:
        raise ValueError(f'rollout.timeout={rollout.timeout} of {count} processes: none may give up a batch that the '
                         'others wait for; bound the reward instead (reward.timeout) and set it to 0')
    if rollout.transport == 'transfer':
        raise ValueError(f"rollout.transport='transfer' goes from one process to one, here are {count}; use 'files', "
                         'or hosts apart in one job (rollout.devices)')
    if not rollout.devices:
        return
    for name in ('newest', 'chunk'):
        if rollout[name]:
            raise ValueError(f'rollout.{name}={rollout[name]} with hosts apart: weights pass between two batches, at a '
                             f'place that both sides know beforehand; leave it at its default')
    devices = jax.devices()
    generating = {device.process_index for device in devices[len(devices) - rollout.devices:]}
    split = generating & {device.process_index for device in devices[:len(devices) - rollout.devices]}
    if split:
        raise ValueError(f'rollout.devices={rollout.devices} divides the devices of process {min(split)}: of several '
                         f'processes whole ones generate; use a multiple of its {jax.local_device_count()} devices')


def learner_devices(config: ml_collections.ConfigDict,
                    devices: Sequence[jax.Device] | None = None) -> list[jax.Device]:
    """Devices that train, of `devices` (default: all there are): all but the last `rollout.devices`.

    Raises:
        ValueError: none would be left.
    """
    devices, generating = list(jax.devices() if devices is None else devices), config.rollout.devices
    if generating >= len(devices):
        raise ValueError(f'rollout.devices={generating} leaves none of {len(devices)} devices to the learner; 0 shares '
                         'them')
    return devices[:len(devices) - generating]


def generator_mesh(config: ml_collections.ConfigDict, learner: Mesh | None = None,
                   devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the devices that generate, of `devices` (default: all there are); the learner's own unless
    `rollout.devices` sets some apart."""
    devices = list(jax.devices() if devices is None else devices)
    if config.rollout.devices:
        devices = devices[-config.rollout.devices:]
    elif learner is not None:
        return mesh_lib.reshaped(learner, config.rollout.mesh)
    return mesh_lib.make_mesh(config.rollout.mesh, devices)


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
    """The weights of a policy that is a decoder."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        super().__init__(architecture.decoder(config.model), architecture.init_decoder(config),
                         architecture.rules(config.model), bool(config.lora.rank), mesh)


@functools.lru_cache(maxsize=8)
def snapshots(decoding: Any, generating: Mesh, learner: Mesh) -> Callable[[Any], Any]:
    """`decoding.convert` whose results share no buffer with the policy's parameters. Over the learner's own devices
    they come in the generators' layout, else in one that is the compiler's to choose, from which they travel."""
    together = np.array_equal(generating.devices.flat, learner.devices.flat)
    # A result that is an argument would be the argument's buffer.
    return jax.jit(lambda policy: jax.tree.map(jnp.copy, decoding.convert(policy)),
                   out_shardings=decoding.shardings if together else None)


def share_of(mesh: Mesh) -> processes.Share:
    """What the first process of `mesh` gives, in all of its processes."""
    return lambda payload: exchange.broadcast(mesh, payload, exchange.processes_of(mesh)[0])


def open_weights(config: ml_collections.ConfigDict, shardings: Any, shapes: Any, folder: Any, *,
                 reader: int = 0, address: str = '') -> Any:
    """The transport that `rollout.transport` names.

    Args:
        address: of this end of a transfer; '': `rollout.address`, the learner's.
    """
    rollout = config.rollout
    keep, timeout = rollout.max_staleness + 1, rollout.timeout or None
    if rollout.transport == 'devices':
        return publish.InProcess(shardings, timeout=timeout, snapshots=True)
    if rollout.transport == 'files':
        return publish.Files(folder / 'weights', shardings, keep=keep, timeout=timeout)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return publish.Transfer(folder / 'weights', like, num_readers=rollout.num_generators, reader=reader, keep=keep,
                            address=address or rollout.address, timeout=timeout)


# ---- The generator ---------------------------------------------------------------------------------------------------

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
        self._module = architecture.decoder(config.model).clone(stacked=False)
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
        if carries_stop_tokens(self._sampling):
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
                    own = rewards.given(self._encode, [self._prompts[i] for i in which], rows).part(
                        exchange.portion(self._mesh, num))
                    gold = exchange.gather_rows(self._mesh, {'gold': self._scorer.gold(own)})
                self._reference_gold = gold['gold']
            except rewards.TooLong as error:
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
    scored = scorer(rewards.Completions(texts, [row for row in rows[dealt] for _ in range(num_samples)], own(tokens),
                                        own(mask), ended))
    scored = exchange.gather_rows(mesh, scored | {'ended': ended})
    grouped = {name: x.reshape(num_prompts, num_samples) for name, x in scored.items()}
    return {'tokens': tokens, 'prompt_mask': prompt_mask, 'mask': samples.mask, 'logprobs': samples.logprobs} | grouped


# ---- The stream ------------------------------------------------------------------------------------------------------

class Rollouts:
    """A `RolloutStream` as the runner's loop knows streams; `publish` hands it the weights of every new state.

    Args:
        convert: the policy's parameters -> weights for decoding.
        mesh: of the learner; batches are laid out over it.
        num_steps: of the run; nothing is published after the last.
        vocab_size: ids of the policy; a batch with others (a generator of another model, a damaged file) is refused.
        held: the transport, where what was published is on devices of this process.
    """

    def __init__(self, stream: RolloutStream, convert: Callable[[Any], Any], mesh: Mesh, num_steps: int,
                 vocab_size: int | None = None, held: publish.InProcess | None = None):
        self._stream, self._convert, self._num_steps, self._vocab_size = stream, convert, num_steps, vocab_size
        self._sharding, self._held = mesh_lib.batch_sharding(mesh), held
        self._failed = False

    def publish(self, version: int, state: Any) -> None:
        """Before the first batch, and after every step but the last."""
        if version < self._num_steps:
            self._stream.publish(version, self._convert(state.params['policy']))

    def published(self, version: int) -> Any:
        """Weights for decoding of that version where they were the last to be published, and are here; else None."""
        return self._held.fetch(version) if self._held is not None and self._held.newest() == version else None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the batch handed out last: `rollout_staleness` in versions, `rollout_..._seconds` of waits and work."""
        counts = ('staleness', 'in_flight')
        return {f'rollout_{name}' if name in counts else f'rollout_{name}_seconds': value
                for name, value in self._stream.metrics.items()}

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        try:
            batch = next(self._stream)
            batch_lib.check(batch, 'a rollout batch', self._vocab_size)
            return placement.place_tree(batch, self._sharding)
        except Interrupted:
            raise
        except Exception:
            self._failed = True
            raise

    def get_state(self) -> dict:
        return self._stream.get_state(self._patience())

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._stream.set_state(state)

    def _patience(self) -> float | None:
        """Seconds to wait for a batch that is being made: as long as it takes, unless the run has been asked to stop,
        or has failed over it already."""
        if self._failed:
            return 0.0
        return None if signals.received is None else GRACE_SECONDS

    def finish(self) -> None:
        """Sends generators elsewhere home for good: the run is over and saved."""
        self._stream.finish()

    def close(self) -> None:
        self._stream.close(self._patience())


def open_rollouts(kind: Kind, config: ml_collections.ConfigDict, mesh: Mesh, workdir: str | os.PathLike) -> Rollouts:
    """The stream of a learner of a policy of `kind` on `mesh` that generates too, or has batches come through
    `workdir/rollouts`."""
    rollout = config.rollout
    if rollout.transport != 'devices' and storage.is_remote(workdir):
        raise ValueError(f'--workdir={workdir}: rollout.transport={rollout.transport!r} needs a folder that all '
                         'processes see')
    generating = generator_mesh(config, mesh)
    decoding = kind.decoding(config, generating)
    weights = open_weights(config, decoding.shardings, decoding.shapes, storage.resolve(workdir) / 'rollouts')
    if rollout.transport == 'devices':
        generate = kind.generator(config, generating, weights)
    else:
        generate = weights = processes.Remote(storage.resolve(workdir) / 'rollouts' / 'batches', weights,
                                              max_staleness=rollout.max_staleness, share=share_of(mesh))
    # Two threads that each start programs over several devices, the same ones, can leave those waiting for each other.
    shared = rollout.transport == 'devices' and not rollout.devices and mesh.devices.size > 1
    if shared and rollout.chunk:
        raise ValueError(f'rollout.chunk={rollout.chunk} takes up weights while others are trained, which needs '
                         'devices of its own; set rollout.devices')
    if shared and rollout.max_staleness:
        log.warning('rollout.max_staleness=%d with rollout.devices=0: batches come from earlier weights, but are made '
                    'and trained on in turn; set devices apart to do both at once', rollout.max_staleness)
    # What comes from elsewhere is shared among several processes by a program, which keeps its place among the others.
    late = rollout.transport != 'devices' and jax.process_count() > 1
    threaded = rollout.threaded and not shared and not late
    stream = RolloutStream(generate, weights, max_staleness=rollout.max_staleness, threaded=threaded, late=late,
                           newest=rollout.newest, num_batches=config.num_steps, timeout=rollout.timeout or None,
                           check=signals.check if jax.process_count() == 1 else None)  # several stop between two steps
    convert, held = decoding.convert, None
    if rollout.transport == 'devices':
        convert, held = snapshots(decoding, generating, mesh), weights
    return Rollouts(stream, convert, mesh, config.num_steps, kind.num_tokens(config), held)

"""What training on given texts has in common, whatever its loss: weights to start from, adapters, held-out metrics."""
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.data import lengths, tasks, texts
from experiments.rlhf.models import adapters, architecture, loading
from experiments.rlhf.models import tokenizer as tokenizer_lib
from experiments.runtime import evaluation, optim, placement, processes
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.state import TrainState
from rlhf_jax.models import lora

log = logging.getLogger(__name__)

Params = dict[str, Any]
Metrics = dict[str, jax.Array]
Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Objective:
    """One way to train on texts.

    Attributes:
        init: key -> fresh parameters, without adapter.
        loss: (params, reference, batch) -> (loss, metrics), means over the batch.
        rows: (params, reference, batch) -> {name: [B]}, from which `reduce` makes the metrics of any number of rows.
        reduce: {name: [N]} -> metrics, among them `loss`.
        open: (config, split) -> arrays of the whole split.
        batch: shapes and dtypes of a batch at its longest; batches may have shorter rows, and packed ones fewer.
        prepare: batch -> batch, before it is cut into microbatches.
        prefix: where the decoder's parameters sit.
        trained: regexes of parameters that are trained beside an adapter.
        keeps_reference: whether `loss` is given the parameters that training started from.
    """
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Params | None, Mapping[str, Any]], tuple[jax.Array, Metrics]]
    rows: Callable[[Params, Params | None, Mapping[str, Any]], Metrics]
    reduce: Callable[[Mapping[str, Any]], Metrics]
    open: Callable[[Config, str], texts.Arrays]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch
    prefix: str = ''
    trained: tuple[str, ...] = ()
    keeps_reference: bool = False


def build(config: Config, mesh: Mesh, objective: Objective) -> Experiment:
    """The experiment that minimises `objective`.

    With `config.lora.rank` only the adapter (and `objective.trained`) is differentiated and has moments; the reference
    is then the same parameters without their adapter, else a copy, in `state.extra['reference']`.

    Raises:
        ValueError: texts longer than the model's context.
    """
    config = tokenizer_lib.settled(config)
    limit = architecture.decoder(config.model).max_length
    if config.max_length > limit:
        raise ValueError(f'max_length={config.max_length} exceeds the context of the model, model.max_length={limit}')
    evaluation.check_every(config)
    lengths.check(config)
    shards, adapted = mesh_lib.batch_shards(mesh), config.lora.rank > 0
    dropout = config.lora.get('dropout', 0.0)
    if not 0 <= dropout < 1:
        raise ValueError(f'lora.dropout={dropout} must be in [0, 1)')
    if dropout and not adapted:
        raise ValueError(f'lora.dropout={dropout}: there is no adapter to drop inputs of; set lora.rank')

    def init_params(key):
        return architecture.with_adapter(config, objective.init(key), jax.random.fold_in(key, 1))

    def divide(params):
        return adapters.divide(params, objective.trained) if adapted else ({}, params)

    def reference(params, extra):
        if not objective.keeps_reference:
            return None
        return jax.lax.stop_gradient(lora.without(params) if adapted else extra['reference'])

    shapes = jax.eval_shape(init_params, jax.random.key(0))
    tx = optim.adamw(config.optimizer, divide(shapes)[1], config.num_steps)

    def init(key):
        key, carried = jax.random.split(key)
        params = init_params(key)
        extra = {'reference': jax.tree.map(jnp.copy, params)} if objective.keeps_reference and not adapted else None
        return TrainState(jnp.int32(0), params, tx.init(divide(params)[1]), None, carried, extra)

    def loss(params, state, batch, rng):
        ref = reference(params, state.extra)
        if dropout:
            params = lora.with_dropout(rng, params, dropout)
        return objective.loss(params, ref, batch)

    def step(state, batch):
        frozen, trained = divide(state.params)
        # A packed batch has fewer rows: as many less microbatches, of the size that all have.
        rows = len(next(iter(batch.values())))
        accumulate = rows // (config.batch_size // config.accumulate)
        (value, metrics), grads = optim.value_and_grad(
            lambda p, b, r: loss(lora.join(frozen, p), state, b, r), trained, objective.prepare(dict(batch)),
            jax.random.fold_in(state.rng, state.step), accumulate, shards)
        trained, opt_state, norm = optim.apply(tx, grads, state.replace(params=trained))
        return (state.replace(step=state.step + 1, params=lora.join(frozen, trained), opt_state=opt_state),
                metrics | {'loss': value, 'grad_norm': norm})

    def check_inputs():
        tokenizer_lib.tokenizer_of(config)
        if config.weights:
            loading.check_decoder(config.weights, config)

    def warm_start(state):
        loaded = loading.load_decoder(config.weights, config, mesh)
        params = loading.filled(state.params, {objective.prefix: loaded} if objective.prefix else loaded)
        extra = state.extra
        if extra is not None:  # a copy: both are donated to the step
            extra = {'reference': jax.tree.map(lambda x: jnp.array(x, copy=True), params)}
        log.info('starting from %s', config.weights)
        return state.replace(params=params, extra=extra)

    def hooks(writer):
        if not config.eval_every:
            return ()
        return (HeldOutTexts(config, mesh, objective.open(config, config.data.heldout),
                        lambda state, batch: objective.rows(state.params, reference(state.params, state.extra), batch),
                        objective.reduce, writer),)

    def open_batches():
        return texts.batches(objective.open(config, config.data.split), config, placement.share_of(mesh))

    rules = architecture.rules(config.model, objective.prefix)
    return Experiment(init, loss, step, rules, objective.batch, open_batches, check=check_inputs,
                      warm_start=warm_start if config.weights else None, hooks=hooks, config=config)


class HeldOutTexts(evaluation.Evaluation):
    """Metrics over all held-out rows, as `heldout_NAME`."""

    def __init__(self, config: Config, mesh: Mesh, arrays: texts.Arrays, rows: Callable[[TrainState, Any], Metrics],
                 reduce: Callable[[Mapping[str, Any]], Metrics], writer: Any):
        super().__init__(config.eval_every, config.num_steps, writer)
        self._mesh, self._arrays, self._size = mesh, arrays, config.batch_size // config.accumulate
        self._lengths = lengths.lengths(config.max_length, config.length_buckets)
        self._row_lengths = lengths.row_lengths(arrays)
        self._rows = jax.jit(rows, out_shardings=mesh_lib.replicated(mesh))
        self._reduce = reduce

    def measure(self, state: TrainState) -> dict[str, float]:
        parts: list[dict[str, np.ndarray]] = []
        num, sharding = len(next(iter(self._arrays.values()))), mesh_lib.batch_sharding(self._mesh)
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            for index, count in evaluation.full_batches(num, self._size):
                length = lengths.least(self._lengths, self._row_lengths[index].max())
                rows = lengths.cut_rows({name: array[index] for name, array in self._arrays.items()}, length)
                batch = placement.place_tree(rows, sharding)
                parts.append({name: np.asarray(x)[:count] for name, x in self._rows(state, batch).items()})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {f'heldout_{name}': float(value) for name, value in self._reduce(whole).items()}


def pair_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of preference pairs (`texts.preferences`)."""
    shape = (config.batch_size, config.max_length)
    return {'chosen': jax.ShapeDtypeStruct(shape, jnp.int32), 'chosen_mask': jax.ShapeDtypeStruct(shape, bool),
            'rejected': jax.ShapeDtypeStruct(shape, jnp.int32), 'rejected_mask': jax.ShapeDtypeStruct(shape, bool),
            'prompt_length': jax.ShapeDtypeStruct(shape[:1], jnp.int32)}


def interleaved(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask [2 B, T], chosen and rejected in turn: every device keeps the rows it has."""
    pairs = (jnp.stack([batch['chosen' + end], batch['rejected' + end]], 1) for end in ('', '_mask'))
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in pairs)
    return tokens, mask


def open_pairs(config: Config, split: str) -> texts.Arrays:
    return _open(config, split, 'preferences', texts.preferences, add_eos=config.get('add_eos', True))


def open_demonstrations(config: Config, split: str) -> texts.Arrays:
    return _open(config, split, 'demonstrations', texts.demonstrations, packing=config.packing,
                 add_eos=config.get('add_eos', True))


def _open(config: Config, split: str, name: str, to_arrays: Callable[..., texts.Arrays], **options) -> texts.Arrays:
    encode = tokenizer_lib.encoder_of(config)
    tokenizer_lib.check_stages(config, encode)
    read = tasks.require(tasks.get(config.data, encode), name, config.data)
    return processes.once_a_host(lambda: to_arrays(
        read(config.data, split), encode, pad=encode.tokenizer.pad, max_length=config.max_length, **options))

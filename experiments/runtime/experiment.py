"""What a file in `experiments/dlc` or `experiments/rlhf` hands to the runner, and the runner's account of it before
anything is compiled."""
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from experiments.runtime import loop, modules, partition, retention
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.metrics import MetricsWriter
from experiments.runtime.programs import Program
from experiments.runtime.state import TrainState

Batch = Mapping[str, Any]
LossFn = Callable[[Any, TrainState, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One trained model.

    Attributes:
        init: key -> `TrainState`; jit-able.
        loss: (params, state, batch, rng) -> (loss, metrics); pure. `state` gives what is not differentiated (teacher).
        step: (state, batch) -> (state, metrics); pure.
        rules: PARTITION_RULES over `state.params`.
        batch: shape and dtype of a global batch.
        open_batches: opens the data and returns this process's stream; None where the model makes its own batches:
        open_rollouts: workdir -> stream of batches made by the model that is trained. It is told every new state
            (`publish(version, state)`, before the first batch and after each step), and gives `metrics` of the last
            batch.
        generate: workdir -> None: the part of a process that has no device of the mesh, for the length of the run.
        check: opens what a fresh run starts from (released weights, the tokenizer, pretrained agents) and raises a
            ValueError or OSError where it does not fit the model; None where there is nothing to look at.
        warm_start: applied to a fresh state, never to a resumed one (released weights).
        sampler: (params, key) -> samples (of an encoder: codes of random images) as one program, for compile checks.
        programs: (devices, bytes that one of them offers) -> the programs of a run beside its step, for the same where
            they have layouts of their own.
        beside_step: devices -> what lies on the step's devices beside its state and batch, by name: trees of
            `jax.ShapeDtypeStruct` with shardings.
        config: the config as it is saved with the run, where files have decided something that it left open.
        hooks: writer of metrics (None in all processes but the first) -> hooks of its own, such as an evaluation.
    """
    init: Callable[[jax.Array], TrainState]
    loss: LossFn
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    rules: partition.Rules
    batch: Mapping[str, jax.ShapeDtypeStruct]
    open_batches: Callable[[], Iterator[dict[str, np.ndarray]]] | None
    open_rollouts: Callable[[Any], Any] | None = None
    generate: Callable[[Any], None] | None = None
    check: Callable[[], object] | None = None
    warm_start: Callable[[TrainState], TrainState] | None = None
    sampler: Callable[[Any, jax.Array], Any] | None = None
    programs: Callable[[Sequence[jax.Device], int], Sequence[Program]] | None = None
    beside_step: Callable[[Sequence[jax.Device]], Mapping[str, Any]] = lambda devices: {}
    hooks: Callable[[MetricsWriter | None], Sequence[loop.Hook]] = lambda writer: ()
    config: ml_collections.ConfigDict | None = None


LEAST = {'num_steps': 1, 'batch_size': 1, 'accumulate': 1, 'log_every': 1, 'checkpoint_every': 0, 'keep_checkpoints': 1,
         'keep_every': 0, 'seed': 0}
# Whole numbers of `model` that may be 0, in a model that has the field before: its size says them, or its condition
# does without them (and the model looks at those that it needs), or there are none of them.
MAY_BE_ZERO = {'size': (*modules.FROM_SIZE, 'head_dim', 'text_vocab_size', 'num_registers'),
               'condition': ('num_codes', 'num_classes', 'embedding_dim')}
SIGNED = ('window',)  # 0: the size says it, -1: none


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Rejects, with a ValueError, runner settings below their minimum (`LEAST`) and sizes of networks that are none."""
    for name, least in LEAST.items():
        if config[name] < least:
            raise ValueError(f'{name}={config[name]} must be at least {least}; set --config.{name}')
    for group in ('model', 'head'):
        section = config.get(group) or {}
        may_be_zero = [name for field, names in MAY_BE_ZERO.items() if field in section for name in names]
        for name, value in section.items():
            least = int(name not in may_be_zero)
            if type(value) is int and value < least and name not in SIGNED:
                raise ValueError(f'{group}.{name}={value} must be at least {least}; set --config.{group}.{name}')
    if config.keep_every and (not config.checkpoint_every or config.keep_every % config.checkpoint_every):
        raise ValueError(f'keep_every={config.keep_every} must be a multiple of '
                         f'checkpoint_every={config.checkpoint_every}: only checkpoints that are written can be kept')
    retention.best_by(config.keep)


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises a ValueError if the batch cannot be dealt out over the mesh, its processes and the microbatches."""
    shards, parts = mesh_lib.batch_shards(mesh), config.accumulate
    if parts < 1 or config.batch_size % (shards * parts):
        raise ValueError(f'batch_size={config.batch_size} is not divisible by {shards} batch shards '
                         f'(mesh data x fsdp) x accumulate={parts}; '
                         + divisible_advice(config.batch_size, shards, parts))


def divisible_advice(rows: int, shards: int, accumulate: int, minibatches: int = 1) -> str:
    """What to set where `rows` cannot be dealt out to so many shards in so many parts. Another number of microbatches
    keeps the recipe; another batch does not."""
    each, rest = divmod(rows, shards * minibatches)
    if not rest:
        near = max(n for n in range(1, min(each, max(accumulate, 1)) + 1) if each % n == 0)
        return f'accumulate={near} divides it and keeps the recipe, or accumulate=0, the least that fits'
    return f'use a multiple of {shards * max(accumulate, 1) * minibatches}, or a mesh of fewer shards (mesh.tensor)'


def saved_for_backward(experiment: Experiment, state: Any) -> int:
    """Bytes the forward pass keeps for the backward pass, before fusion: an upper bound, from shapes alone."""
    def residuals(params, state, batch, rng):
        return jax.vjp(lambda p: experiment.loss(p, state, batch, rng), params, has_aux=True)[1]
    kept = jax.eval_shape(residuals, state.params, state, dict(experiment.batch), jax.eval_shape(jax.random.key, 0))
    params = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    total = sum(int(np.prod(x.shape)) * getattr(x.dtype, 'itemsize', 4) for x in jax.tree.leaves(kept))
    return max(total - params, 0)  # the parameters are among what is kept, and counted with the state


def describe(experiment: Experiment, config: ml_collections.ConfigDict, mesh: Mesh) -> str:
    """The dry run's report: mesh, parameter table, memory a device, batch split. Compiles and allocates nothing."""
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    shardings = partition.state_shardings(state, experiment.rules, mesh)
    shards = mesh_lib.batch_shards(mesh)
    gib = 2 ** 30
    held = partition.bytes_per_device(state, shardings)
    grads = partition.bytes_per_device(state.params, partition.param_shardings(state.params, experiment.rules, mesh))
    batch = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in experiment.batch.values()) // shards
    kept = saved_for_backward(experiment, state) // (shards * config.accumulate)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))
    lines = [
        f'mesh      {dict(mesh.shape)} on {mesh.devices.size} x {mesh.devices.flat[0].device_kind}',
        f'model     {count:,} parameters',
        parameter_overview.get_parameter_overview(state.params, include_stats=False),
        f'batch     {config.batch_size} = {shards} shards x {config.accumulate} microbatches x '
        f'{config.batch_size // (shards * config.accumulate)}',
        *(f'          {name} {x.dtype}{list(x.shape)}' for name, x in experiment.batch.items()),
        'memory a device, GiB:',
        f'          {held / gib:9.3f}  state (parameters, moments, EMA)',
        f'          {grads / gib:9.3f}  gradients',
        f'          {batch / gib:9.3f}  batch',
        f'          {kept / gib:9.3f}  saved for the backward pass, before fusion (upper bound)',
        f'          {(held + grads + batch + kept) / gib:9.3f}  in all; '
        '`experiments.compile` gives the compiled figure',
        *describe_processes(config, mesh, state, shardings),
    ]
    return '\n'.join(lines)


def describe_processes(config: ml_collections.ConfigDict, mesh: Mesh, state: Any, shardings: Any) -> list[str]:
    """Lines on the processes of the job: which rows of a batch each provides, and which files each writes."""
    shards = mesh_lib.batch_shards(mesh)
    parts: dict[int, set[int]] = {}
    for device, (rows,) in mesh_lib.batch_sharding(mesh).devices_indices_map((shards,)).items():
        parts.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
    written = dict.fromkeys(sorted(parts), 0)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        places = sharding.devices_indices_map(leaf.shape)
        first = {str(index): device for device, index in reversed(places.items())}  # of devices with the same part
        size = int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for device in first.values():
            written[device.process_index] += size
    lines = [f'processes {len(parts)}']
    for process in sorted(parts):
        devices = sum(device.process_index == process for device in mesh.devices.flat)
        shared = [other for other in sorted(parts) if other != process and parts[other] & parts[process]]
        lines.append(
            f'          process {process}: {devices} devices, {len(parts[process]) * config.batch_size // shards} rows '
            f'of a batch' + (f', the same as process {", ".join(map(str, shared))}' if shared else '')
            + f'; writes {written[process] / 2 ** 30:.3f} GiB of a checkpoint'
            + ', config.json, metrics.jsonl and tensorboard/' * (process == 0))
    return lines

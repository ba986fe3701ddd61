"""Microbatches, recomputation and meshes chosen for the memory there is, by compiling the step."""
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from experiments.runtime import compiler, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.experiment import Experiment
from experiments.runtime.programs import Program, Report, bytes_on_device, compile_program, expected, placed
from experiments.runtime.slices import Slice

Config = ml_collections.ConfigDict
Build = Callable[[Config, Mesh], Experiment]

STEP = 'raise mesh.fsdp or accumulate, set model.remat'
BATCHES_AHEAD = 3  # of `runtime.prefetch`: two in its queue and one that waits for a place there
TENSOR = (1, 2, 4, 8)  # ways to split a layer that are tried
AUTO = 'auto'  # a `model.remat`: the first of these whose step fits, else 'full'
REMATS = ('none', 'dots_no_batch')


def remat_is_open(config: Config) -> bool:
    """Whether `model.remat` is left to the memory there is."""
    return 'model' in config and config.model.get('remat') == AUTO


def usable_bytes(mesh: Mesh) -> float:
    """Memory of the device of `mesh` on this process that has the least, in bytes; infinite where they have no limit of
    their own, or none is here."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((s.get('bytes_limit', math.inf) for s in stats), default=math.inf)


def step_program(experiment: Experiment, mesh: Mesh, devices: Sequence[jax.Device], *, present: bool = True,
                 fast: bool = False) -> Program:
    """The training step as the runner jits it, beside what lies on its devices meanwhile.

    Args:
        devices: all of the run, those that generate included.
        present: whether they are on this machine; a compiler for absent GPUs times nothing.
    """
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    shardings, batch = partition.state_shardings(state, experiment.rules, mesh), mesh_lib.batch_sharding(mesh)
    step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, batch),
                   out_shardings=(shardings, mesh_lib.replicated(mesh)))
    beside = dict(experiment.beside_step(devices))
    if experiment.open_batches is not None:
        beside['batches ahead'] = [placed(dict(experiment.batch), batch)] * BATCHES_AHEAD
    platform = mesh.devices.flat[0].platform
    options = compiler.ABSENT_GPU if platform == 'gpu' and not present else compiler.options(mesh, fast=fast)
    return Program('step', step, (placed(state, shardings), placed(dict(experiment.batch), batch)), mesh, beside,
                   knobs=STEP, options=options)


def minibatches(config: Config) -> int:
    """Updates that a step makes, each of a part of the batch: those of a policy, of texts or of codes."""
    return config.algorithm.num_minibatches if 'algorithm' in config and 'rollout' in config else 1


def microbatches(config: Config, mesh: Mesh) -> list[int]:
    """Numbers of microbatches into which the batch can be dealt out over `mesh`, the least first; [] if there is
    none."""
    each, rest = divmod(config.batch_size, mesh_lib.batch_shards(mesh) * minibatches(config))
    return [] if rest else [n for n in range(1, each + 1) if each % n == 0]


def accumulated(config: Config, mesh: Mesh, build: Build, compiled: Callable[[Program], Report] | None, *,
                present: bool = True, fast: bool = False) -> Config:
    """`config` with `accumulate=0` replaced by the least number of microbatches whose step fits.

    Args:
        build: of an experiment.
        compiled: what a compiler says of a program; None: on these devices everything fits.
        present, fast: of the step to compile, see `step_program`.

    Raises:
        ValueError: the batch cannot be dealt out, or no number of microbatches fits.
    """
    if config.accumulate:
        return config
    config, least = config.copy_and_resolve_references(), 1.0
    for count in microbatches(config, mesh) or [1]:
        if count < least:
            continue
        config.accumulate = count
        experiment = build(config, mesh)
        if compiled is None:
            return config
        program = step_program(experiment, mesh, mesh.devices.flatten().tolist(), present=present, fast=fast)
        report = compiled(program)
        if report['fits']:
            return config
        # What grows with a microbatch is what is not there before the step; so many times too large is the next guess.
        fixed = bytes_on_device(program.args) + sum(report['beside'].values())
        left = report['usable_bytes'] - fixed
        if left > 0:
            least = count * (report['total'] - fixed) / left
    raise ValueError(f'accumulate=0: with every prompt or row a microbatch of its own the step still needs more than '
                     f'a device of the mesh {dict(mesh.shape)} has; raise mesh.fsdp or mesh.tensor, set model.remat')


def fitted(config: Config, mesh: Mesh, build: Build, compiled: Callable[[Program], Report] | None, *,
           present: bool = True, fast: bool = False) -> Config:
    """`config` with what it leaves to the memory there is: `accumulate=0`, then `model.remat='auto'`.

    Microbatches are counted with everything recomputed, for each of them gathers the weights anew; then as little is
    recomputed as the memory allows that is left.

    Args and errors: those of `accumulated`.
    """
    if not remat_is_open(config):
        return accumulated(config, mesh, build, compiled, present=present, fast=fast)
    config = config.copy_and_resolve_references()
    config.model.remat = 'full'
    config = accumulated(config, mesh, build, compiled, present=present, fast=fast)
    devices = mesh.devices.flatten().tolist()
    for remat in REMATS:
        candidate = config.copy_and_resolve_references()
        candidate.model.remat = remat
        if compiled is None:
            return candidate
        program = step_program(build(candidate, mesh), mesh, devices, present=present, fast=fast)
        if compiled(program)['fits']:
            return candidate
    return config


def here(mesh: Mesh) -> Callable[[Program], Report] | None:
    """`compiled` of `fitted` for the devices of this machine."""
    usable = usable_bytes(mesh)
    if math.isinf(usable):
        return None
    target = Slice('this machine', tuple(mesh.devices.flat), int(usable), int(usable), 1.0, 1.0, 1.0)
    return lambda program: compile_program(program, target)


def sweep(config: Config, target: Slice, build: Build, mesh_of: Callable[[Config, Any], Mesh],
          fast: bool = False) -> Iterator[tuple[dict[str, int], int, Report | str]]:
    """(mesh, accumulate, report of the step or why there is none) of every way to lay a step out over `target`."""
    for tensor in TENSOR:
        for fsdp in (-1, 1):
            candidate = config.copy_and_resolve_references()
            sizes = dict(data=1 if fsdp == -1 else -1, fsdp=fsdp, tensor=tensor)
            candidate.mesh.update(sizes)
            candidate.accumulate = 0
            last: list[Report] = []

            def compiled(program: Program, last: list[Report] = last) -> Report:
                last[:] = [compile_program(program, target)]
                return last[0]
            try:
                mesh = mesh_of(candidate, target.devices)
                chosen = fitted(candidate, mesh, build, compiled, present=False, fast=fast)
                yield dict(mesh.shape), chosen.accumulate, last[0]
            except ValueError as error:
                yield sizes, 0, str(error)


def best(found: Sequence[tuple[dict[str, int], int, Report | str]]) -> tuple[dict[str, int], int, Report]:
    """The one of `sweep` whose step is expected to be the quickest.

    Raises:
        ValueError: none fits.
    """
    fitting = [(shape, n, report) for shape, n, report in found if not isinstance(report, str)]
    if not fitting:
        raise ValueError('--mesh=sweep: the step fits in no layout; take a larger slice, or set model.remat')
    return min(fitting, key=lambda entry: expected(entry[2])[0])

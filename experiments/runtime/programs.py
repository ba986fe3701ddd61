"""The compiled programs of a run, as they are laid out on its devices, and what a compiler says of each.

Programs share chips: what lies on a program's devices while it runs, beside its own arguments, is part of the memory
that it needs there. The run fits where the program with the largest sum does.
"""
import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import Literal, jaxprs_in_params
from jax.sharding import Mesh

from experiments.runtime import compiler, hlo
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.report_cache import ReportCache, fingerprint
from experiments.runtime.slices import Slice

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
        name: 'step', 'sampler', ...
        jitted: the function.
        args: its arguments, trees of `jax.ShapeDtypeStruct`.
        mesh: that it runs under.
        beside: what else lies on its devices meanwhile, by name: trees of `jax.ShapeDtypeStruct` with shardings.
        times: how often an iteration of the run runs it.
        options: of the compiler.
        knobs: config fields that lower its memory, in words.
    """
    name: str
    jitted: Any
    args: tuple
    mesh: Mesh
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: int = 1
    options: Mapping[str, Any] | None = None
    knobs: str = ''


def placed(tree: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct` of `tree` laid out by `shardings`, a tree of them or one for all leaves."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _, s=shardings: s, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_on_device(tree: Any) -> int:
    """Bytes a device of arrays like the leaves of `tree`, `jax.ShapeDtypeStruct` with shardings, as the devices' own
    compiler lays them out (TPUs pad to tiles)."""
    if not jax.tree.leaves(tree):
        return 0
    try:
        compiled = jax.jit(lambda *unused: (), keep_unused=True).lower(tree).compile()
    except jax.errors.JaxRuntimeError as error:  # more than a device has
        return _exhausting(error)
    return compiled.memory_analysis().argument_size_in_bytes


def _exhausting(error: jax.errors.JaxRuntimeError) -> int:
    """Bytes that a program would need, by the error of a compiler that has not so many; raises any other error."""
    if 'RESOURCE_EXHAUSTED' not in str(error):
        raise error
    sizes = re.findall(r'([\d.]+)([KMGT])\b', str(error))  # what it needs is the largest of them
    return int(max((float(n) * 1024 ** (1 + 'KMGT'.index(unit)) for n, unit in sizes), default=0))


def matmul_flops(jaxpr: Any, *, in_kernels: bool = False) -> float:
    """FLOPs of all matrix products and convolutions of a jaxpr: loops times their length, the dearer branch of each
    condition, what is recomputed for the backward pass included. (XLA's own count takes the body of a loop once.)

    Args:
        in_kernels: of Pallas kernels alone.
    """
    total = 0.0
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        if in_kernels and eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
            continue
        if eqn.primitive.name == 'dot_general':
            contracted = eqn.params['dimension_numbers'][0][0]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == 'conv_general_dilated':
            kernel, features = eqn.invars[1].aval, eqn.params['dimension_numbers'].rhs_spec[0]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[features]
        elif eqn.primitive.name == 'cond':
            total += max(matmul_flops(branch, in_kernels=in_kernels) for branch in eqn.params['branches'])
        else:
            below = in_kernels and eqn.primitive.name != 'pallas_call'
            inner = sum(matmul_flops(inner, in_kernels=below) for inner in jaxprs_in_params(eqn.params))
            total += inner * _trips(eqn)
    return total


def _trips(eqn: Any) -> int:
    """How often a loop's body runs: of a `while` as often as the number that its condition counts up to lets it, of a
    Pallas kernel once for each point of its grid, of what is written for one device once on each."""
    if eqn.primitive.name == 'scan':
        return eqn.params['length']
    if eqn.primitive.name == 'pallas_call':
        return math.prod(eqn.params['grid_mapping'].grid)
    if eqn.primitive.name == 'shard_map':
        return math.prod(eqn.params['mesh'].shape[axis] for axis in eqn.params['newly_manual_axes'])
    if eqn.primitive.name != 'while':
        return 1
    bounds = [operand.val for test in eqn.params['cond_jaxpr'].jaxpr.eqns if test.primitive.name == 'lt'
              for operand in test.invars if isinstance(operand, Literal)]
    return int(max(bounds, default=1))


def compile_program(program: Program, target: Slice, cache: ReportCache | None = None) -> Report:
    """What the compiler says of a program, for one device of `target`. Of one that does not fit a TPU: only how much
    it would need.

    Args:
        cache: of what it said of equal programs, whose seconds of compiling are then reported.
    """
    mesh, devices = program.mesh, program.mesh.devices.size
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        traced = program.jitted.trace(*program.args)
        lowered = traced.lower()

        def compiled() -> Report:
            return _compiled(lowered, program.options)
        compiled_report = (cache.get(fingerprint(lowered, program.options, mesh, target.name), compiled)
                           if cache else compiled())
        beside = {name: bytes_on_device(tree) for name, tree in program.beside.items()}
    report = compiled_report | {'mesh': dict(mesh.shape), 'usable_bytes': target.usable_bytes, 'times': program.times,
                                'flops': matmul_flops(traced.jaxpr) / devices, 'beside': beside,
                                'effort': (program.options or {}).get(compiler.EFFORT, 0.0)}
    if 'hbm_traffic' in report:
        kernels = matmul_flops(traced.jaxpr, in_kernels=True) / devices
        report['seconds'] = bounds(report, target, kernels)
    report['total'] = report['bytes'] + sum(beside.values())
    return report | {'fits': 'arguments' in report and report['total'] <= target.usable_bytes}


def _compiled(lowered: jax.stages.Lowered, options: Mapping[str, Any] | None) -> Report:
    """The part of a program's report that its compilation alone decides."""
    started = time.monotonic()
    try:
        executable = lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        return {'bytes': _exhausting(error), 'compile_seconds': time.monotonic() - started}
    memory = executable.memory_analysis()
    report = {'arguments': memory.argument_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
              'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,  # without donated ones
              'program': memory.generated_code_size_in_bytes}
    costs = hlo.costs(executable.as_text())
    return report | {'bytes': sum(report.values()), 'hbm_traffic': costs.bytes, 'cycles': costs.cycles,
                     'collectives': {kind: dataclasses.asdict(entry) for kind, entry in costs.collectives.items()},
                     'compile_seconds': time.monotonic() - started}


def bounds(report: Report, target: Slice, kernels: float = 0.0) -> dict[str, float]:
    """Seconds that each resource needs for one run of a program on its own: `matmul`, `memory`, `network`; and
    `cycles`, the compiler's own estimate of the whole (TPU), 0 where it gives none.

    Args:
        kernels: FLOPs of Pallas kernels, which the compiler does not estimate: in `cycles` they count at the peak.
    """
    network = sum(entry['bytes'] for entry in report['collectives'].values())
    cycles = report['cycles'] / target.clock + kernels / target.peak_flops if target.clock else 0.0
    return {'matmul': report['flops'] / target.peak_flops, 'memory': report['hbm_traffic'] / target.hbm_bandwidth,
            'network': network / target.network_bandwidth, 'cycles': cycles}


def expected(report: Report) -> tuple[float, str]:
    """Seconds of one run, and what bounds it: the compiler's own estimate where it has one (products, memory and what
    lies between), never less than the slowest resource."""
    seconds = report['seconds']
    slowest = max(('matmul', 'memory', 'network'), key=seconds.get)
    busy = seconds['cycles']
    if busy > 1.25 * seconds[slowest]:
        return busy, 'latency'
    return max(busy, seconds[slowest]), slowest

"""Compiles a config's training step and sampler for a TPU slice that is not here, with the real TPU compiler.

    pip install -e ".[tpu]"
    python -m experiments.compile --config=configs/dlc/generator_imagenet.py:L512 --topology=v5e-16
    python -m experiments.compile --config=configs/rlhf/tldr.py:online_dpo_1b --topology=v5e-16
    python -m experiments.compile --all --topology=v5e-16

Prints, for one chip, bytes against HBM, matrix products against peak, the time that the compiler's cycle counts add up
to, and collectives with their loops counted. Needs no TPU and no data. A program that does not fit ends the command
with status 2. It looks at one program at a time: what shares the chips with it (a policy's sampler beside its learner)
comes on top.
"""
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no metadata server to ask
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # nothing is run, so two compilations may share a machine
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')  # these two stop warnings of the TPU that is not there
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.linen as nn
import jax
import ml_collections
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from experiments.runtime import compiler, hlo, launch, partition
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.slices import GIB, Slice, tpu_slice
from experiments.train import build, mesh_of

PAPER = (*(f'configs/dlc/{name}_imagenet.py:L512' for name in ('encoder', 'generator', 'code_model')),
         'configs/dlc/text_to_code_llada.py:L512')


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products and convolutions of a jaxpr: loops times their length, the dearer branch of each
    condition, what is recomputed for the backward pass included. (XLA's own count takes the body of a loop once.)"""
    total = 0.0
    for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        if eqn.primitive.name == 'dot_general':
            contracted = eqn.params['dimension_numbers'][0][0]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif eqn.primitive.name == 'conv_general_dilated':
            kernel, features = eqn.invars[1].aval, eqn.params['dimension_numbers'].rhs_spec[0]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[features]
        elif eqn.primitive.name == 'cond':
            total += max(map(matmul_flops, eqn.params['branches']))
        else:
            inner = sum(map(matmul_flops, jaxprs_in_params(eqn.params)))
            total += inner * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    return total


def compile_program(jitted: Any, args: tuple, mesh: Mesh, target: Slice, *,
                    options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the compiler says of one program, for one chip. Of one that does not fit: only how much it would need.

    `options`: of the compiler, as in `experiments.runtime.compiler`.
    """
    started = time.monotonic()
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        traced = jitted.trace(*args)
        report = {'mesh': dict(mesh.shape), 'hbm_bytes': target.hbm_bytes,
                  'flops': matmul_flops(traced.jaxpr) / mesh.devices.size}
        try:
            executable = traced.lower().compile(compiler_options=dict(options) if options else None)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            sizes = re.findall(r'([\d.]+)([KMGT])\b', str(error))  # what it needs is the largest of them
            report['bytes'] = int(max((float(n) * 1024 ** (1 + 'KMGT'.index(unit)) for n, unit in sizes), default=0))
        else:
            memory = executable.memory_analysis()
            report |= {'arguments': memory.argument_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
                       'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,  # without donated ones
                       'program': memory.generated_code_size_in_bytes}
            report['bytes'] = sum(report[part] for part in ('arguments', 'temporaries', 'outputs', 'program'))
            costs = hlo.costs(executable.as_text())
            report['collectives'] = {kind: dataclasses.asdict(entry) for kind, entry in costs.collectives.items()}
            report['seconds_by_cycles'] = costs.cycles / target.clock if target.clock else 0.0
            network = sum(entry.bytes for entry in costs.collectives.values())
            report['seconds_on_network'] = network / target.ici_bytes if target.ici_bytes else 0.0
    return report | {'fits': 'arguments' in report and report['bytes'] <= target.hbm_bytes,
                     'seconds_at_peak': report['flops'] / target.peak_flops,
                     'compile_seconds': time.monotonic() - started}


def compile_config(config: ml_collections.ConfigDict, target: Slice, *, only: str | None = None,
                   fast: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """('step', report) and ('sampler', report) of `config` on `target`, each laid out as it is run there.

    Training follows `config.mesh`. Sampling keeps a copy of the parameters on every chip and splits the batch over all
    of them, as `experiments.runtime.modules.Batched` does; a policy samples as `config.rollout` says, text to code with
    its parameters split over the chips.
    """
    mesh = mesh_of(config, target.devices)
    experiment = build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    effort = compiler.FAST if fast else None
    if only in (None, 'step'):
        shardings, batch = partition.state_shardings(state, experiment.rules, mesh), mesh_lib.batch_sharding(mesh)
        step = jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, batch),
                       out_shardings=(shardings, mesh_lib.replicated(mesh)))
        yield 'step', compile_program(step, (state, dict(experiment.batch)), mesh, target,
                                      options=compiler.options('tpu', fast=fast))
    if only in (None, 'sampler') and experiment.sampler_program:
        sampler, args, mesh = experiment.sampler_program(target.devices)
        yield 'sampler', compile_program(sampler, args, mesh, target, options=effort)
    elif only in (None, 'sampler') and experiment.sampler:
        mesh = mesh_lib.make_mesh({'data': -1}, target.devices)
        sampler = jax.jit(experiment.sampler, in_shardings=mesh_lib.replicated(mesh),
                          out_shardings=mesh_lib.batch_sharding(mesh))
        key = jax.eval_shape(jax.random.key, 0)
        yield 'sampler', compile_program(sampler, (state.params, key), mesh, target, options=effort)


def describe(name: str, report: Mapping[str, Any], target: Slice, *, fast: bool = False) -> str:
    """A report as the command prints it; the expected time is left out of a `fast` one, whose program is slower."""
    gib = lambda part: f'{report[part] / GIB:.2f}'
    shape = ', '.join(f'{axis}={size}' for axis, size in report['mesh'].items())
    lines = [f'{name} on {target.name}: {len(target.devices)} chips, mesh {shape}; compiled in '
             f'{report["compile_seconds"]:.0f} s',
             f'  memory   {gib("bytes")} GiB a chip of {report["hbm_bytes"] / GIB:.0f} '
             f'({report["bytes"] / report["hbm_bytes"]:.0%})'
             + (f': arguments {gib("arguments")}, temporaries {gib("temporaries")}, outputs {gib("outputs")}, program '
                f'{gib("program")}' if 'arguments' in report else ': DOES NOT FIT'),
             f'  compute  {report["flops"] / 1e12:.2f} TFLOP a chip in matrix products, '
             f'{report["seconds_at_peak"]:.4f} s at the peak of {target.peak_flops / 1e12:.0f} TFLOP/s']
    if report.get('seconds_by_cycles') and not fast:
        seconds = report['seconds_by_cycles']
        lines.append(f'  time     {seconds:.4f} s by the cycles that the compiler expects, '
                     f'{report["seconds_at_peak"] / seconds:.0%} of the peak')
    if 'collectives' in report:
        runs = [f'{e["runs"]} {kind} (largest {e["largest_bytes"] / 2 ** 20:.2f} MiB)'
                for kind, e in report['collectives'].items()]
        seconds = f'; {report["seconds_on_network"]:.4f} s at the bandwidth of the links'
        lines.append('  network  ' + (', '.join(runs) + seconds if runs else 'no collectives'))
    return '\n'.join(lines)


def main() -> None:
    p = launch.parser(__doc__, config='what to compile')
    p.add_argument('--all', action='store_true', help=f'compile {", ".join(PAPER)}, one after another')
    p.add_argument('--topology', default='v5e-16', help='GENERATION-SIZE, such as v5e-16, v6e-64, v5p-128')
    p.add_argument('--only', choices=('step', 'sampler'), help='one of the two programs')
    p.add_argument('--fast', action='store_true',
                   help='compile in a quarter of the time to a slower program: its time means nothing, its memory is '
                        'about the same but for samplers, which it understates')
    p.add_argument('--json', metavar='FILE', help='also write the reports there')
    args, config = launch.parse(p, default_config=PAPER[0] if '--all' in sys.argv else None)
    target = tpu_slice(args.topology)
    configs = {args.config: config}
    if args.all:
        configs = {path: launch.load_config(path, [a for a in sys.argv if a.startswith('--config.')]) for path in PAPER}
    reports = {}
    for path, config in configs.items():
        for program, report in compile_config(config, target, only=args.only, fast=args.fast):
            reports[f'{path} {program}'] = report
            print(describe(f'{path} {program}', report, target, fast=args.fast), flush=True)
            if args.json:
                with open(args.json, 'w') as file:
                    json.dump({'topology': target.name, 'programs': reports}, file, indent=1)
    full = [name for name, report in reports.items() if not report['fits']]
    if full:
        advice = ('raise mesh.fsdp or accumulate, set model.remat, lower batch_size' if full[0].endswith(' step') else
                  'lower the rows sampled at a time (batch_size; rollout.slots of a policy), raise rollout.mesh.fsdp')
        raise ValueError(f'{full[0]} does not fit {target.name}: {advice}, or take a larger slice')


if __name__ == '__main__':
    launch.main(main)

"""Compiles a config's programs for TPU chips or GPUs that are not here, with their real compiler.

    pip install -e ".[tpu]"                  # for GPUs ".[cuda]", 4.6 GB
    python -m experiments.compile --config=configs/dlc/generator_imagenet.py:L512 --topology=v5e-16
    python -m experiments.compile --config=configs/rlhf/tldr.py:online_dpo_1b --topology=h100-8

Prints, for one chip and program, the memory that it takes together with what lies there meanwhile, matrix products
against peak, the time that each resource bounds it by, and collectives with their loops counted; then the memory and
the time of the whole run. Needs no accelerator and no data. A run that does not fit ends the command with status 2.

    python -m experiments.compile --all & python -m experiments.compile --all & wait

compiles every published configuration for `docs/readiness.md`, as many rows at a time as there are such commands; a
program that several rows have is compiled once. With rows that could be neither compiled nor refused it ends with
status 3.
"""
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no metadata server to ask
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # nothing is run, so two compilations may share a machine
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')  # these two stop warnings of the TPU that is not there
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import ml_collections

from experiments import readiness
from experiments.runtime import compiler, fitting, launch, slices
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.programs import Program, Report, compile_program, expected
from experiments.runtime.report_cache import ReportCache
from experiments.runtime.slices import GIB, Slice
from experiments.train import build, mesh_of

FAILED = 3  # exit status of a sweep in which rows failed


def programs_of(config: ml_collections.ConfigDict, target: Slice, *, fast: bool = False) -> list[Program]:
    """The programs of a run of `config` on `target`, its step first, each laid out as it is run there.

    Training follows `config.mesh`. Sampling keeps a copy of the parameters on every chip and splits the batch over all
    of them, as `experiments.runtime.modules.Batched` does; a policy samples as `config.rollout` says, text to code with
    its parameters split over the chips.
    """
    if not config.num_steps:  # a recipe that does not say; schedules are the same program whatever their length
        config = config.copy_and_resolve_references()
        config.num_steps = 1000
    mesh = mesh_of(config, target.devices)
    experiment = build(config, mesh)
    absent = compiler.ABSENT_GPU if target.devices[0].platform == 'gpu' else None
    out = [fitting.step_program(experiment, mesh, target.devices, present=False, fast=fast)]
    if experiment.programs:
        out += experiment.programs(target.devices, target.usable_bytes)
    elif experiment.sampler:
        mesh = mesh_lib.make_mesh({'data': -1}, target.devices)
        sampler = jax.jit(experiment.sampler, in_shardings=mesh_lib.replicated(mesh),
                          out_shardings=mesh_lib.batch_sharding(mesh))
        params = jax.eval_shape(experiment.init, jax.random.key(0)).params
        out.append(Program('sampler', sampler, (params, jax.eval_shape(jax.random.key, 0)), mesh,
                           knobs='lower --batch_size, the rows sampled at a time (here batch_size)'))
    if absent:
        out[1:] = [dataclasses.replace(program, options=absent) for program in out[1:]]
    return out


def compile_config(config: ml_collections.ConfigDict, target: Slice, *, only: str | None = None,
                   fast: bool = False) -> Iterator[tuple[str, Report]]:
    """(name, report) of each program of a run of `config` on `target` (`programs_of`), or of `only` that one."""
    for program in programs_of(config, target, fast=fast):
        if only in (None, program.name):
            yield program.name, compile_program(program, target)


def compile_row(path: str, config: ml_collections.ConfigDict, target: Slice,
                cache: ReportCache | None = None) -> dict[str, Report]:
    """Reports of the programs of a published configuration for the table of `readiness.py`, as quickly as they can be
    had: for TPUs the step, a decoder's sampler and publishing with less effort, for GPUs that sampler from few blocks.

    Args:
        cache: of programs that other rows have as well.

    Raises:
        ValueError: its batch or layout does not go with the slice.
    """
    def compiled(program: Program, *, fast: bool = False) -> Report:
        if fast and tpu:
            program = dataclasses.replace(program, options=dict(program.options or {}) | compiler.FAST)
        return compile_program(program, target, cache)
    mesh, tpu = mesh_of(config, target.devices), target.devices[0].platform == 'tpu'
    config = fitting.fitted(readiness.divided(config, mesh_lib.batch_shards(mesh)), mesh, build, compiled,
                            present=False, fast=True)
    programs, out = programs_of(config, target, fast=True), {}
    depth = 0
    if config.experiment == 'policy':
        from experiments.rlhf.models import architecture
        depth = architecture.decoder(config.model).depth
    for program in programs:
        decodes = bool(depth) and program.name in ('sampler', 'prefill')
        if decodes and not tpu and depth > readiness.DEPTHS[-1]:
            def at(blocks, program=program):
                return compiled(shallow(config, target, blocks, program))
            out[program.name] = readiness.extrapolated(program, at, depth, target)
        else:
            out[program.name] = compiled(program, fast=decodes or program.name == 'publish')
        print(describe(f'{path} {program.name}', out[program.name], target), flush=True)
    return out


def compile_row_apart(path: str, config: ml_collections.ConfigDict, target: Slice, *,
                      file: str | os.PathLike) -> dict[str, Report]:
    """`compile_row` in a process of its own, for a failed check of a compiler ends the process that it is in.

    Args:
        file: of the rows; programs that they have in common are kept beside it.

    Raises:
        ValueError: as `compile_row`.
        RuntimeError: the process ended.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['experiments.train', 'experiments.readiness'])  # what takes seconds to import
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(sender, path, config, target.name, file), daemon=True)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f'the compiler ended its process with status {process.exitcode}') from None
    process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _send_row(sender: Any, path: str, config: ml_collections.ConfigDict, target: str, file: str | os.PathLike) -> None:
    try:
        outcome: Any = compile_row(path, config, slices.named(target), readiness.cache_of(file))
    except ValueError as error:
        outcome = error
    except Exception as error:  # the compiler's own cannot all be sent
        outcome = RuntimeError(f'{type(error).__name__}: {error}')
    sender.send(outcome)


def shallow(config: ml_collections.ConfigDict, target: Slice, blocks: int, like: Program) -> Program:
    """The program of that name of a policy of few blocks, in as many waves as `like`."""
    from experiments.rlhf.policy import waves
    config = config.copy_and_resolve_references()
    config.model.depth = blocks
    prompts = config.batch_size // like.times // mesh_lib.batch_shards(like.mesh)
    if like.name == 'sampler' and not config.rollout.slots:
        config.rollout.memory = (waves.wave_bytes(config, prompts, like.mesh) + 1) / GIB
    return next(program for program in programs_of(config, target) if program.name == like.name)


def describe(name: str, report: Mapping[str, Any], target: Slice) -> str:
    """A report as the command prints it; the expected time is left out of a program that was compiled with less
    effort, which is slower."""
    gib = lambda part: f'{report[part] / GIB:.2f}'
    shape = ', '.join(f'{axis}={size}' for axis, size in report['mesh'].items())
    lines = [f'{name} on {target.name}: {len(target.devices)} chips, mesh {shape}; compiled in '
             f'{report["compile_seconds"]:.0f} s'
             + (f'; {report["times"]} times an iteration' if report['times'] > 1 else ''),
             f'  memory   {gib("total")} GiB a chip of {report["usable_bytes"] / GIB:.2f} '
             f'({report["total"] / report["usable_bytes"]:.0%}): '
             + (f'arguments {gib("arguments")}, temporaries {gib("temporaries")}, outputs {gib("outputs")}, program '
                f'{gib("program")}' if 'arguments' in report else f'program {gib("bytes")}')
             + ''.join(f', {what} {size / GIB:.2f}' for what, size in report['beside'].items())
             + ('' if report['fits'] else ': DOES NOT FIT')]
    if not report['fits'] and target.raise_memory:
        lines.append(f'           {target.raise_memory}')
    lines.append(f'  compute  {report["flops"] / 1e12:.2f} TFLOP a chip in matrix products, '
                 f'{report["flops"] / target.peak_flops:.4f} s at the peak of {target.peak_flops / 1e12:.0f} TFLOP/s')
    if 'seconds' not in report:
        return '\n'.join(lines)
    seconds, (whole, bound) = report['seconds'], expected(report)
    lines.append(f'  traffic  {report["hbm_traffic"] / GIB:.2f} GiB to and from memory, {seconds["memory"]:.4f} s at '
                 f'{target.hbm_bandwidth / 1e9:.0f} GB/s')
    runs = [f'{entry["runs"]} {kind} (largest {entry["largest_bytes"] / 2 ** 20:.2f} MiB)'
            for kind, entry in report['collectives'].items()]
    lines.append('  network  ' + (', '.join(runs) + f'; {seconds["network"]:.4f} s at the bandwidth of the links'
                                  if runs else 'no collectives'))
    if not report['effort']:
        lines.append(f'  time     {whole:.4f} s ' + ('by the cycles that the compiler expects' if seconds['cycles'] else
                     'at the least') + f', {report["flops"] / target.peak_flops / whole:.0%} of the peak; bound by '
                     + {'matmul': 'matrix products', 'memory': 'memory traffic', 'network': 'the network',
                        'latency': 'what lies between products and transfers'}[bound])
    return '\n'.join(lines)


def iteration(reports: Mapping[str, Report], *, overlaps: bool) -> dict[str, float]:
    """Seconds of one iteration of a policy's run by its programs: step, publish, sampler, reward, and `all`, where
    generating and learning overlap or follow each other."""
    parts = {'step': 0.0, 'publish': 0.0, 'sampler': 0.0, 'reward': 0.0}
    for name, report in reports.items():
        part = 'sampler' if name == 'prefill' else 'reward' if name.endswith('reward') else name
        if 'seconds' in report:
            parts[part] += report['times'] * expected(report)[0]
    learning, generating = parts['step'] + parts['publish'], parts['sampler'] + parts['reward']
    return parts | {'all': max(learning, generating) if overlaps else learning + generating}


def describe_run(path: str, config: ml_collections.ConfigDict, reports: Mapping[str, Report], target: Slice) -> str:
    """The run as a whole: its worst moment, and what an iteration takes."""
    worst = max(reports, key=lambda name: reports[name]['total'])
    total = reports[worst]['total']
    line = (f'{path} on {target.name}: at most {total / GIB:.2f} GiB a chip of {target.usable_bytes / GIB:.2f}, while '
            f'its {worst} runs')
    if 'publish' in reports and all('seconds' in report for report in reports.values()):
        elsewhere = config.rollout.transport != 'devices'
        overlaps = bool(config.rollout.max_staleness) and (elsewhere or bool(config.rollout.devices))
        seconds = iteration(reports, overlaps=overlaps)
        line += f'; an iteration takes {seconds["all"]:.2f} s: ' + ', '.join(
            f'{name} {seconds[name]:.2f}' for name in ('step', 'publish', 'sampler', 'reward'))
        line += ', generating on as many chips elsewhere' if elsewhere else ''
        line += ', generating beside learning' if overlaps else ', one after another'
    return line


def compile_meshes(path: str, config: ml_collections.ConfigDict, target: Slice, *, fast: bool = False) -> None:
    """Prints every layout of the step over `target`, and the quickest.

    Raises:
        ValueError: none fits.
    """
    found = []
    for shape, accumulate, report in fitting.sweep(config, target, build, mesh_of, fast):
        found.append((shape, accumulate, report))
        sizes = ', '.join(f'{axis}={size}' for axis, size in shape.items())
        print(f'{path} on {target.name}, mesh {sizes}: ' + (report if isinstance(report, str) else
              f'accumulate={accumulate}, {report["total"] / GIB:.2f} GiB a chip, {expected(report)[0]:.4f} s a step'),
              flush=True)
    shape, accumulate, report = fitting.best(found)
    print('the quickest: ' + ' '.join(f'--config.mesh.{axis}={size}' for axis, size in shape.items())
          + f' --config.accumulate={accumulate}')


def compile_all(topologies: str, file: str | os.PathLike, only: str = '') -> None:
    """Compiles the rows that `file` lacks, of configurations that match the regex `only`, and writes the table anew;
    slices without a compiler here are left out. Ends with status `FAILED` where rows were neither compiled nor
    refused."""
    targets = {}
    for name in topologies.split(',') if topologies else readiness.ORDER:
        try:
            targets[name] = slices.named(name)
        except ValueError as error:
            if topologies:
                raise
            print(error, file=sys.stderr)
    overrides = [argument for argument in sys.argv if argument.startswith('--config.')]
    compiled = functools.partial(compile_row_apart, file=file)
    failed = 0
    for key, row in readiness.sweep(targets, file, compiled, overrides, only):
        outcome = row.get('refused') or row.get('failed') or 'compiled'
        print(f'{key}: {outcome} ({row["seconds"]} s)', flush=True)
        failed += 'failed' in row
    if pathlib.Path(file).resolve() == readiness.ROWS:
        readiness.TABLE.write_text(readiness.table(readiness.read(file)))
    if failed:
        print(f'{failed} rows failed; they are left out, and the same command tries them again', file=sys.stderr)
        sys.exit(FAILED)


def main() -> None:
    p = launch.parser(__doc__, config='what to compile')
    p.add_argument('--topology', default='',
                   help='GENERATION-SIZE, such as v5e-16 (the default), v6e-64, v5p-128, or h100-8, a100-8, h200-16; '
                        f'several with --all, in their order (default: {",".join(readiness.ORDER)})')
    p.add_argument('--all', action='store_true', help='compile every published configuration for docs/readiness.md, '
                   'row by row; rows that are there already are kept. The same command may be started several times: '
                   'they share the rows that are left')
    p.add_argument('--mesh', choices=('sweep',), help='compile the step for every split of the slice, each with the '
                   'fewest microbatches that fit, and name the quickest')
    p.add_argument('--only', metavar='PROGRAM', help='one of the programs: step, sampler, ...; with --all a '
                   'regex, configurations in whose path it is found')
    p.add_argument('--fast', action='store_true',
                   help='compile the step in a quarter of the time to a slower program (TPU): its time means nothing, '
                        'its memory is about the same')
    p.add_argument('--json', metavar='FILE', help='also write the reports there')
    args, config = launch.parse(p, optional='--all' in sys.argv)
    if args.all:
        return compile_all(args.topology, args.json or readiness.ROWS, args.only or '')
    target = slices.named(args.topology or 'v5e-16')
    if args.mesh == 'sweep':
        return compile_meshes(args.config, config, target, fast=args.fast)
    if not config.accumulate or fitting.remat_is_open(config):
        config = fitting.fitted(config, mesh_of(config, target.devices), build,
                                lambda program: compile_program(program, target), present=False, fast=args.fast)
        print(f'{args.config} on {target.name}: accumulate={config.accumulate}, remat={config.model.get("remat")} is '
              'the least that fits', flush=True)
    reports: dict[str, Report] = {}
    for program, report in compile_config(config, target, only=args.only, fast=args.fast):
        reports[program] = report
        print(describe(f'{args.config} {program}', report, target), flush=True)
        if args.json:
            with open(args.json, 'w') as file:
                json.dump({'topology': target.name, 'programs': reports}, file, indent=1)
    if not reports:
        raise ValueError(f'--only={args.only}: the run has no such program')
    if len(reports) > 1:
        print(describe_run(args.config, config, reports, target), flush=True)
    for program in programs_of(config, target, fast=args.fast):
        if program.name in reports and not reports[program.name]['fits']:
            raise ValueError(f'{args.config} {program.name} does not fit {target.name}: {program.knobs}, or take a '
                             'larger slice')


if __name__ == '__main__':
    launch.main(main)

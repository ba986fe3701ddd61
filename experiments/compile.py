"""Compiles a config's training step and sampler for a TPU slice that is not here, with the real TPU compiler.

    pip install -e ".[tpu]"
    python -m experiments.compile --config=configs/dlc/generator_imagenet.py --topology=v5e-16

Prints bytes a chip against its HBM, collectives and a time estimate's ingredients. Needs no TPU and no data.
"""
import dataclasses
import json
import os
import re
import time
from typing import Any

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no metadata server to ask
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # nothing is run, so two compilations may share a machine
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.linen as nn
import jax
import ml_collections
from jax.experimental.topologies import get_topology_desc

from experiments.runtime import launch, partition
from experiments.runtime import mesh as mesh_lib
from experiments.train import build

# Names count chips for v5e and v6e but TensorCores, two a chip, for v4 and v5p, as Google Cloud does.
_FLAT = {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBE = {8: '2x2x1', 16: '2x2x2', 32: '2x2x4', 64: '2x4x4', 128: '4x4x4', 256: '4x4x8', 512: '4x8x8'}
GENERATIONS = {  # grid of each slice, HBM GiB a chip, peak bf16 TFLOP/s a chip
    'v4': (_CUBE, 32, 275),
    'v5e': (_FLAT, 16, 197),
    'v5p': (_CUBE, 95, 459),
    'v6e': (_FLAT, 32, 918),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice by name: its devices, and one chip's memory and peak."""
    name: str
    devices: tuple
    hbm_bytes: int
    peak_flops: float


def tpu_slice(name: str) -> Slice:
    """The slice `name`, such as 'v5e-16'.

    Raises:
        ValueError: no such slice, or no TPU compiler installed.
    """
    match = re.fullmatch(r'(v\w+)-(\d+)', name)
    if not match or match[1] not in GENERATIONS:
        raise ValueError(f'--topology={name!r}: write GENERATION-SIZE with a generation of {tuple(GENERATIONS)}, such as v5e-16')
    grids, gib, tflops = GENERATIONS[match[1]]
    if int(match[2]) not in grids:
        raise ValueError(f'--topology={name!r}: sizes of {match[1]} are {tuple(grids)}')
    options = {'chip_config_name': 'megacore'} if match[1] == 'v4' else {}  # one device a chip, not one a core
    try:
        topology = get_topology_desc(platform='tpu', topology_name=f'{match[1]}:{grids[int(match[2])]}', **options)
    except Exception as error:
        raise ValueError(f"no TPU compiler for {name}: pip install -e '.[tpu]' ({str(error).splitlines()[0]})") from error
    return Slice(name, tuple(topology.devices), gib * 2 ** 30, tflops * 1e12)


def report(executable: Any, target: Slice, seconds: float) -> dict[str, Any]:
    """What the compiler says of one program, for one chip."""
    memory, cost = executable.memory_analysis(), executable.cost_analysis()
    used = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes)
    text = executable.as_text()
    kinds = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
    return {
        'bytes_per_chip': used, 'arguments': memory.argument_size_in_bytes, 'temporaries': memory.temp_size_in_bytes,
        'hbm_bytes': target.hbm_bytes, 'share_of_hbm': used / target.hbm_bytes, 'flops_per_chip': cost.get('flops'),
        'collectives': {kind: n for kind in kinds if (n := len(re.findall(rf'{kind}(?:-start)?\(', text)))},
        'compile_seconds': seconds,
    }


def compile_config(config: ml_collections.ConfigDict, target: Slice, *, sampler: bool = True) -> dict[str, dict[str, Any]]:
    """{'step': report, 'sampler': report} of `config` on `target`; 'sampler' only where the model is sampled from."""
    mesh = mesh_lib.make_mesh(config.mesh, target.devices)
    experiment = build(config, mesh)
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    shardings = partition.state_shardings(state, experiment.rules, mesh)
    batch, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    out = {}

    def compiled(jitted, *args):
        started = time.monotonic()
        with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
            executable = jitted.lower(*args).compile()
        return report(executable, target, time.monotonic() - started)

    out['step'] = compiled(jax.jit(experiment.step, donate_argnums=0, in_shardings=(shardings, batch),
                                   out_shardings=(shardings, everywhere)), state, dict(experiment.batch))
    if sampler and experiment.sampler:
        out['sampler'] = compiled(jax.jit(experiment.sampler, in_shardings=(shardings.params, everywhere), out_shardings=batch),
                                  state.params, jax.eval_shape(jax.random.key, 0))
    return out


def main() -> None:
    p = launch.parser(__doc__, config='what to compile')
    p.add_argument('--topology', default='v5e-16', help='GENERATION-SIZE, such as v5e-16, v6e-64, v5p-128')
    p.add_argument('--no_sampler', action='store_true', help='the training step alone')
    p.add_argument('--json', metavar='FILE', help='also write the reports there')
    args, config = launch.parse(p)
    target = tpu_slice(args.topology)
    reports = compile_config(config, target, sampler=not args.no_sampler)
    gib = 2 ** 30
    for name, r in reports.items():
        print(f'{name:8s} {target.name} ({len(target.devices)} chips)  {r["bytes_per_chip"] / gib:7.2f} GiB a chip of '
              f'{r["hbm_bytes"] / gib:.0f} ({r["share_of_hbm"]:.0%}: arguments {r["arguments"] / gib:.2f}, temporaries '
              f'{r["temporaries"] / gib:.2f})  compiled in {r["compile_seconds"]:.0f} s  collectives {r["collectives"]}')
    if args.json:
        with open(args.json, 'w') as file:
            json.dump({'topology': target.name, **reports}, file, indent=1)
    full = [name for name, r in reports.items() if r['share_of_hbm'] > 1]
    if full:
        raise ValueError(f'{full[0]} does not fit {target.name}: raise mesh.fsdp or accumulate, set model.remat, or take a larger slice')


if __name__ == '__main__':
    launch.main(main)

"""TPU slices by name, for compiling without them: their chips, and what one chip can do."""
import dataclasses
import re

from jax.experimental.topologies import get_topology_desc

GIB = 2 ** 30

# Names count chips for v5e and v6e but TensorCores, two a chip, for v4 and v5p, as Google Cloud does.
_FLAT = {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBE = {8: '2x2x1', 16: '2x2x2', 32: '2x2x4', 64: '2x4x4', 128: '4x4x4', 256: '4x4x8', 512: '4x8x8'}


@dataclasses.dataclass(frozen=True)
class Generation:
    """One chip, from Google Cloud's pages on each generation.

    Attributes:
        grids: size in a slice's name -> topology.
        hbm_gib: memory.
        tflops: peak of bfloat16 products, TFLOP/s.
        hbm_gbs: memory bandwidth, GB/s.
        ici_gbs: interconnect bandwidth of all links together, GB/s.
        flops_per_cycle: bfloat16 FLOPs of its matrix units a cycle; with the peak it gives the clock.
    """
    grids: dict[int, str]
    hbm_gib: int
    tflops: float
    hbm_gbs: float
    ici_gbs: float
    flops_per_cycle: int


GENERATIONS = {
    'v4': Generation(_CUBE, 32, 275, 1200, 300, 2 * 8 * 128 ** 2),
    'v5e': Generation(_FLAT, 16, 197, 819, 200, 2 * 4 * 128 ** 2),
    'v5p': Generation(_CUBE, 95, 459, 2765, 600, 2 * 8 * 128 ** 2),
    'v6e': Generation(_FLAT, 32, 918, 1640, 448, 2 * 4 * 256 ** 2),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice by name: its chips, and one chip's bounds.

    Attributes:
        clock: cycles a second.
        ici_bytes: a second, over all links of a chip.
    """
    name: str
    devices: tuple
    hbm_bytes: int
    peak_flops: float
    clock: float = 0.0
    ici_bytes: float = 0.0


def tpu_slice(name: str) -> Slice:
    """The slice `name`, such as 'v5e-16'.

    Raises:
        ValueError: no such slice, or no TPU compiler installed.
    """
    match = re.fullmatch(r'(v\w+)-(\d+)', name)
    if not match or match[1] not in GENERATIONS:
        raise ValueError(f'--topology={name!r}: write GENERATION-SIZE with a generation of {tuple(GENERATIONS)}, '
                         'such as v5e-16')
    chip = GENERATIONS[match[1]]
    if int(match[2]) not in chip.grids:
        raise ValueError(f'--topology={name!r}: sizes of {match[1]} are {tuple(chip.grids)}')
    options = {'chip_config_name': 'megacore'} if match[1] == 'v4' else {}  # one device a chip, not one a core
    try:
        topology = get_topology_desc(platform='tpu', topology_name=f'{match[1]}:{chip.grids[int(match[2])]}', **options)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"no TPU compiler for {name}: pip install -e '.[tpu]' ({why})") from error
    return Slice(name, tuple(topology.devices), chip.hbm_gib * GIB, chip.tflops * 1e12,
                 chip.tflops * 1e12 / chip.flops_per_cycle, chip.ici_gbs * 1e9)

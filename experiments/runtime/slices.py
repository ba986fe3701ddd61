"""TPU slices and GPU machines by name, for compiling without them: their chips, and what one chip can do."""
import dataclasses
import os
import re

from jax.experimental.topologies import get_topology_desc

GIB = 2 ** 30

# Names count chips for v5e and v6e but TensorCores, two a chip, for v4 and v5p, as Google Cloud does.
_FLAT = {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBE = {8: '2x2x1', 16: '2x2x2', 32: '2x2x4', 64: '2x4x4', 128: '4x4x4', 256: '4x4x8', 512: '4x8x8'}
GPUS_PER_HOST = 8
INFINIBAND_GBS = 50  # of a GPU to those of other hosts, one direction: a port of 400 Gb/s each


@dataclasses.dataclass(frozen=True)
class Generation:
    """One TPU chip, from Google Cloud's pages on each generation.

    Attributes:
        grids: size in a slice's name -> topology.
        hbm_gib: memory.
        reserved_gib: of it, which the compiler keeps for itself.
        tflops: peak of bfloat16 products, TFLOP/s.
        hbm_gbs: memory bandwidth, GB/s.
        ici_gbs: interconnect bandwidth of all links together, GB/s.
        flops_per_cycle: bfloat16 FLOPs of its matrix units a cycle; with the peak it gives the clock.
    """
    grids: dict[int, str]
    hbm_gib: int
    reserved_gib: float
    tflops: float
    hbm_gbs: float
    ici_gbs: float
    flops_per_cycle: int


GENERATIONS = {
    'v4': Generation(_CUBE, 32, 1.25, 275, 1200, 300, 2 * 8 * 128 ** 2),
    'v5e': Generation(_FLAT, 16, 0.25, 197, 819, 200, 2 * 4 * 128 ** 2),
    'v5p': Generation(_CUBE, 95, 0.25, 459, 2765, 600, 2 * 8 * 128 ** 2),
    'v6e': Generation(_FLAT, 32, 0.75, 918, 1640, 448, 2 * 4 * 256 ** 2),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU in its SXM form, from NVIDIA's data sheets.

    Attributes:
        name: as the driver gives it.
        compute: capability, (major, minor).
        memory_bytes: of the device.
        tflops: peak of dense bfloat16 products, TFLOP/s.
        hbm_gbs: memory bandwidth, GB/s.
        nvlink_gbs: to the GPUs of its host, both directions together, GB/s.
        cores, clock_ghz, l2_mib: multiprocessors, boost clock, second-level cache.
        shared_kib: shared memory of a multiprocessor.
    """
    name: str
    compute: tuple[int, int]
    memory_bytes: int
    tflops: float
    hbm_gbs: float
    nvlink_gbs: float
    cores: int
    clock_ghz: float
    l2_mib: int
    shared_kib: int


GPUS = {
    'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 85_097_971_712, 312, 2039, 600, 108, 1.41, 40, 164),
    'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 84_942_979_072, 989, 3352, 900, 132, 1.98, 50, 228),
    'h200': Gpu('NVIDIA H200', (9, 0), 150_119_120_896, 989, 4800, 900, 132, 1.98, 50, 228),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips by name, and one chip's bounds.

    Attributes:
        usable_bytes: of its memory, what programs and arrays may take together.
        raise_memory: how to raise that; '' where it cannot be.
        peak_flops: of bfloat16 products, a second.
        clock: cycles a second of the compiler's estimates; 0 where it makes none.
        hbm_bandwidth, network_bandwidth: bytes a second.
    """
    name: str
    devices: tuple
    hbm_bytes: int
    usable_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    network_bandwidth: float
    clock: float = 0.0
    raise_memory: str = ''


def named(name: str) -> Slice:
    """The slice or machine `name`, such as 'v5e-16' or 'h100-8'.

    Raises:
        ValueError: none of that name, or no compiler for it installed.
    """
    match = re.fullmatch(r'([a-z]\w+)-(\d+)', name)
    if not match or match[1] not in (*GENERATIONS, *GPUS):
        raise ValueError(f'--topology={name!r}: write GENERATION-SIZE with a generation of {tuple(GENERATIONS)} or '
                         f'{tuple(GPUS)}, such as v5e-16 or h100-8')
    size = int(match[2])
    return _gpus(name, GPUS[match[1]], size) if match[1] in GPUS else _tpus(name, match[1], size)


def _tpus(name: str, generation: str, size: int) -> Slice:
    chip = GENERATIONS[generation]
    if size not in chip.grids:
        raise ValueError(f'--topology={name!r}: sizes of {generation} are {tuple(chip.grids)}')
    options = {'chip_config_name': 'megacore'} if generation == 'v4' else {}  # one device a chip, not one a core
    try:
        topology = get_topology_desc(platform='tpu', topology_name=f'{generation}:{chip.grids[size]}', **options)
    except Exception as error:
        raise _missing(name, 'tpu', error) from error
    return Slice(name, tuple(topology.devices), chip.hbm_gib * GIB, int((chip.hbm_gib - chip.reserved_gib) * GIB),
                 chip.tflops * 1e12, chip.hbm_gbs * 1e9, chip.ici_gbs * 1e9, chip.tflops * 1e12 / chip.flops_per_cycle)


def _gpus(name: str, gpu: Gpu, size: int) -> Slice:
    if size > GPUS_PER_HOST and size % GPUS_PER_HOST or size < 1:
        raise ValueError(f'--topology={name!r}: up to {GPUS_PER_HOST} GPUs, or a multiple of {GPUS_PER_HOST}')
    hosts, each = max(size // GPUS_PER_HOST, 1), min(size, GPUS_PER_HOST)
    try:
        topology = get_topology_desc(gpu.name, platform='cuda', topology=f'1x{hosts}x{each}',
                                     target_config=_target_config(gpu))
    except Exception as error:
        raise _missing(name, 'cuda', error) from error
    share, network = pool_share(), gpu.nvlink_gbs / 2 if hosts == 1 else INFINIBAND_GBS
    return Slice(name, tuple(topology.devices), gpu.memory_bytes, int(share * gpu.memory_bytes), gpu.tflops * 1e12,
                 gpu.hbm_gbs * 1e9, network * 1e9,
                 raise_memory='' if share > 0.9 else f"JAX's pool is {share:.0%} of a GPU's memory: "
                 'XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment raises it')


def pool_share() -> float:
    """Share of a GPU's memory that JAX takes for its pool, which is where all arrays and programs live."""
    return float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION') or os.environ.get('XLA_CLIENT_MEM_FRACTION') or 0.75)


def _missing(name: str, extra: str, error: Exception) -> ValueError:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"no compiler for {name}: pip install -e '.[{extra}]' ({why})")


def _target_config(gpu: Gpu) -> str:
    """What XLA asks a GPU before it compiles for it, as a text proto."""
    return f'''gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_kib * 1024}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {128 if gpu.compute[0] >= 9 else 64}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.hbm_gbs * 1e9)}
  l2_cache_size: {gpu.l2_mib * 2 ** 20}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {gpu.shared_kib * 1024 - 1024}
  cuda_compute_capability {{ major: {gpu.compute[0]} minor: {gpu.compute[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 20 patch: 0 }}
device_description_str: "{gpu.name}"
'''

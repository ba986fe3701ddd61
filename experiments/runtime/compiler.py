"""Compiler options of training steps: one place for a run and for `experiments.compile`."""
from typing import Any

# On TPU, XLA splits a matrix product with a gathered weight into a loop of products with slices of it as they arrive
# ("windowed einsum"). With weights sharded finely (a DiT-XL/2 over 16 chips: slices of 72 rows) its matrix units then
# stand idle most of the time: 0.425 s a step by the compiler's cycle counts on v5e-16, 0.138 s with weights gathered
# whole ahead of use, at 4 % less memory. The threshold, in MiB of a weight, is above any weight here.
TPU_OPTIONS = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '100000'}

EFFORT = 'exec_time_optimization_effort'  # from -1 to 1
FAST = {EFFORT: -1.0}  # compile sooner, to a slower program (TPU)

# For a GPU that is not here nothing can be timed, and what Triton would need to be timed for is left to cuBLAS.
ABSENT_GPU: dict[str, Any] = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}


def options(platform: str, *, fast: bool = False) -> dict[str, Any] | None:
    """`compiler_options` of a training step for devices of `platform` ('tpu', 'gpu', 'cpu'); None for the defaults.

    Args:
        fast: with `FAST`.
    """
    if platform != 'tpu':
        return None
    return TPU_OPTIONS | (FAST if fast else {})

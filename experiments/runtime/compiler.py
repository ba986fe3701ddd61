"""Compiler options of programs whose weights lie split over devices, steps above all: one place for a run and for
`experiments.compile`."""
from typing import Any

from jax.sharding import Mesh

# On TPU, XLA splits a matrix product with a gathered weight into a loop of products with slices of it as they arrive
# ("windowed einsum"). With weights sharded finely (a DiT-XL/2 over 16 chips: slices of 72 rows) its matrix units then
# stand idle most of the time: 0.425 s a step by the compiler's cycle counts on v5e-16, 0.138 s with weights gathered
# whole ahead of use, at 4 % less memory; scores of a reward model of 2.8b there 0.193 and 0.064 s, LLaDA-8B's codes and
# their images on v6e-8 262 and 87 s. The threshold, in MiB of a weight, is above any weight here.
TPU_OPTIONS = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '100000'}

# On TPU v4 and v5p, gradients scattered over groups of four chips end the compiler with a failed check of its own
# ("rotated_pincer_fusion_emitter.cc: s_count.has_value()", libtpu of JAX 0.10.2) for some numbers of rows, such as the
# 126,606 of LLaDA's vocabulary and codes. Reduced first and scattered then, they cost LLaMA-8B's fine-tuning on v5p-8
# 1.4 % more memory and 1.7 % more traffic, DiT-XL/2's training nothing.
SCATTER_APART = {'xla_tpu_enable_all_reduce_scatter_fusion': 'false'}

EFFORT = 'exec_time_optimization_effort'  # from -1 to 1
FAST = {EFFORT: -1.0}  # compile sooner, to a slower program (TPU)

# For a GPU that is not here nothing can be timed, and what Triton would need to be timed for is left to cuBLAS.
ABSENT_GPU: dict[str, Any] = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}


def options(mesh: Mesh, *, fast: bool = False) -> dict[str, Any] | None:
    """`compiler_options` of a program over `mesh`; None for the defaults.

    Args:
        fast: with `FAST`.
    """
    device = mesh.devices.flat[0]
    if device.platform != 'tpu':
        return None
    fours = mesh.shape['fsdp'] == 4 and device.device_kind in ('TPU v4', 'TPU v5')
    return TPU_OPTIONS | (SCATTER_APART if fours else {}) | (FAST if fast else {})

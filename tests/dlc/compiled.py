"""Programs compiled as a user's are, in a suite whose other programs are not optimized (see conftest.py)."""
import functools

import jax

optimized = functools.partial(jax.jit, compiler_options={
    'xla_backend_optimization_level': 3, 'xla_llvm_disable_expensive_passes': False,
    'xla_cpu_use_fusion_emitters': True})

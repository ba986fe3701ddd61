"""Programs that run for seconds, optimized as far as pays, where a test's others are not (see conftest.py)."""
import functools

import jax

optimized = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 1})

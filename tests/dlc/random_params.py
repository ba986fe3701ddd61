"""Parameters for tests without running a model's initialisers, whose compilation takes longer than most tests."""
import jax
import numpy as np

from rlhf_jax.weights.rules import flatten, param_shapes, unflatten


def random_params(module, *args, seed=0, std=0.2):
    """Normal(0, std), norms' scales and gains about 1; the shapes of `module.init(key, *args)`."""
    rng = np.random.default_rng(seed)
    flat = {name: rng.normal(float(name.endswith(('scale', 'gain'))), std, leaf.shape).astype(leaf.dtype)
            for name, leaf in flatten(param_shapes(module, *args)).items()}
    return jax.tree.map(jax.numpy.asarray, unflatten(flat))

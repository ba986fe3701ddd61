"""Tiny language models with random parameters; no initialiser is run, compiling them takes longer than most tests."""
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.gpt_neox import GPTNeoX
from rlhf_jax.models.layers import RopeScaling
from rlhf_jax.models.llama import Llama
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten

MODELS = {
    'gpt2': GPT2(vocab_size=19, width=16, depth=2, num_heads=2, max_length=48),
    'gpt_neox': GPTNeoX(vocab_size=19, width=16, depth=2, num_heads=2, rotary_fraction=0.5),
    'llama': Llama(vocab_size=19, width=16, depth=2, num_heads=4, num_kv_heads=2, hidden=24,
                   rope_scaling=RopeScaling('llama3', 4.0, original_length=16)),
}


def random_params(module, *, seed=0, std=0.3):
    """Normal(0, std), norms' scales about 1; float32 whatever `param_dtype` is."""
    rng = np.random.default_rng(seed)
    flat = {name: rng.normal(float(name.endswith('scale')), std, leaf.shape).astype(np.float32)
            for name, leaf in flatten(param_shapes(module, np.zeros((1, 1), np.int32))).items()}
    return jax.tree.map(jnp.asarray, unflatten(flat))

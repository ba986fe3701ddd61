"""How many completions are decoded at a time: a rollout batch in waves of prompts that fit the memory of a device.

A completion has a key of its own, so that a batch in waves has the tokens of the batch in one; log-probabilities may
differ in their last bits, as products of other numbers of rows do.
"""
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from experiments.rlhf.models import architecture
from experiments.runtime import mesh as mesh_lib
from experiments.runtime import partition
from rlhf_jax.models import attention, decoder

GIB = 2 ** 30


def count(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """The least number of waves that divides a device's prompts and whose sampler takes no more than `rollout.memory`
    beside its weights; a prompt at a time if none does. 1 where that is 0, without a limit.

    Args:
        mesh: of the devices that generate.
    """
    prompts, limit = config.batch_size // mesh_lib.batch_shards(mesh), config.rollout.memory * GIB
    if not limit:
        return 1
    fitting = (waves for waves in range(1, prompts + 1) if prompts % waves == 0 and
               wave_bytes(config, prompts // waves, mesh) <= limit)
    return next(fitting, prompts)


def budgeted(config: ml_collections.ConfigDict, usable: float,
             resident: Sequence[Any]) -> ml_collections.ConfigDict:
    """`config` with the `rollout.memory` that it leaves open: what a device that offers `usable` bytes has left beside
    `resident`, trees of `jax.ShapeDtypeStruct` with shardings; a twentieth of the device is kept back.

    From shapes alone, so that all processes, and `experiments.compile`, find the same.
    """
    if config.rollout.memory or math.isinf(usable):
        return config
    held = sum(partition.bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree)) for tree in resident)
    config = config.copy_and_resolve_references()
    config.rollout.memory = max(0.95 * usable - held, 1.0) / GIB
    return config


def wave_bytes(config: ml_collections.ConfigDict, prompts: int, mesh: Mesh) -> float:
    """Bytes a device that the sampler takes beside its weights, at the longest, for so many prompts on it: the larger
    of its two halves.

    Prefill keeps every layer's keys and values twice (as computed, and as cache) and, where attention is not fused,
    one layer's scores; decoding keeps the prompts' cache and the completions', and logits in float32. A TPU whose rows
    of the cache are padded (heads of 80 in 128 lanes) was seen to keep the prompts' once more.
    """
    module, sampling = architecture.decoder(config.model), config.sampling
    platform = mesh.devices.flat[0].platform
    heads, tensor = module.num_heads, mesh.shape['tensor']
    kv_heads, dim = getattr(module, 'num_kv_heads', 0) or heads, getattr(module, 'head_dim', 0) or module.width // heads
    with jax.set_mesh(mesh), nn.logical_axis_rules(mesh_lib.LOGICAL_RULES):
        beside = decoder.heads_beside(kv_heads, dim)
        query = jax.ShapeDtypeStruct((1, sampling.max_prompt, heads, dim), module.dtype)
        fused = attention.choose(module.attention_impl, query) != 'xla'
    width, slots = np.dtype(module.dtype).itemsize, sampling.max_prompt + sampling.max_new_tokens - 1
    lanes = 128 if platform == 'tpu' else 1  # arrays have a multiple of so many numbers along their last axis
    row = math.ceil(beside * dim / lanes) * lanes
    copies = 2 if row > beside * dim else 1
    cache = 2 * module.depth * kv_heads / beside / tensor * slots * row * width
    scores = 0 if fused else heads / tensor * sampling.max_prompt ** 2 * (4 + width)
    hidden = sampling.max_prompt * (getattr(module, 'hidden', 0) or 4 * module.width) / tensor * width * 2
    num_samples = config.algorithm.num_samples
    logits = 3 * 4 * math.ceil(module.vocab_size / 128) * 128
    if config.algorithm.mask.top_p:  # the mask policy reads the same
        cache, logits = 2 * cache, 2 * logits
    return prompts * max(2 * cache + scores + hidden, (copies + num_samples) * cache + num_samples * logits)

"""What the rows of `benchmarks/rlhf.py` train and sample: GPT-NeoX policies of random weights, an Online-DPO step."""
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import random_params
from rlhf_jax import logprobs, losses
from rlhf_jax.models import layers
from rlhf_jax.models.decoder import split_blocks
from rlhf_jax.models.gpt_neox import SIZES, GPTNeoX

Array = jax.Array

BETA, LEARNING_RATE = 0.1, 1e-6
OPTIMIZER = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.01)


def policy(shape: str | Mapping[str, Any], *, bf16: bool = False, **fields: Any) -> GPTNeoX:
    """A model of `gpt_neox.SIZES`, or of the fields given; computes in bfloat16 or float32."""
    shape = SIZES[shape] if isinstance(shape, str) else shape
    return GPTNeoX(**shape, dtype=jnp.bfloat16 if bf16 else jnp.float32, **fields)


def params_of(module: Any) -> Any:
    """Random ones, every one of them."""
    return random_params(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])


def params_on_device(module: Any) -> Any:
    """Initial ones, drawn where they are used: a model of 2.8b parameters is 11 GB on the host."""
    return jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']


def num_params(module: Any) -> int:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(x.size for x in jax.tree.leaves(shapes))


def prompts(module: GPTNeoX, batch: int, length: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask, [B, P], without padding."""
    tokens = np.random.default_rng(seed).integers(0, module.vocab_size, (batch, length)).astype(np.int32)
    return tokens, np.ones_like(tokens, bool)


def response_logprobs(module: GPTNeoX, params: Any, tokens: Array, length: int) -> Array:
    """Log-probabilities [..., L] of the last `length` of `tokens` [..., T]; only their logits are computed."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    hidden = module.apply({'params': params}, rows, output='hidden')[:, -length - 1:-1]
    logits = layers.logits(hidden, params['lm_head']['kernel'], dtype=module.dtype)
    return logprobs.token_logprobs(logits, rows[:, -length:]).reshape(*tokens.shape[:-1], length)


def online_dpo_loss(module: GPTNeoX, params: Any, ref_logprobs: Array, batch: Mapping[str, Array]) -> Array:
    """Of a batch of two samples a prompt, [B, 2, ...], without padding."""
    new = response_logprobs(module, params, batch['tokens'], batch['mask'].shape[-1])
    return losses.online_dpo(new, ref_logprobs, batch['mask'], batch['rewards'], beta=BETA)[0]


@functools.partial(jax.jit, static_argnames=('module', 'parts'), donate_argnames=('params', 'opt_state'))
def dpo_step(module: GPTNeoX, params: Any, opt_state: Any, reference: Any, batch: Mapping[str, Array],
             parts: int = 1) -> tuple[Any, Any, Array]:
    """Forward of the reference, forward and backward of the policy, AdamW; `parts` microbatches of whole pairs."""
    def grad(part):
        ref = response_logprobs(module, reference, part['tokens'], part['mask'].shape[-1])
        return jax.value_and_grad(lambda p: online_dpo_loss(module, p, ref, part))(params)

    if parts == 1:
        loss, grads = grad(batch)
    else:
        total = lambda carry, part: (jax.tree.map(jnp.add, carry, grad(part)), None)
        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        out, _ = jax.lax.scan(total, zeros, {name: _split_pairs(x, parts) for name, x in batch.items()})
        loss, grads = jax.tree.map(lambda x: x / parts, out)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def _split_pairs(x: Array, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...]: whole prompts, with both of their samples."""
    return x.reshape(parts, -1, *x.shape[1:])


class Learner:
    """Policy, optimizer and reference; `step` trains on a batch and waits, `launch` does not."""

    def __init__(self, module: GPTNeoX, params: Any, reference: Any, parts: int = 1):
        self.module, self.params, self.reference = module, jax.tree.map(jnp.copy, params), reference
        self.parts, self.opt_state = parts, jax.jit(OPTIMIZER.init)(self.params)

    def launch(self, batch: Mapping[str, Any]) -> Any:
        """The new parameters; they are gone with the next call."""
        batch = {name: batch[name] for name in ('tokens', 'mask', 'rewards')}
        self.params, self.opt_state, _ = dpo_step(self.module, self.params, self.opt_state, self.reference, batch,
                                                  self.parts)
        return self.params

    def step(self, batch: Mapping[str, Any]) -> None:
        jax.block_until_ready(self.launch(batch))


class Decoding:
    """A policy as it samples: `convert` casts its weights and lays them out a tree a block."""

    def __init__(self, module: GPTNeoX):
        self.module = module.clone(stacked=False)
        self.convert = jax.jit(lambda params: split_blocks(module, params, dtype=module.dtype)[1])


def pairs(module: GPTNeoX, rows: int, length: int, response: int) -> dict[str, np.ndarray]:
    """A batch of `rows / 2` prompts with two samples each, [B, 2, ...]; the first of each pair is the better one."""
    tokens = prompts(module, rows, length)[0].reshape(rows // 2, 2, length)
    tokens[:, 1, :-response] = tokens[:, 0, :-response]
    return {'tokens': tokens, 'mask': np.ones((rows // 2, 2, response), bool),
            'rewards': np.tile(np.array([1, 0], np.float32), (rows // 2, 1))}


def forward_flops(module: GPTNeoX, rows: int, length: int, logits: int) -> float:
    """Of the products in a forward of [rows, length], with logits of the last `logits` tokens; 2 a multiply-add."""
    width = module.width
    blocks = module.depth * (24 * length * width ** 2 + 4 * length ** 2 * width)
    return rows * (blocks + 2 * logits * width * module.vocab_size)


def decode_bytes(module: GPTNeoX, rows: int, prompt: int, new: int) -> float:
    """Bytes that decoding `new - 1` tokens must read: the weights for each, and the slots of the cache written so far.

    The embedding table is not counted (a step reads a row of it a sequence), nor what is written.
    """
    item = jnp.dtype(module.dtype).itemsize
    weights = num_params(module) - module.vocab_size * module.width
    slots = sum(range(prompt + 1, prompt + new))
    return item * ((new - 1) * weights + 2 * module.depth * rows * module.width * slots)

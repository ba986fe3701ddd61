"""SEM encoder: DINOv2's vision transformer whose class token passes through discrete simplices (arXiv 2507.12318 §4).

Class token and registers, before the final layer norm, are projected to L groups of V logits. A layer norm over all
L * V of them together and a softmax in each group give the simplicial embedding, SEM (arXiv 2204.00616); its arg max
is the discrete latent code, DLC. For training, the SEM is projected back to the width of the class token.
"""
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dlc_jax.models import vit

Array = jax.Array

FORMS = ('plain', 'shared', 'pos_shared')

# The matrices to and from L * V logits outweigh the whole transformer, and one row a crop goes through them: so each
# device keeps its own columns of V and sees every row of its `fsdp` group, rather than gathering the matrices.
PARTITION_RULES = (
    (r'sem_embed/kernel', P(None, 'tensor', 'fsdp')),
    (r'sem_norm/(scale|bias)', P('tensor', 'fsdp')),
    (r'sem_out/kernel', P('tensor', 'fsdp', None)),
    (r'sem_out_shared/kernel', P('fsdp', None)),
    (r'sem_bias', P()),
) + vit.PARTITION_RULES


@flax.struct.dataclass
class SEMOutput:
    """Output of the encoder for a batch of images. Fields marked * are None when only codes were asked for.

    Attributes:
        cls: * [B, D] the class token rebuilt from `sem`, after the final layer norm.
        registers, patches, prenorm: * as in `vit.ViTOutput`; they do not pass through SEM.
        logits: [B, L, V] float32, before the temperature.
        sem: [B, L, V] float32, softmax over V of logits / temperature.
        dlc: [B, L] int32, arg max over V of logits; the lowest index on ties.
    """
    cls: Array | None
    registers: Array | None
    patches: Array | None
    prenorm: Array | None
    logits: Array
    sem: Array
    dlc: Array


class JointLayerNorm(nn.Module):
    """Layer norm over the last two axes together, in and out in float32. Parameters: `scale`, `bias` [L, V]."""
    eps: float = 1e-6
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-2:]
        scale = self.param('scale', nn.initializers.ones, shape, self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - x.mean((-2, -1), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, (-2, -1), keepdims=True) + self.eps)
        return x * scale.astype(jnp.float32) + bias.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exact_dot(x: Array, kernel: Array, dims: Any) -> Array:
    """`lax.dot_general` with sums in float32 whatever the compute dtype, and no TF32 or bf16 passes for float32.

    A near tie between two logits decides a token of the code. No gradient is that delicate: the backward pass computes
    in the dtype of `x`.
    """
    return jax.lax.dot_general(x, kernel, dims, precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=jnp.float32)


def _exact_dot_bwd(dims, kept, gradient):
    x, kernel = kept
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    plain = functools.partial(jax.lax.dot_general, dimension_numbers=dims, precision=precision)
    return jax.vjp(plain, x, kernel)[1](gradient.astype(x.dtype))


exact_dot.defvjp(lambda x, kernel, dims: (exact_dot(x, kernel, dims), (x, kernel)), _exact_dot_bwd)


class SEMEncoder(vit.VisionTransformer):
    """Vision transformer, with the same parameters under the same names, and the SEM bottleneck on its class token.

    Attributes:
        num_codes: L.
        vocab_size: V.
        temperature: of the softmax; a call may use another.
        form: how SEM returns to width D. 'plain' (the released models): one matrix on all L * V values. 'shared': one
            V x D matrix on every position, averaged. 'pos_shared': that and a learned vector a position, `sem_bias`.
            The original's 'pos_shared' returned the bare SEM in evaluation mode, which its teacher could not train on;
            here it is the same in both modes.

    The original also allocates a `sem_cls_norm` (2 D values) that nothing reads; it does not exist here.
    """
    num_codes: int = 512
    vocab_size: int = 256
    temperature: float = 1.0
    form: str = 'plain'

    @nn.compact
    def __call__(self, images: Array, masks: Array | None = None, *, train: bool = False,  # type: ignore[override]
                 temperature: float | Array | None = None, only_codes: bool = False) -> SEMOutput:
        """Encodes images.

        Args:
            images: [B, H, W, C] float, normalised; H and W divisible by `patch_size`.
            masks: [B, N] bool; True replaces a patch by the mask token.
            train: drop paths (rng stream 'dropout').
            temperature: instead of the module's; may be traced.
            only_codes: skip the way back from SEM and the normalised tokens; then `sem_out`, `sem_bias` and `norm` need
                not be in the parameters.

        Raises:
            ValueError: unknown `form`, a temperature that is not positive, image or mask of the wrong size.
        """
        if self.form not in FORMS:
            raise ValueError(f'form={self.form!r} is not one of {FORMS}')
        temperature = self.temperature if temperature is None else temperature
        if isinstance(temperature, (int, float)) and temperature <= 0:
            raise ValueError(f'temperature={temperature} must be positive; near 0 gives one-hot SEMs')
        tokens = self.encode_tokens(images, masks, train)
        first = 1 + self.num_registers
        embed = nn.DenseGeneral(
            (self.num_codes, self.vocab_size), use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=vit.torch_default_init, dot_general=lambda x, kernel, dims, **_: exact_dot(x, kernel, dims),
            name='sem_embed')
        rows = nn.with_logical_constraint(tokens[:, :first].reshape(len(tokens), -1), ('rows', 'embed'))
        logits = nn.with_logical_constraint(embed(rows), ('rows', 'codes', 'vocab'))
        logits = JointLayerNorm(param_dtype=self.param_dtype, name='sem_norm')(logits)
        sem = jax.nn.softmax(logits / temperature)
        dlc = jnp.argmax(logits, -1).astype(jnp.int32)
        if only_codes:
            return SEMOutput(None, None, None, None, logits, sem, dlc)
        norm = self.final_norm()
        normed = norm(tokens)
        cls = nn.with_logical_constraint(self._project_back(sem), ('batch', 'embed'))
        return SEMOutput(cls=norm(cls), registers=normed[:, 1:first], patches=normed[:, first:],
                         prenorm=tokens, logits=logits, sem=sem, dlc=dlc)

    def codes(self, images: Array) -> Array:
        """DLC [B, L] int32 of `images`: `module.apply({'params': params}, images, method='codes')`."""
        return self(images, only_codes=True).dlc

    @nn.nowrap
    def _project_back(self, sem: Array) -> Array:
        """Projects SEMs back to the width of the tokens: [B, L, V] -> [B, D]."""
        fields = dict(use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
                      kernel_init=vit.torch_default_init)
        if self.form == 'plain':
            return nn.DenseGeneral(self.width, axis=(-2, -1), name='sem_out', **fields)(sem)
        # The mean over positions commutes with the shared matrix, so it comes first: one row a sample, not L.
        out = nn.Dense(self.width, name='sem_out_shared', **fields)(sem.mean(1))
        if self.form == 'pos_shared':
            bias = self.param('sem_bias', nn.initializers.normal(0.02), (self.num_codes, self.width), self.param_dtype)
            out = out + bias.astype(jnp.float32).mean(0).astype(self.dtype)
        return out

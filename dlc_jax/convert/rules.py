"""Rules between state dicts and parameter trees: those of the language half (see `rlhf_jax.convert.rules`), and the
codecs of convolutions."""
from rlhf_jax.convert.rules import (FLAT, SAME, Codec, Fixed, Rule, Rules, Tensors, Tied, dense, flatten, linear, norm,
                                    param_shapes, tensor_shapes, to_flax, to_torch, unflatten)
from rlhf_jax.convert.state_dict import (Renamed, num_blocks, original, shape_of, strip_prefixes, to_numpy, where,
                                         without_prefixes)

__all__ = ['CONV', 'FLAT', 'SAME', 'Codec', 'Fixed', 'Renamed', 'Rule', 'Rules', 'Tensors', 'Tied', 'dense', 'flatten',
           'linear', 'norm', 'num_blocks', 'original', 'param_shapes', 'patch_conv', 'shape_of', 'strip_prefixes',
           'tensor_shapes', 'to_flax', 'to_numpy', 'to_torch', 'unflatten', 'where', 'without_prefixes']

# Convolution: (O, I, h, w) <-> (h, w, I, O).
CONV = Codec(lambda t, shape: t.transpose(2, 3, 1, 0), lambda p: p.transpose(3, 2, 0, 1))


def patch_conv(size: int) -> Codec:
    """Convolution (O, I, p, p) of stride p <-> dense kernel [p * p * I, O] on patches as (row, column, channel)."""
    return Codec(lambda t, shape: t.transpose(2, 3, 1, 0).reshape(shape),
                 lambda p: p.reshape(size, size, -1, p.shape[-1]).transpose(3, 2, 0, 1))

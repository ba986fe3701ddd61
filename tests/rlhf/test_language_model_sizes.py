"""The named sizes have as many parameters as the published models."""
import math

import numpy as np
import pytest

from rlhf_jax.weights.rules import flatten, param_shapes
from rlhf_jax.models.gpt2 import GPT2, SIZES as GPT2_SIZES
from rlhf_jax.models.gpt_neox import GPTNeoX, SIZES as PYTHIA_SIZES
from rlhf_jax.models.llama import Llama, SIZES as LLAMA_SIZES

PUBLISHED = [
    *((GPT2(vocab_size=50257, **GPT2_SIZES[size]), size, count) for size, count in {
        '124M': 124_439_808, '355M': 354_823_168, '774M': 774_030_080, '1.5B': 1_557_611_200}.items()),
    *((GPTNeoX(**PYTHIA_SIZES[size]), size, count) for size, count in {
        '70m': 70_426_624, '160m': 162_322_944, '410m': 405_334_016, '1b': 1_011_781_632, '1.4b': 1_414_647_808,
        '2.8b': 2_775_208_960, '6.9b': 6_857_302_016, '12b': 11_846_072_320}.items()),
    *((Llama(**LLAMA_SIZES[size]), size, count) for size, count in {
        '7B': 6_738_415_616, '13B': 13_015_864_320, '30B': 32_528_943_616, '65B': 65_285_660_672,
        '2-7B': 6_738_415_616, '2-13B': 13_015_864_320, '2-70B': 68_976_648_192, '3-8B': 8_030_261_248,
        '3.1-8B': 8_030_261_248, '3.1-70B': 70_553_706_496, '3.2-1B': 1_235_814_400, '3.2-3B': 3_212_749_824,
        'TinyLlama-1.1B': 1_100_048_384, 'Rho-1B': 1_100_048_384, 'LLaDA-8B': 8_015_581_184}.items()),
]


@pytest.mark.parametrize('module, size, count', PUBLISHED, ids=[f'{type(m).__name__}-{s}' for m, s, _ in PUBLISHED])
def test_number_of_parameters(module, size, count):
    shapes = flatten(param_shapes(module, np.zeros((1, 1), np.int32)))
    assert sum(math.prod(x.shape) for x in shapes.values()) == count


def test_every_named_size_is_checked():
    assert {size for _, size, _ in PUBLISHED} == {*GPT2_SIZES, *PYTHIA_SIZES, *LLAMA_SIZES}

"""The named sizes have as many parameters as the published models."""
import math

import numpy as np
import pytest

from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.gpt2 import SIZES as GPT2_SIZES
from rlhf_jax.models.gpt_neox import SIZES as PYTHIA_SIZES
from rlhf_jax.models.gpt_neox import GPTNeoX
from rlhf_jax.models.llama import SIZES as LLAMA_SIZES
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.mistral import SIZES as MISTRAL_SIZES
from rlhf_jax.models.qwen2 import SIZES as QWEN2_SIZES
from rlhf_jax.models.qwen3 import SIZES as QWEN3_SIZES
from rlhf_jax.weights.rules import flatten, param_shapes

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
    *((Llama(**MISTRAL_SIZES[size]), size, count) for size, count in {
        '7B-v0.1': 7_241_732_096, '7B-v0.2': 7_241_732_096, '7B-v0.3': 7_248_023_552}.items()),
    *((Llama(**QWEN2_SIZES[size]), size, count) for size, count in {
        '2.5-0.5B': 494_032_768, '2.5-1.5B': 1_543_714_304, '2.5-3B': 3_085_938_688, '2.5-7B': 7_615_616_512}.items()),
    *((Llama(**QWEN3_SIZES[size]), size, count) for size, count in {
        '0.6B': 596_049_920, '1.7B': 1_720_574_976, '4B': 4_022_468_096, '8B': 8_190_735_360, '14B': 14_768_307_200,
        '32B': 32_762_123_264}.items()),
]


@pytest.mark.parametrize('module, size, count', PUBLISHED, ids=[f'{type(m).__name__}-{s}' for m, s, _ in PUBLISHED])
def test_number_of_parameters(module, size, count):
    shapes = flatten(param_shapes(module, np.zeros((1, 1), np.int32)))
    assert sum(math.prod(x.shape) for x in shapes.values()) == count


def test_every_named_size_is_checked():
    assert {size for _, size, _ in PUBLISHED} == {*GPT2_SIZES, *PYTHIA_SIZES, *LLAMA_SIZES, *MISTRAL_SIZES,
                                                *QWEN2_SIZES, *QWEN3_SIZES}

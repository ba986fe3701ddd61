"""Greedy responses equal those of `transformers.generate`, and stop where they stop."""
import jax
import numpy as np
import pytest

from hf_twins import KINDS, state_dict, torch, twin
from rlhf_jax import convert
from rlhf_jax.generate import Sampling, generate, pad_prompts

PROMPTS = [[5, 9, 2, 7, 7], [11, 3], [40, 41, 42]]


@pytest.mark.parametrize('name', ['gpt2', 'pythia', 'llama3', 'mistral', 'qwen3'])
def test_greedy(name):
    original = twin(name)
    module, params = convert.from_torch(KINDS[name], state_dict(original), config=original.config.to_dict())
    tokens, mask = pad_prompts(PROMPTS, buckets=(6,))
    settings = dict(attention_mask=torch.tensor(mask).long(), do_sample=False, max_new_tokens=8, pad_token_id=66)
    prompt = torch.tensor(tokens).long()
    free = original.generate(prompt, **settings, eos_token_id=None)[:, 6:].numpy()
    eos = int(free[0, 3])
    want = np.full((3, 8), 66)
    stopped = original.generate(prompt, **settings, eos_token_id=eos)[:, 6:].numpy()
    want[:, :stopped.shape[1]] = stopped
    got = generate(module, params, tokens, mask, jax.random.key(0),
                   Sampling(max_new_tokens=8, temperature=0, stop_tokens=(eos,), pad_token=66))
    np.testing.assert_array_equal(got.tokens[:, 0], want)
    assert got.lengths[0, 0] <= 4

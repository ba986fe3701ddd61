"""A policy that draws only what another finds likely, against the plain formula."""
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import token_mask
from rlhf_jax.generate import Sampling, generate, pad_prompts
from rlhf_jax.models.decoder import split_blocks
from tiny_models import MODELS, random_params

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def plain_set(logits, top_p, min_tokens, stop_tokens):
    """The allowed tokens of one place, one after another."""
    probs = np.exp(np.float64(logits) - np.max(logits))
    probs /= probs.sum()
    out, total = set(stop_tokens), 0.0
    for rank, token in enumerate(np.argsort(-probs)):
        if total >= top_p and rank >= min_tokens:
            break
        out.add(int(token))
        total += probs[token]
    return out


def test_the_set_is_the_fewest_likeliest_and_the_stop_tokens():
    logits = np.random.default_rng(0).normal(0, 2, (4, 6, 19)).astype(np.float32)
    for top_p, min_tokens, stops in ((0.7, 1, ()), (0.7, 5, (2,)), (0.05, 1, (0, 18)), (0.05, 19, ())):
        allowed = token_mask.allowed_tokens(jnp.asarray(logits), jnp.array(stops, jnp.int32), top_p=top_p,
                                            min_tokens=min_tokens)
        for place in np.ndindex(4, 6):
            assert set(np.flatnonzero(allowed[place])) == plain_set(logits[place], top_p, min_tokens, stops)


def test_what_was_drawn_keeps_its_probability_at_the_edge_of_the_set():
    logits, allowed = jnp.arange(11.0)[None], (jnp.arange(11) > 7)[None]
    left = token_mask.masked(logits, token_mask.pack(allowed), jnp.array([7]))
    np.testing.assert_array_equal(left[0], [-np.inf] * 7 + [7, 8, 9, 10])


def test_samples_are_drawn_and_scored_under_the_mask():
    """Every token is of its place's set, and has its share of what the policy gives the set at the temperature."""
    module = MODELS['gpt2']
    weights = {'policy': random_params(module), 'mask': random_params(module, seed=1)}
    split = {name: split_blocks(module, params)[1] for name, params in weights.items()}
    decoder = token_mask.MaskedDecoder(module.clone(stacked=False), top_p=0.6, min_tokens=3, stop_tokens=(4,))
    sampling = Sampling(max_new_tokens=8, temperature=2.0, min_new_tokens=8, stop_tokens=(4,))
    samples = generate(decoder, split, *pad_prompts(PROMPTS, buckets=(8,)), jax.random.key(3), sampling, num_samples=8)
    apply, sizes, outside = jax.jit(module.apply), [], 0
    for b, k in np.ndindex(3, 8):
        response, length = np.asarray(samples.tokens[b, k]), len(PROMPTS[b])
        tokens = np.zeros((1, 24), np.int32)  # one shape to compile
        tokens[0, :length + 8] = [*PROMPTS[b], *response]
        policy, mask = (np.asarray(apply({'params': weights[name]}, tokens)[0, length - 1:length + 7])
                        for name in ('policy', 'mask'))
        for t, token in enumerate(response):
            allowed = sorted(plain_set(mask[t], 0.6, 3, (4,)) - {4})  # too early to stop
            assert token in allowed
            scores = np.float64(policy[t]) / 2
            np.testing.assert_allclose(samples.logprobs[b, k, t],
                                       scores[token] - np.log(np.exp(scores[allowed]).sum()), atol=1e-4)
            sizes.append(len(allowed))
            outside += np.argmax(policy[t]) not in allowed
    assert len(set(sizes)) > 1 and outside > 20  # the mask cuts, and not what the policy would cut

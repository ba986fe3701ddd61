"""The sampler against the full forward, and what makes it end."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generate import Sampling, completion_keys, draw, generate, pad_prompts, rescore, sampling_logits
from rlhf_jax.models.decoder import split_blocks
from tiny_models import MODELS, random_params

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
KEY = jax.random.key(7)
HOT = Sampling(max_new_tokens=6, temperature=2.0)  # shared, as every setting is compiled anew


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    module = MODELS[request.param]
    return module, random_params(module)


@pytest.fixture(scope='module')
def llama():
    return MODELS['llama'], random_params(MODELS['llama'])


@pytest.fixture(scope='module')
def full_forward():
    """(module, params, samples) -> logits [B, K, L, V] that a forward of prompt and response gives."""
    def forward(module, params, samples):
        apply = jax.jit(module.apply)
        shape = samples.tokens.shape
        out = []
        for b, k in np.ndindex(shape[:2]):
            prompt, response = PROMPTS[b], np.asarray(samples.tokens[b, k])
            tokens = np.zeros((1, 24), np.int32)  # one shape to compile
            tokens[0, :len(prompt) + len(response)] = [*prompt, *response]
            logits = apply({'params': params}, tokens)[0]
            out.append(logits[len(prompt) - 1:len(prompt) - 1 + len(response)])
        return jnp.stack(out).reshape(*shape, -1)
    return forward


def run(model, sampling, *, left=True, num_samples=1, key=KEY, bucket=8):
    tokens, mask = pad_prompts(PROMPTS, buckets=(bucket,), left=left)
    return generate(*model, tokens, mask, key, sampling, num_samples=num_samples)


@pytest.mark.parametrize('settings', [
    dict(temperature=2.0), dict(top_k=4, temperature=1.3), dict(top_k=6, top_p=0.7, temperature=2.5),
], ids=str)
def test_logprobs_are_those_of_the_full_forward(llama, full_forward, settings):
    samples = run(llama, Sampling(max_new_tokens=6, **settings), num_samples=2)
    logits = full_forward(*llama, samples)
    want = np.asarray(logits, np.float64) / settings.get('temperature', 1.0)
    order = np.argsort(-want, -1)
    probs = np.exp(want - want.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    rank = np.argsort(order, -1)
    probs = np.where(rank < settings.get('top_k', 19), probs, 0)
    probs /= probs.sum(-1, keepdims=True)
    ranked = np.take_along_axis(probs, order, -1)
    before = np.take_along_axis(ranked.cumsum(-1) - ranked, rank, -1)
    probs = np.where(before < settings.get('top_p', 1.0), probs, 0)
    probs /= probs.sum(-1, keepdims=True)
    picked = np.take_along_axis(probs, np.asarray(samples.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(samples.logprobs, np.log(picked), atol=1e-4)
    assert samples.logprobs.dtype == jnp.float32 and bool(samples.mask.all())
    assert (np.asarray(samples.logprobs) < -1e-3).mean() > 0.5  # the draws were not certain


def test_every_model_samples_what_its_full_forward_says(model, full_forward):
    samples = run(model, Sampling(max_new_tokens=5))
    logp = jax.nn.log_softmax(full_forward(*model, samples))
    want = jnp.take_along_axis(logp, samples.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(samples.logprobs, want, atol=1e-4)


def test_greedy(model, full_forward):
    samples = run(model, Sampling(max_new_tokens=5, temperature=0))
    np.testing.assert_array_equal(samples.tokens, full_forward(*model, samples).argmax(-1))
    np.testing.assert_array_equal(samples.logprobs, 0)


def test_rows_do_not_depend_on_padding_or_company(llama):
    samples, right = run(llama, HOT), run(llama, HOT, left=False)
    np.testing.assert_array_equal(right.tokens, samples.tokens)
    np.testing.assert_allclose(right.logprobs, samples.logprobs, atol=1e-5)
    alone = generate(*llama, *pad_prompts(PROMPTS[1:2], buckets=(11,)), completion_keys(KEY, 3, 1)[1:2], HOT)
    np.testing.assert_array_equal(alone.tokens[0], samples.tokens[1])


def test_samples_of_a_prompt(llama):
    samples = run(llama, HOT, num_samples=3)
    assert samples.tokens.shape == samples.mask.shape == samples.logprobs.shape == (3, 3, 6)
    np.testing.assert_array_equal(samples.tokens[:, :1], run(llama, HOT).tokens)  # the first of each stays what it was
    assert len({tuple(row) for row in np.asarray(samples.tokens[0])}) == 3


def test_completions_are_drawn_with_their_own_keys(llama):
    """Key (b, k) of one key is number k B + b, and keys that are given are used as they are."""
    keys = completion_keys(KEY, 3, 2)
    for b, k in np.ndindex(3, 2):
        assert keys[b, k] == jax.random.fold_in(KEY, 3 * k + b)
    turned = run(llama, HOT, num_samples=2, key=keys[:, ::-1])
    np.testing.assert_array_equal(turned.tokens[:, ::-1], run(llama, HOT, num_samples=2).tokens)


def test_split_weights_sample_the_same(llama):
    split, whole = run(split_blocks(*llama), HOT), run(llama, HOT)
    np.testing.assert_array_equal(split.tokens, whole.tokens)
    np.testing.assert_allclose(split.logprobs, whole.logprobs, atol=1e-5)


def test_stop_tokens_end_a_row_and_pad_may_be_one_of_them(llama):
    free = np.asarray(run(llama, HOT).tokens)[:, 0]
    stops = (int(free[0, 2]), int(free[1, 4]))
    samples = run(llama, dataclasses.replace(HOT, stop_tokens=stops, pad_token=stops[0]))
    samples = jax.tree.map(lambda x: x[:, 0], samples)
    for row, lengths in enumerate(np.asarray(samples.lengths)):
        ends = [t for t in range(6) if free[row, t] in stops]
        length = ends[0] + 1 if ends else 6
        assert lengths == length
        np.testing.assert_array_equal(samples.tokens[row], [*free[row, :length], *[stops[0]] * (6 - length)])
        np.testing.assert_array_equal(samples.mask[row], np.arange(6) < length)
        assert bool((samples.logprobs[row, length:] == 0).all())
    assert samples.lengths.min() < 6


def test_no_stop_before_the_minimum(llama):
    every = tuple(range(18))  # all tokens but one stop
    samples = run(llama, Sampling(max_new_tokens=6, min_new_tokens=3, stop_tokens=every, temperature=5.0))
    np.testing.assert_array_equal(samples.tokens[..., :3], 18)
    np.testing.assert_array_equal(samples.logprobs[..., :3], 0)  # nothing else could be drawn
    assert (np.asarray(samples.lengths) >= 4).all() and (np.asarray(samples.lengths) < 6).any()


def test_the_loop_ends_with_the_last_row():
    module = MODELS['llama'].clone(max_length=10**6)
    sampling = Sampling(max_new_tokens=100_000, stop_tokens=tuple(range(19)))  # would take minutes
    samples = run((module, random_params(module)), sampling)
    np.testing.assert_array_equal(samples.lengths, 1)


def test_one_new_token(llama):
    assert run(llama, Sampling(max_new_tokens=1)).tokens.shape == (3, 1, 1)


def test_draws_follow_the_probabilities():
    probs = np.zeros(300)
    probs[[0, 5, 127, 128, 200, 299]] = [0.3, 0.1, 0.05, 0.25, 0.2, 0.1]
    rows = 20_000
    logits = 5 + jnp.log(jnp.broadcast_to(jnp.asarray(probs, jnp.float32), (rows, 300)))
    tokens, logprobs = jax.jit(draw)(completion_keys(KEY, rows, 1)[:, 0], logits)
    np.testing.assert_allclose(logprobs, np.log(probs[tokens]), atol=1e-5)
    counts = np.bincount(tokens, minlength=300)
    assert counts[probs == 0].sum() == 0
    # Standard deviation of a share is below 0.0035.
    np.testing.assert_allclose(counts / rows, probs, atol=0.014)


def test_filters_by_hand():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))

    def kept(**settings):
        kept = sampling_logits(logits, jnp.zeros(1, jnp.int32), Sampling(max_new_tokens=4, **settings))
        return np.asarray(jax.nn.softmax(kept))[0]

    np.testing.assert_allclose(kept(top_k=2), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=0.69), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0], rtol=1e-5)
    np.testing.assert_allclose(kept(top_p=1e-6), [1, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(kept(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)  # of the three's mass
    np.testing.assert_allclose(kept(temperature=0.5), np.array([16, 9, 4, 1]) / 30, rtol=1e-5)
    np.testing.assert_allclose(kept(top_k=99), [0.4, 0.3, 0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose(kept(min_new_tokens=1, stop_tokens=(0, 1)), [0, 0, 2 / 3, 1 / 3], rtol=1e-5)


CUTS = {'top_k': dict(top_k=4), 'top_p': dict(top_p=.6, temperature=1.5), 'both': dict(top_k=6, top_p=.7),
        'min_new_tokens': dict(min_new_tokens=3, stop_tokens=(2, 5, 7), temperature=3.0), 'none': {}}


@pytest.mark.parametrize('name', CUTS)
def test_a_learner_scores_what_the_sampler_drew_from(llama, full_forward, name):
    """Another forward pass of the same weights gives the sampler's own log-probabilities, whatever the sampler cuts."""
    settings = dict(max_new_tokens=6, temperature=2.0) | CUTS[name]
    samples = run(llama, Sampling(**settings), num_samples=2)
    logits = full_forward(*llama, samples)
    scored = np.where(samples.mask, rescore(logits, samples.tokens, Sampling(**settings)), 0)
    np.testing.assert_allclose(scored, samples.logprobs, atol=1e-4)
    plain = np.where(samples.mask, rescore(logits, samples.tokens, Sampling(6, settings['temperature'])), 0)
    assert (np.abs(plain - samples.logprobs).max() > 0.05) == (name != 'none')
    if name == 'min_new_tokens':  # the stop tokens may come as data
        stops = jnp.array(settings.pop('stop_tokens'))[None, None, None]
        again = rescore(logits, samples.tokens, Sampling(**settings), stop_tokens=stops)
        np.testing.assert_array_equal(np.where(samples.mask, again, 0), scored)


def test_cut_samples_may_be_scored_under_all(llama, full_forward):
    cut = Sampling(max_new_tokens=6, temperature=2.0, top_k=4)
    under_all = dataclasses.replace(cut, scored='all')
    drawn, scored = (run(llama, sampling, num_samples=2) for sampling in (cut, under_all))
    np.testing.assert_array_equal(scored.tokens, drawn.tokens)
    logits = full_forward(*llama, scored)
    want = jnp.take_along_axis(jax.nn.log_softmax(logits / 2), scored.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(scored.logprobs, want, atol=1e-4)
    np.testing.assert_allclose(rescore(logits, scored.tokens, under_all), want, atol=1e-4)
    assert np.abs(drawn.logprobs - want).max() > 0.1


def test_a_token_that_new_weights_would_cut_keeps_a_gradient():
    logits = jnp.log(jnp.array([[.4, .3, .2, .1]]))
    top = Sampling(max_new_tokens=1, top_k=2)
    score = lambda logits, token: rescore(logits, jnp.array([token]), top)[0]
    np.testing.assert_allclose(jnp.exp(score(logits, 1)), .3 / .7, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(score(logits, 3)), .1 / .8, rtol=1e-5)  # beside the two that are kept
    np.testing.assert_allclose(jax.grad(score)(logits, 3)[0], [-.5, -.375, 0, .875], atol=1e-6)


def test_prompts_go_into_the_shortest_bucket():
    tokens, mask = pad_prompts(PROMPTS, buckets=(16, 4, 8), pad_token=1)
    assert tokens.shape == (3, 8) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[1], [1] * 6 + [9, 2])
    np.testing.assert_array_equal(mask[1], [False] * 6 + [True] * 2)
    np.testing.assert_array_equal(pad_prompts(PROMPTS, buckets=(8,), left=False)[0][1], [9, 2] + [0] * 6)


@pytest.mark.parametrize('call, message', [
    (lambda m: pad_prompts(PROMPTS, buckets=(4, 6)), 'prompt 2 has 7 tokens, the longest bucket 6'),
    (lambda m: pad_prompts([[1], []], buckets=(4,)), 'prompt 1 is empty'),
    (lambda m: pad_prompts([], buckets=(4,)), 'no prompts'),
    (lambda m: run(m, Sampling(max_new_tokens=2041)), 'max_length=2048'),
    (lambda m: run(m, Sampling(max_new_tokens=1, stop_tokens=(19,))), 'stop token 19 is not in the vocabulary of 19'),
    (lambda m: run(m, Sampling(max_new_tokens=1), num_samples=0), 'num_samples=0'),
    (lambda m: run(m, Sampling(max_new_tokens=1), key=completion_keys(KEY, 1, 3)),
     r'keys have shape \(1, 3\), expected \(3, 1\), one a completion'),
    (lambda m: Sampling(max_new_tokens=0), 'max_new_tokens=0'),
    (lambda m: Sampling(max_new_tokens=2, min_new_tokens=3), 'min_new_tokens=3'),
    (lambda m: Sampling(max_new_tokens=2, temperature=-1), 'temperature=-1'),
    (lambda m: Sampling(max_new_tokens=2, top_p=0), 'top_p=0'),
    (lambda m: Sampling(max_new_tokens=2, top_k=-1), 'top_k=-1'),
    (lambda m: Sampling(max_new_tokens=2, scored='some'), "scored='some' is not one of"),
], ids=lambda x: x if isinstance(x, str) else '')
def test_bad_calls_are_named(llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama)


def test_rows_over_devices_sample_the_same(llama):
    """On a mesh, with parameters and rows sharded."""
    from experiments.runtime import mesh as mesh_lib
    from experiments.runtime import partition
    from rlhf_jax.models.decoder import split_rules
    from rlhf_jax.models.llama import PARTITION_RULES
    module = llama[0].clone(vocab_size=24)
    params = random_params(module)
    sampling = Sampling(max_new_tokens=4, temperature=0.7)
    tokens, mask = pad_prompts([*PROMPTS, [2]], buckets=(8,))
    want = generate(module, params, tokens, mask, KEY, sampling)
    mesh = mesh_lib.make_mesh({'fsdp': 4, 'tensor': 2})
    split, split_params = split_blocks(module, params)
    shardings = partition.param_shardings(split_params, split_rules(PARTITION_RULES), mesh)
    rows = jax.NamedSharding(mesh, jax.P('fsdp'))
    with jax.set_mesh(mesh):
        prompts = jax.device_put((tokens, mask), rows)
        got = generate(split, jax.device_put(split_params, shardings), *prompts, KEY, sampling)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)

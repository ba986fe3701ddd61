"""Text to code: layout, loss and sampler, each against numbers worked out without it."""
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlc_jax import text_to_code
from dlc_jax.diffusion import remasking
from dlc_jax.text_to_code import AUTHORS, AUTHORS_BEFORE_WEIGHTING, Objective, Sampling, Words
from random_params import random_params
from rlhf_jax.models.decoder import split_blocks
from rlhf_jax.models.llama import Llama

WORDS = Words(separator=20, num_codes=7, mask_token=18, pad_token=17)
MODULE = Llama(vocab_size=28, width=16, depth=2, num_heads=2, hidden=24, causal=False, max_length=32)
LENGTH = 6
CAPTIONS, CAPTION_MASK = text_to_code.pad_captions([[3, 4, 5], [7], [9, 9, 9, 9, 9]], WORDS, length=4)
CODES = np.array([[0, 1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1], [6, 6, 6, 0, 0, 0]])
TOLERANCE = dict(rtol=1e-4, atol=1e-4)

sample = jax.jit(text_to_code.sample, static_argnums=(0, 5, 6))
loss = jax.jit(text_to_code.loss, static_argnums=(0, 6, 7))
corrupt = jax.jit(text_to_code.corrupt, static_argnums=3, static_argnames='min_masked')
apply = jax.jit(lambda params, tokens, mask=None: MODULE.apply({'params': params}, tokens, mask=mask))


@pytest.fixture(scope='module')
def params():
    return random_params(MODULE, np.zeros((1, 1), np.int32), std=0.5)


def softmax(x):
    x = np.asarray(x, np.float64)
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# ---- Vocabulary and layout -------------------------------------------------------------------------------------------

def test_layout_by_hand():
    np.testing.assert_array_equal(CAPTIONS, [[3, 4, 5, 17], [7, 17, 17, 17], [9, 9, 9, 9]])  # the last one is cut
    codes = CODES.copy()
    codes[0, 1] = 7  # a mask
    tokens, there = text_to_code.lay_out(codes, CAPTIONS, CAPTION_MASK, WORDS)
    np.testing.assert_array_equal(tokens, [[21, 18, 23, 24, 25, 26, 20, 3, 4, 5, 17],
                                           [27, 26, 25, 24, 23, 22, 20, 7, 17, 17, 17],
                                           [27, 27, 27, 21, 21, 21, 20, 9, 9, 9, 9]])
    np.testing.assert_array_equal(there, np.asarray(tokens) != 17)
    assert tokens.dtype == jnp.int32 and there.dtype == bool


@pytest.mark.parametrize('token', [18, 20, 27, -1])
def test_a_caption_holds_words_only(token):
    with pytest.raises(ValueError, match=f'caption 1 holds token {token}'):
        text_to_code.pad_captions([[1], [2, token]], WORDS, length=4)


def test_tokens_of_the_released_tokenizer():
    words = Words(separator=126349, num_codes=256)
    assert (words.size, words.code_tokens, words.mask_token) == (126606, slice(126350, 126606), 126336)
    module = Llama(vocab_size=126464, width=4096, depth=1, num_heads=32, hidden=8, causal=False)
    shapes = jax.eval_shape(lambda key: module.init(key, np.zeros((1, 1), np.int32))['params'], jax.random.key(0))
    for multiple, rows in ((1, 126606), (128, 126720)):
        extended = []
        grown = jax.eval_shape(lambda p, key: extended.append(text_to_code.extend_vocabulary(
            module, p, key, words, multiple=multiple)) or extended[0][1], shapes, jax.random.key(0))
        assert extended[0][0].vocab_size == rows
        assert grown['embed'].shape == (rows, 4096) and grown['lm_head']['kernel'].shape == (4096, rows)


def test_new_rows_have_the_mean_and_covariance_of_the_old():
    module = MODULE.clone(vocab_size=22, width=4, num_heads=1)  # a table that already has room for the separator
    old = random_params(module, np.zeros((1, 1), np.int32), std=1.0)
    words = dataclasses.replace(WORDS, num_codes=20001)
    new_module, new = text_to_code.extend_vocabulary(module, old, jax.random.key(0), words, spread=0.25)
    assert new_module == module.clone(vocab_size=20022)
    chex.assert_trees_all_equal(new['blocks'], old['blocks'])
    for table, before in ((new['embed'], old['embed']), (new['lm_head']['kernel'].T, old['lm_head']['kernel'].T)):
        np.testing.assert_array_equal(table[:22], before)
        assert table.shape == (20022, 4)
        np.testing.assert_allclose(table[22:].mean(0), before.mean(0), atol=0.03)
        np.testing.assert_allclose(np.cov(table[22:].T), 0.25 * np.cov(before.T, bias=True), atol=0.03)
    assert np.abs(new['embed'][22:] - new['lm_head']['kernel'].T[22:]).max() > 0.1


def test_extended_tied_model():
    module = MODULE.clone(vocab_size=20, tied=True)
    old = random_params(module, np.zeros((1, 1), np.int32))
    module, new = text_to_code.extend_vocabulary(module, old, jax.random.key(0), WORDS)
    logits, hidden = jax.jit(functools.partial(module.apply, output='both'))({'params': new}, CODES)
    assert set(new) == set(old) and logits.shape[-1] == 28
    np.testing.assert_allclose(text_to_code.code_logits(new, hidden, WORDS), logits[..., 21:28], atol=1e-5)


def test_models_that_do_not_fit_are_refused(params):
    for module, message in ((MODULE.clone(causal=True), 'causal'), (MODULE.clone(vocab_size=27), 'vocab_size=27')):
        with pytest.raises(ValueError, match=message):
            text_to_code.loss(module, params, jax.random.key(0), CODES, CAPTIONS, CAPTION_MASK, WORDS)
    with pytest.raises(ValueError, match='beyond the vocabulary of 19'):
        text_to_code.extend_vocabulary(MODULE.clone(vocab_size=19), params, jax.random.key(0), WORDS)


# ---- Loss ------------------------------------------------------------------------------------------------------------

def test_noise_masks_what_it_may_at_the_rate_it_says():
    tokens = np.tile(np.arange(16), (400, 8))
    maskable = tokens % 4 != 0
    noised, masked, p = corrupt(jax.random.key(0), tokens, maskable, WORDS, min_masked=0.1)
    np.testing.assert_array_equal(noised, np.where(masked, 18, tokens))
    assert not np.asarray(masked)[~maskable].any()
    assert p.shape == (400, 1) and 0.1 <= p.min() < 0.12 and 0.98 < p.max() <= 1 and abs(p.mean() - 0.55) < 0.05
    share = np.asarray(masked).sum(1) / maskable.sum(1)
    assert np.abs(share - p[:, 0]).max() < 0.2 and abs((share - p[:, 0]).mean()) < 0.01


def direct_loss(params, key, objective):
    """The same sum written out in numpy, from the logits of the whole vocabulary at every position."""
    tokens, there = (np.array(x) for x in text_to_code.lay_out(CODES, CAPTIONS, CAPTION_MASK, WORDS))
    is_code = np.arange(11) < LENGTH
    maskable = there if objective.masked == 'all' else there & is_code
    noised, masked, p = (np.array(x) for x in corrupt(jax.random.split(key)[0], tokens, maskable, WORDS))
    mask = None if objective.attend_padding else there
    logits = np.array(apply(params, noised, mask))
    if objective.softmax == 'codes':
        logits[..., :21] = -np.inf
    rows, count = [], 0
    for b in range(3):
        row = 0.0
        for i in range(11):
            if masked[b, i]:
                ce = -np.log(softmax(logits[b, i])[tokens[b, i]])
                row += ce / p[b, 0] if objective.weighted else ce
                count += 1
        rows.append(row / (6 if objective.masked == 'code' else there[b].sum()) / 3
                    if objective.normalizer == 'tokens' else row)
    return sum(rows) / (count if objective.normalizer == 'masked' else 1), masked


@pytest.mark.parametrize('objective', [
    Objective(), Objective(softmax='all', weighted=False), Objective(normalizer='masked'), AUTHORS,
    AUTHORS_BEFORE_WEIGHTING, dataclasses.replace(AUTHORS, normalizer='tokens', attend_padding=False)])
def test_loss_is_the_sum_written_out(params, objective):
    for seed in range(2):
        key = jax.random.key(seed)
        got, metrics = loss(MODULE, params, key, CODES, CAPTIONS, CAPTION_MASK, WORDS, objective)
        want, masked = direct_loss(params, key, objective)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        assert masked[:, LENGTH:].any() == (objective.masked == 'all')
        np.testing.assert_allclose(metrics['masked'], masked.sum() / (18 if objective.masked == 'code' else 29))


def test_loss_of_the_original(golden):
    logits, labels, p = (jnp.asarray(golden[f'llada/in/{name}']) for name in ('logits', 'labels', 'p_mask'))
    masked = labels != -100
    for objective, name in ((AUTHORS, 'loss_before_grad_accum'), (AUTHORS_BEFORE_WEIGHTING, 'legacy_loss')):
        got = text_to_code.masked_cross_entropy(logits, labels, masked, p, masked, objective)
        np.testing.assert_allclose(got, golden[f'llada/out/{name}'], rtol=1e-5)


def test_groups_are_divided_each_by_its_own_number():
    rng = np.random.default_rng(0)
    logits, targets, p = rng.normal(size=(6, 4, 5)), rng.integers(0, 5, (6, 4)), rng.random((6, 1)) + 0.1
    masked = rng.random((6, 4)) < 0.5
    grouped = dataclasses.replace(AUTHORS, groups=3)
    f = lambda rows, objective: text_to_code.masked_cross_entropy(*(jnp.asarray(x[rows]) for x in (
        logits, targets, masked, p)), masked[rows], objective)
    want = np.mean([f(slice(i, i + 2), AUTHORS) for i in (0, 2, 4)])
    np.testing.assert_allclose(f(slice(0, 6), grouped), want, rtol=1e-5)
    assert abs(f(slice(0, 6), AUTHORS) - want) > 1e-3
    with pytest.raises(ValueError, match='objective.groups=3 does not divide 4 rows'):
        f(slice(0, 4), grouped)


def test_no_mask_in_the_batch_is_loss_zero_and_has_gradient_zero():
    nothing = np.zeros((2, 3), bool)
    for normalizer in ('tokens', 'masked'):
        f = lambda x: text_to_code.masked_cross_entropy(x, np.full((2, 3), -100), nothing, 0.5, nothing,
                                                        Objective(normalizer=normalizer))
        value, grad = jax.value_and_grad(f)(jnp.ones((2, 3, 5)))
        assert value == 0 and not np.asarray(grad).any()


def test_dropped_captions_leave_rows_that_do_not_depend_on_them(params):
    objective = Objective(drop_caption=0.999)
    f = lambda captions, objective: loss(MODULE, params, jax.random.key(3), CODES, captions, CAPTION_MASK, WORDS,
                                         objective)[0]
    others = np.where(CAPTION_MASK, 1, 17)
    assert f(CAPTIONS, objective) == f(others, objective) and f(CAPTIONS, Objective()) != f(others, Objective())


def test_a_dropped_caption_leaves_the_code_to_be_seen(params):
    """What is predicted depends on the tokens of the code that are not masked."""
    key = jax.random.key(3)
    tokens, _ = text_to_code.lay_out(CODES, CAPTIONS, CAPTION_MASK, WORDS)
    masked = np.asarray(corrupt(jax.random.split(key)[0], tokens, np.tile(np.arange(11) < LENGTH, (3, 1)), WORDS)[1])
    assert (masked.any(1) & ~masked[:, :LENGTH].all(1)).any()
    f = lambda codes: loss(MODULE, params, key, codes, CAPTIONS, CAPTION_MASK, WORDS, Objective(drop_caption=0.999))[0]
    assert abs(f(CODES) - f(np.where(masked[:, :LENGTH], CODES, (CODES + 1) % 7))) > 1e-3


# ---- Sampler ---------------------------------------------------------------------------------------------------------

def direct_step(logits, u, priority, codes, count, temperature, remasking):
    """One step of `generate_llada.py` in float64: draw, confidence, the `count` most confident masks of each row."""
    logits = np.asarray(logits, np.float64)
    value = np.argmax(np.exp(logits) / (-np.log(u)) ** temperature if temperature else logits, -1)
    confidence = np.take_along_axis(softmax(logits), value[..., None], -1)[..., 0]
    confidence = np.where(codes == 7, confidence if remasking == 'low_confidence' else priority, -np.inf)
    out = codes.copy()
    for b in range(len(codes)):
        best = np.argsort(-confidence[b], kind='stable')[:count]
        out[b, best] = value[b, best]
    return value, confidence, out


@pytest.mark.parametrize('remasked', ['low_confidence', 'random'])
@pytest.mark.parametrize('temperature', [0.0, 0.2, 1.0])
def test_a_step_is_the_original_with_the_same_noise(remasked, temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, 9, 7)).astype(np.float32)
    codes = np.where(rng.random((5, 9)) < 0.6, 7, rng.integers(0, 7, (5, 9))).astype(np.int32)
    gumbel, priority = remasking.step_noise(jax.random.split(jax.random.key(1), 5), 3, 9, 7)
    u = np.exp(-np.exp(-np.asarray(gumbel, np.float64)))
    want_value, want_confidence, want = direct_step(logits, u, priority, codes, 2, temperature, remasked)
    value, confidence = remasking.propose(logits, gumbel, priority if remasked == 'random' else None, temperature)
    np.testing.assert_array_equal(value, want_value)
    np.testing.assert_allclose(np.where(codes == 7, confidence, -np.inf), want_confidence, **TOLERANCE)
    got = remasking.commit(codes, value, confidence, 2, most=3, mask=7)
    np.testing.assert_array_equal(got, want)
    assert ((got != codes).sum(1) == np.minimum(2, (codes == 7).sum(1))).all()


def direct_sample(params, key, sampling):
    """The whole sampler as a Python loop, from the logits of the whole vocabulary, one row at a time and unpadded."""
    out = []
    for b in range(3):
        prompt = np.concatenate([[20], CAPTIONS[b][CAPTION_MASK[b]]])
        codes, step = np.full((1, LENGTH), 7, np.int32), 0
        for start in range(0, LENGTH, sampling.block):
            span = slice(start, start + sampling.block)
            for count in sampling.schedule:
                def run(prompt):
                    tokens = np.concatenate([np.where(codes[0] == 7, 18, 21 + codes[0]), prompt])
                    return np.array(apply(params, tokens[None]))[:, span, 21:28]
                logits, blank = run(prompt), run(np.full_like(prompt, 18))
                logits = blank + (sampling.guidance + 1) * (logits - blank)
                row = jax.random.fold_in(key, b)[None]
                gumbel, priority = remasking.step_noise(row, step, sampling.block, 7)
                u = np.exp(-np.exp(-np.asarray(gumbel, np.float64)))
                codes[:, span] = direct_step(logits, u, priority, codes[:, span], count, sampling.temperature,
                                             sampling.remasking)[2]
                step += 1
        out.append(codes[0])
    return np.array(out)


@pytest.mark.parametrize('sampling', [
    Sampling(LENGTH, steps=4), Sampling(LENGTH, steps=4, block_length=3, remasking='random', temperature=0.2),
    Sampling(LENGTH, steps=3, guidance=1.5), Sampling(LENGTH, block_length=2, temperature=0.0, guidance=0.5)])
def test_sampler_is_the_loop_written_out_row_by_row(params, sampling):
    got = sample(MODULE, params, jax.random.key(5), CAPTIONS, CAPTION_MASK, WORDS, sampling)
    np.testing.assert_array_equal(got.codes, direct_sample(params, jax.random.key(5), sampling))
    filled_at = np.asarray(got.filled_at)
    # Every position once, as many a step as the schedule says, blocks from the left.
    want = np.tile(sampling.schedule, sampling.num_blocks)
    for row in filled_at:
        np.testing.assert_array_equal(np.bincount(row, minlength=sampling.num_steps), want)
    assert (filled_at // len(sampling.schedule) == np.arange(LENGTH) // sampling.block).all()


@pytest.mark.parametrize('sampling, schedule', [
    (Sampling(512, steps=512), (1,) * 512), (Sampling(10, steps=4), (3, 3, 2, 2)), (Sampling(7), (1,) * 7),
    (Sampling(12, steps=6, block_length=4), (2, 2)), (Sampling(12, steps=9, block_length=4), (2, 1, 1)),
    (Sampling(9, steps=1), (9,))])
def test_schedule(sampling, schedule):
    assert sampling.schedule == schedule and sum(schedule) == sampling.block


@pytest.mark.parametrize('change, message', [
    (dict(steps=13), 'nothing to fill'), (dict(steps=5, block_length=4), 'not a multiple'),
    (dict(block_length=5), 'does not divide'), (dict(remasking='best'), 'is not one of'),
    (dict(temperature=-1.0), 'negative'), (dict(length=0), 'positive')])
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**dict(length=12) | change)


def test_only_codes_are_drawn_however_likely_other_tokens_are(params):
    kernel = params['lm_head']['kernel']
    rigged = params | {'lm_head': {'kernel': jnp.concatenate([kernel[:, :21] * 50, kernel[:, 21:]], 1)}}
    sampling = Sampling(LENGTH, steps=4)
    got, want = (sample(MODULE, p, jax.random.key(0), CAPTIONS, CAPTION_MASK, WORDS, sampling)
                 for p in (rigged, params))
    assert got.codes.min() >= 0 and got.codes.max() < 7 and len(np.unique(got.codes)) > 2
    chex.assert_trees_all_equal(got, want)


def test_no_logits_of_the_whole_vocabulary(params):
    shapes = lambda f, *args: set(re.findall(r'f32\[([\d,]+)\]', str(jax.make_jaxpr(f)(params, *args))))
    batch = CAPTIONS, CAPTION_MASK
    drawn = shapes(lambda p: text_to_code.sample(MODULE, p, jax.random.key(0), *batch, WORDS, Sampling(LENGTH)))
    trained = shapes(lambda p: text_to_code.loss(MODULE, p, jax.random.key(0), CODES, *batch, WORDS))
    original = shapes(lambda p: text_to_code.loss(MODULE, p, jax.random.key(0), CODES, *batch, WORDS, AUTHORS))
    assert '3,6,7' in drawn & trained and '3,6,28' not in drawn | trained and '3,11,28' not in drawn | trained
    assert '3,11,28' in original


def test_guidance_zero_is_unguided_and_a_key_decides(params):
    run = lambda seed, **kw: sample(MODULE, params, jax.random.key(seed), CAPTIONS, CAPTION_MASK, WORDS,
                                    Sampling(LENGTH, steps=4, **kw))
    base = run(5)
    chex.assert_trees_all_equal(base, run(5))
    guided = run(5, guidance=1e-7)  # by the guided path, whose log-probabilities are rounded otherwise
    np.testing.assert_array_equal(base.codes, guided.codes)
    chex.assert_trees_all_close(base, guided, atol=1e-5)
    assert (run(5, guidance=1.5).codes != base.codes).any()
    assert (run(6).codes != base.codes).any()


def test_keys_of_rows_may_be_given(params):
    """A row draws from its own key alone, whatever its place and its neighbours."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(3))
    sampling = Sampling(LENGTH, steps=4)
    base = sample(MODULE, params, jax.random.key(5), CAPTIONS, CAPTION_MASK, WORDS, sampling)
    order = np.array([2, 0, 1])
    moved = sample(MODULE, params, keys[order], CAPTIONS[order], CAPTION_MASK[order], WORDS, sampling)
    np.testing.assert_array_equal(moved.codes, base.codes[order])


def test_split_blocks_sample_the_same(params):
    module, split = split_blocks(MODULE, params)
    run = lambda m, p: sample(m, p, jax.random.key(5), CAPTIONS, CAPTION_MASK, WORDS, Sampling(LENGTH, steps=4))
    chex.assert_trees_all_equal(run(module, split), run(MODULE, params))


def test_learns_the_code_of_each_caption():
    start = random_params(MODULE, np.zeros((1, 1), np.int32), std=0.2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            (value, _), grads = jax.value_and_grad(lambda p: text_to_code.loss(
                MODULE, p, key, CODES, CAPTIONS, CAPTION_MASK, WORDS), has_aux=True)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 300))
        return params, values

    trained, values = train(start, jax.random.key(0))
    assert values[-20:].mean() < 0.1 * values[:20].mean()
    got = sample(MODULE, trained, jax.random.key(0), CAPTIONS, CAPTION_MASK, WORDS, Sampling(LENGTH))
    np.testing.assert_array_equal(got.codes, CODES)

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import responses
from rlhf_jax.tasks import prompts, tldr

ROW = {'subreddit': 'cats', 'title': 'My cat', 'post': 'one two\nthree four\nfive six', 'summary': 'Cat.'}


def split(text):
    """A tokenizer of words, newlines being words."""
    return list(range(len(text.replace('\n', ' \n ').split(' '))))


def test_format():
    prompt = tldr.query('cats', 'My cat', 'It sleeps.')
    assert prompt == 'SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It sleeps.\n\nTL;DR:'
    response = tldr.reference_response('Cat sleeps.')
    assert response == ' Cat sleeps.<|endoftext|>'
    assert tldr.demonstration(f' {prompt}\n', response) == f'{prompt} Cat sleeps.<|endoftext|>'


def test_posts_lose_paragraphs_then_characters():
    full = tldr.query('cats', 'My cat', ROW['post'])
    length = len(split(full))
    assert tldr.truncated_query(ROW, split, length) == full
    assert tldr.truncated_query(ROW, split, length - 1) == tldr.query('cats', 'My cat', 'one two\nthree four')
    by_character = lambda text: list(text)
    bare = len(tldr.query('cats', 'My cat', ''))
    assert tldr.truncated_query(ROW, by_character, bare + 5) == tldr.query('cats', 'My cat', 'one t')
    with pytest.raises(ValueError, match=f'longer than max_tokens={bare - 1} even without a post'):
        tldr.truncated_query(ROW, by_character, bare - 1)


def test_prompts_that_are_too_long_fall_out():
    texts = ['a b c', 'a b c d e', 'a']
    tokens, kept = prompts.encode(texts, lambda t: [ord(c) for c in t.split()], max_tokens=3, eos=tldr.EOS)
    np.testing.assert_array_equal(kept, [0, 2])
    assert tokens == [[97, 98, 99], [97]]


@pytest.mark.parametrize('ids, message', [
    ([5, 0], 'prompt 0 ends in eos=0'), ([], 'prompt 0 has no token'), ([5, 5, 5], 'max_tokens=2: none of 1')])
def test_prompts_that_cannot_be_used(ids, message):
    with pytest.raises(ValueError, match=message):
        prompts.encode(['x'], lambda _: ids, max_tokens=2, eos=0)


def test_relabelling_swaps_what_the_gold_model_prefers():
    pairs = [{'prompt': f'p{i}', 'chosen': f' c{i}', 'rejected': f' r{i}', 'policies': i} for i in range(4)]
    pairs[1] |= {'prompt_chosen': 'stale', 'prompt_rejected': 'stale'}
    new, agreement = tldr.relabel(pairs, [2, -1, .5, 3], [1, 4, .5, 2.5])
    assert agreement == 0.5  # the tie is no agreement
    assert [r['chosen'] for r in new] == [' c0', ' r1', ' c2', ' c3'] and new[1]['rejected'] == ' c1'
    assert (new[1]['chosen_score'], new[1]['rejected_score'], new[1]['policies']) == (4, -1, 1)
    assert (new[1]['prompt_chosen'], new[1]['prompt_rejected']) == ('p1 r1', 'p1 c1') and 'prompt_chosen' not in new[0]
    assert pairs[1]['chosen'] == ' c1'  # as it was
    with pytest.raises(ValueError, match=r'chosen_scores has shape \(3,\), expected \(4,\)'):
        tldr.relabel(pairs, [1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="row 0: missing field 'rejected'"):
        tldr.relabel([{'prompt': 'p', 'chosen': 'c'}], [1], [0])


def test_pairs_for_the_reward_model_end():
    row = {'prompt': 'p TL;DR:', 'chosen': f' a{tldr.END}', 'rejected': f' b{tldr.END}'}
    assert tldr.pair(row) == (f'p TL;DR: a{tldr.END}', f'p TL;DR: b{tldr.END}')
    with pytest.raises(ValueError, match="rejected: does not end in .*: ' b'"):
        tldr.pair(row | {'rejected': ' b'})
    with pytest.raises(ValueError, match="missing field 'chosen'"):
        tldr.pair({'prompt': 'p', 'rejected': ' b'})


def test_win_rate_is_strict():
    assert tldr.win_rate([1, 2, 3, 0], [1, 1, 0, 2]) == tldr.WinRate(win_rate=0.5, ties=0.25, margin=0.5)
    with pytest.raises(ValueError, match='scores: 1 of 2 are not finite'):
        tldr.win_rate([1, np.nan], [0, 0])
    with pytest.raises(ValueError, match='reference_scores has shape'):
        tldr.win_rate([1], [0, 0])


def test_true_drift_beside_the_published_number():
    # 30 tokens of 0.7 nats each after a prompt of 320.
    ref = jnp.full((1, 40), -.7)
    mask = responses.mask(jnp.array([30]), 40)
    drift = tldr.response_drift(ref + .2, ref, mask)
    np.testing.assert_allclose(drift['perplexity'], math.exp(.7), rtol=1e-6)  # 2.014
    np.testing.assert_allclose([drift['kl'], drift['kl_per_token']], [6.0, .2], rtol=1e-5)
    legacy = tldr.legacy_perplexity(ref, mask, jnp.array([320]))
    np.testing.assert_allclose(legacy, [math.exp(21 / 349)], rtol=1e-6)  # 1.062
    assert round(float(legacy[0]), 3) == 1.062 and round(float(drift['perplexity']), 3) == 2.014
    padded = tldr.legacy_perplexity(jnp.repeat(ref, 2, 0), mask, jnp.array([320]), left_padded=jnp.array([True, False]))
    np.testing.assert_allclose(padded, [math.exp(21 / 350), math.exp(21 / 349)], rtol=1e-6)
    np.testing.assert_array_equal(tldr.legacy_perplexity(ref, mask & False, jnp.array([320])), [1])


def test_drift_sums_over_responses_and_weights_tokens_equally():
    logprobs, ref = jnp.array([[-1., -2, 9], [-1, 9, 9]]), jnp.array([[-2., -2, 7], [-4, 7, jnp.nan]])
    drift = tldr.response_drift(logprobs, ref, jnp.array([[True, True, False], [True, False, False]]))
    np.testing.assert_allclose(drift['kl'], 2.0, rtol=1e-6)
    np.testing.assert_allclose(drift['kl_per_token'], 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(drift['perplexity'], (math.exp(2) + math.exp(4)) / 2, rtol=1e-6)

"""Advantages, KL estimators, reward shaping and KL controllers."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from rlhf_jax import advantages, kl, responses

# Generalised advantage estimation

def test_golden_gae_of_a_rollout_with_several_episodes():
    starts = np.array([1, 0, 0, 1, 0])
    continues = np.append(1 - starts[1:], 1)  # the last step's episode goes on
    a, returns = advantages.gae(jnp.array([0, 0, 1, -.1, .5]), jnp.array([.2, .3, .4, .1, .2]), gamma=.99, lam=.95,
                                last_value=.25, continues=continues)
    np.testing.assert_allclose(a, [.71801215, .6603, .6, .51292375, .5475], atol=1e-7)
    np.testing.assert_allclose(returns, a + jnp.array([.2, .3, .4, .1, .2]))


def test_golden_gae_of_a_masked_response_and_its_whitening():
    mask = np.array([0, 1, 1, 1, 0])
    r, v = np.array([0, -.01, .02, 1, 0]) * mask, np.array([.5, .2, .3, .4, .7]) * mask
    a, _ = advantages.gae(jnp.array(r), jnp.array(v), gamma=1, lam=.95)
    np.testing.assert_allclose(a, [.908225, .7455, .69, .6, 0], atol=1e-6)
    with jax.enable_x64(True):
        from rlhf_jax import masked
        a, _ = advantages.gae(jnp.array(r), jnp.array(v), gamma=1, lam=.95)
        np.testing.assert_allclose(masked.whiten(a, mask)[1:4], [.9124509474, .1566147149, -1.0690656623], atol=1e-8)


def test_golden_ppo_rewards_advantages_returns_and_whitening():
    """As published: the score one past EOS, values counted up to there, advantages over all positions."""
    value_mask = kl.value_mask(golden.MASK, after_eos=True)
    np.testing.assert_array_equal(value_mask.sum(-1), [4, 6, 6])
    k1 = kl.estimate(golden.LOGPROBS, golden.REF_LOGPROBS)
    rewards = kl.token_rewards(golden.SCORES, k1, golden.MASK, 0.05, after_eos=True)
    np.testing.assert_allclose(rewards, golden.REWARDS, atol=1e-6)
    a, returns = advantages.gae(rewards, jnp.where(value_mask, golden.VALUES, 0))
    np.testing.assert_allclose(a, golden.ADVANTAGES, atol=1.5e-6)
    np.testing.assert_allclose(returns, golden.RETURNS, atol=1.5e-6)
    np.testing.assert_allclose(advantages.whiten(a, golden.MASK), golden.WHITENED, atol=2e-6)


def test_the_score_stands_at_the_last_token_by_default():
    rewards = kl.token_rewards(golden.SCORES, jnp.zeros((3, 6)), golden.MASK, 0.05)
    expected = np.zeros((3, 6))
    expected[[0, 1, 2], [2, 5, 5]] = golden.SCORES
    np.testing.assert_allclose(rewards, expected)
    np.testing.assert_array_equal(kl.value_mask(golden.MASK), golden.MASK)


def test_gae_limits():
    r, v = jnp.array([1., 2, 3]), jnp.array([.5, .25, 4])
    one_step, _ = advantages.gae(r, v, gamma=.9, lam=0, last_value=2.)
    np.testing.assert_allclose(one_step, [1 + .9 * .25 - .5, 2 + .9 * 4 - .25, 3 + .9 * 2 - 4], rtol=1e-6)
    monte_carlo, returns = advantages.gae(r, v, gamma=1, lam=1)
    np.testing.assert_allclose(monte_carlo, [6 - .5, 5 - .25, 3 - 4], rtol=1e-6)
    np.testing.assert_allclose(returns, [6, 5, 3], rtol=1e-6)


# Baselines without a critic

def test_golden_rloo():
    k1 = kl.estimate(golden.LOGPROBS, golden.REF_LOGPROBS)
    sums = kl.sequence_kl(golden.LOGPROBS, golden.REF_LOGPROBS, golden.MASK)
    np.testing.assert_allclose(sums, [.2, 0, -.9], atol=1e-6)
    r = kl.penalized_scores(jnp.array([1.2, -1.]), k1[:2], golden.MASK[:2], 0.05)
    np.testing.assert_allclose(r, [1.19, -1.0], atol=1e-6)
    np.testing.assert_allclose(advantages.leave_one_out(r[None]), [[2.19, -2.19]], atol=1e-6)


def test_leave_one_out_by_hand_with_three_samples_of_two_prompts():
    r = np.array([[1., 2, 6], [10, 20, 60]])
    np.testing.assert_allclose(advantages.leave_one_out(r), [[1 - 4, 2 - 3.5, 6 - 1.5], [10 - 40, 20 - 35, 60 - 15]],
                               rtol=1e-6)


def test_group_normalisation_by_hand():
    r = np.array([[1., 2, 6], [5, 5, 5]])
    a = advantages.group_normalized(r)
    std = np.std([1, 2, 6], ddof=1)
    np.testing.assert_allclose(a[0], np.array([-2, -1, 3]) / std, rtol=1e-5)
    np.testing.assert_array_equal(a[1], 0)
    np.testing.assert_allclose(advantages.group_normalized(r, scale=False)[0], [-2, -1, 3], rtol=1e-6)


def test_a_tied_group_has_no_advantage_whatever_the_rounding():
    r = np.full((1, 7), 0.1, np.float32)
    np.testing.assert_array_equal(advantages.group_normalized(r), 0)
    np.testing.assert_allclose(advantages.leave_one_out(r), 0, atol=1e-7)


@pytest.mark.parametrize('missing', [np.nan, np.inf])
def test_a_missing_reward_leaves_its_group(missing):
    """What is left of a group is one by itself; a reward alone, or none, has no baseline and no advantage."""
    r = np.array([[1., missing, 2, 6], [5, 5, missing, 5], [missing, 4, missing, missing], [missing] * 4], np.float32)
    for f in (advantages.leave_one_out, advantages.group_normalized,
              functools.partial(advantages.group_normalized, scale=False)):
        a = f(r)
        np.testing.assert_allclose(a[0, [0, 2, 3]], f(r[:1, [0, 2, 3]])[0], rtol=1e-6)
        assert np.abs(a[0, [0, 2, 3]]).min() > 0.1 and a[0, 1] == 0
        np.testing.assert_array_equal(a[1:], 0)
    np.testing.assert_allclose(advantages.leave_one_out(r)[0], [1 - 4, 0, 2 - 3.5, 6 - 1.5], rtol=1e-6)


@pytest.mark.parametrize('f', [advantages.leave_one_out, advantages.group_normalized])
def test_baselines_follow_their_prompts_under_permutation(f):
    rng = np.random.default_rng(0)
    r, order = rng.normal(size=(5, 3)).astype(np.float32), rng.permutation(5)
    a = f(r)
    np.testing.assert_array_equal(f(r[order]), a[order])
    samples = rng.permutation(3)
    np.testing.assert_allclose(f(r[:, samples]), a[:, samples], atol=1e-6)
    np.testing.assert_allclose(a.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(f(r + 3), a, atol=1e-5)  # of no shift
    for wrong in (r[:, :1], r[:, 0]):
        with pytest.raises(ValueError, match=r'rewards have shape \(5,.*at least 2 completions of a prompt'):
            f(wrong)


# KL

def test_kl_estimators_by_hand():
    p, q = jnp.log(jnp.array([.5, .2])), jnp.log(jnp.array([.25, .4]))
    np.testing.assert_allclose(kl.estimate(p, q, 'k1'), [np.log(2), -np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(kl.estimate(p, q, 'k2'), [np.log(2) ** 2 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(kl.estimate(p, q, 'k3'), [.5 - 1 + np.log(2), 2 - 1 - np.log(2)], rtol=1e-6)
    with pytest.raises(ValueError, match="kl.kind='k4'"):
        kl.estimate(p, q, 'k4')


def test_kl_estimators_are_what_they_claim_in_expectation():
    """Weighted by the policy, k1 and k3 give the KL itself; k2 and k3 are never negative."""
    rng = np.random.default_rng(0)
    p, q = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=9), jnp.float32)) for _ in range(2))
    exact = jnp.sum(jnp.exp(p) * (p - q))
    for kind in ('k1', 'k3'):
        np.testing.assert_allclose(jnp.sum(jnp.exp(p) * kl.estimate(p, q, kind)), exact, rtol=1e-5)
    assert (kl.estimate(p, q, 'k2') >= 0).all() and (kl.estimate(p, q, 'k3') >= 0).all()
    tiny = kl.estimate(jnp.float32(-1.0), jnp.float32(-1.0001), 'k3')
    np.testing.assert_allclose(tiny, 5e-9, rtol=5e-3)  # exp(-d) - 1 + d would be all rounding here


def test_what_the_mask_hides_reaches_no_reward():
    hidden = jnp.where(golden.MASK, 0.1, jnp.nan)
    assert jnp.isfinite(kl.token_rewards(golden.SCORES, hidden, golden.MASK, 0.05)).all()
    assert jnp.isfinite(kl.penalized_scores(golden.SCORES, hidden, golden.MASK, 0.05)).all()


@pytest.mark.parametrize('value, expected', [(0, .0199744), (3, .0199744), (6, .02), (6.6, .0200128), (12, .0200256)])
def test_golden_trl_controller(value, expected):
    np.testing.assert_allclose(kl.trl_controller(64).update(.02, value), expected, rtol=1e-6)


def test_rl4lms_controller_is_a_decay_below_its_target():
    controller, coefficient = kl.rl4lms_controller(target=0.5), 0.1
    for _ in range(50):
        coefficient = controller.update(coefficient, 0.39)
    np.testing.assert_allclose(coefficient, .0364, rtol=2e-3)
    np.testing.assert_allclose(controller.update(1.0, 0.55), 1.01, rtol=1e-6)
    np.testing.assert_allclose(controller.update(1.0, 5.0), 1.02, rtol=1e-6)
    assert kl.FixedController().update(.3, 9.) == .3


def test_controllers_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match='kl.target=0'):
        kl.AdaptiveController(target=0, rate=.1)
    with pytest.raises(ValueError, match='kl.rate=-1'):
        kl.AdaptiveController(target=1, rate=-1)


def test_whitening_is_over_the_batch_and_its_mask():
    a = jnp.array([[1., 2, 99], [3, 6, 8]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1]])
    white = advantages.whiten(a, mask)
    kept = np.array([1., 2, 3, 6, 8])
    np.testing.assert_allclose(white[1], (np.array([3, 6, 8]) - 4) / kept.std(ddof=1), rtol=1e-5)
    assert white[0, 2] == 0 and (responses.mask(jnp.array([2, 3]), 3) == mask).all()

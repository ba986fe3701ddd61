"""Every loss against values computed by hand, its gradient against the closed form, its masks and its ties."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from rlhf_jax import advantages, kl, losses

RNG = np.random.default_rng(0)
NEW, OLD, REF, BEHAVIOUR = (RNG.normal(-1, .3, (2, 2, 3)).astype(np.float32) for _ in range(4))
MASK = np.array([[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [1, 1, 1]]], bool)
ADVANTAGES = np.array([[1., -2.], [.5, .5]], np.float32)
WIDE = np.repeat(ADVANTAGES[..., None], 3, -1)
REWARDS = np.array([[1., 3], [4, 2]], np.float32)


def sums(x):
    return (np.float64(x) * MASK).sum(-1)


def close(a, b, tol=1e-5):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


# Properties of all losses of sampled tokens

OF_TOKENS = {
    'online_dpo': lambda x: losses.online_dpo(x, REF, MASK, REWARDS),
    'online_ipo': lambda x: losses.online_dpo(x, REF, MASK, REWARDS, loss_type='ipo'),
    'best_of_n': lambda x: losses.best_of_n(x, MASK, REWARDS),
    'ppo': lambda x: losses.ppo(x, OLD, WIDE, MASK),
    'decoupled_ppo': lambda x: losses.decoupled_ppo(x, OLD, BEHAVIOUR, WIDE, MASK),
    'value': lambda x: losses.value_loss(x, OLD, REF, MASK),
    'rloo': lambda x: losses.rloo(x, ADVANTAGES, MASK),
    'proximal_rloo': lambda x: losses.proximal_rloo(x, OLD, ADVANTAGES, MASK, clip=.5),
    'grpo': lambda x: losses.grpo(x, OLD, ADVANTAGES, MASK, ref_logprobs=REF, beta=.1),
    'grpo_token': lambda x: losses.grpo(x, OLD, ADVANTAGES, MASK, ref_logprobs=REF, beta=.1, mean_over='token'),
}


@pytest.mark.parametrize('name', OF_TOKENS)
def test_what_the_mask_hides_changes_nothing_and_gradients_match_differences(name):
    f = jax.jit(jax.value_and_grad(OF_TOKENS[name], has_aux=True))
    (loss, metrics), grad = f(NEW)
    hidden = np.where(MASK, NEW, np.nan)
    (masked_loss, masked_metrics), masked_grad = f(hidden)
    assert loss == masked_loss and loss.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, metrics, masked_metrics)
    np.testing.assert_array_equal(grad, masked_grad)
    assert (np.asarray(grad)[~MASK] == 0).all() and np.abs(grad).sum() > 0
    assert all(np.shape(x) == () for x in metrics.values())
    direction, h = RNG.normal(size=NEW.shape).astype(np.float32), 2e-3  # small enough to cross no clip
    numeric = (f(NEW + h * direction)[0][0] - f(NEW - h * direction)[0][0]) / (2 * h)
    np.testing.assert_allclose(np.vdot(grad, direction), numeric, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize('name', OF_TOKENS)
def test_metrics_carry_no_gradient(name):
    total = lambda x: sum(jax.tree.leaves(OF_TOKENS[name](x)[1]))
    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(NEW)), 0)


# Supervised fine-tuning

LOGITS = RNG.normal(size=(2, 5, 4)).astype(np.float32)
TEXT = np.array([[1, 3, 2, 0, 0], [2, 2, 1, 3, 0]])
REAL = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])  # token 0 is pad and EOS at once


def nll(logits, text):
    p = np.exp(np.float64(logits))
    return -np.log(np.take_along_axis(p / p.sum(-1, keepdims=True), text[..., None], -1)[..., 0])


def test_sft_is_the_mean_over_counted_tokens_eos_included():
    terms = nll(LOGITS[:, :-1], TEXT[:, 1:])
    loss, metrics = losses.sft(LOGITS, TEXT, REAL)
    close(loss, (terms[0, :3].sum() + terms[1].sum()) / 7)
    assert metrics['tokens'] == 7
    close(metrics['perplexity'], np.exp(loss))
    grads = jax.grad(lambda x: losses.sft(x, TEXT, REAL)[0])(LOGITS)
    assert np.abs(grads[0, 2]).sum() > 0  # what predicts the first EOS, which is also the pad id
    np.testing.assert_array_equal(grads[0, 3:], 0)
    p = np.exp(LOGITS[1, 0]) / np.exp(LOGITS[1, 0]).sum()
    close(grads[1, 0], (p - np.eye(4)[2]) / 7)


def test_sft_without_prompt_loss():
    prompt = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    terms = nll(LOGITS[:, :-1], TEXT[:, 1:])
    loss, metrics = losses.sft(LOGITS, TEXT, REAL, prompt_mask=prompt)
    close(loss, (terms[0, 1:3].sum() + terms[1, 2:].sum()) / 4)
    correct = (LOGITS[:, :-1].argmax(-1) == TEXT[:, 1:])
    close(metrics['accuracy'], np.concatenate([correct[0, 1:3], correct[1, 2:]]).mean())


def test_packed_rows_cost_what_their_texts_cost_apart():
    texts, parts = ([1, 3, 2], [3, 0]), (RNG.normal(size=(1, 3, 4)), RNG.normal(size=(1, 2, 4)))
    apart = [losses.sft(x, np.array([t]), np.ones((1, len(t)))) for t, x in zip(texts, parts)]
    tokens = [m['tokens'] for _, m in apart]
    mean = sum(l * n for (l, _), n in zip(apart, tokens)) / sum(tokens)
    row = np.concatenate([np.concatenate(parts, 1), np.zeros((1, 1, 4))], 1)
    text, segments = np.array([[*texts[0], *texts[1], 0]]), np.array([[1, 1, 1, 2, 2, 0]])
    packed, metrics = losses.sft(row, text, segments > 0, segment_ids=segments)
    close(packed, mean)
    assert metrics['tokens'] == sum(tokens) == 3
    unaware, _ = losses.sft(row, text, segments > 0)  # counts the second text's first token
    assert abs(unaware - mean) > 1e-2


def test_sft_of_nothing_is_zero():
    loss, metrics = losses.sft(LOGITS, TEXT, np.zeros_like(REAL))
    assert loss == 0 and metrics['tokens'] == 0


def test_sft_sums_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    close(losses.sft(logits, TEXT, REAL)[0], losses.sft(logits.astype(jnp.float32), TEXT, REAL)[0], 1e-7)


# Reward model

def test_reward_model_by_hand():
    chosen, rejected = jnp.array([1.0, 0.5, 2.0]), jnp.array([0.0, 1.5, 2.0])
    terms = -np.log(sigmoid([1, -1, 0]))
    loss, metrics = losses.reward_model(chosen, rejected)
    close(loss, terms.mean())
    close(metrics['accuracy'], 1 / 3)  # a tie is not right
    close(metrics['margin'], 0)
    with_margin, _ = losses.reward_model(chosen, rejected, margin=jnp.array([1.0, 0, .5]))
    close(with_margin, -np.log(sigmoid([0, -1, -.5])).mean())
    centered, _ = losses.reward_model(chosen, rejected, centering=.01)
    close(centered, terms.mean() + .01 * (1 + 4 + 16) / 3)
    grads = jax.grad(lambda c: losses.reward_model(c, rejected)[0])(chosen)
    close(grads, (sigmoid([1, -1, 0]) - 1) / 3)


def test_reward_model_of_far_apart_scores_is_finite():
    loss, grad = jax.value_and_grad(lambda c: losses.reward_model(c, jnp.zeros(1))[0])(jnp.array([-1e4]))
    assert loss == 1e4 and grad[0] == -1


# DPO

def golden_sums():
    s, ref = (np.where(golden.MASK, x, 0).sum(-1) for x in (golden.LOGPROBS, golden.REF_LOGPROBS))
    return s[:1], s[1:2], ref[:1], ref[1:2]


def test_golden_dpo_and_ipo():
    loss, metrics = losses.dpo(*golden_sums(), beta=.1)
    np.testing.assert_allclose(loss, .683197, atol=1e-6)
    np.testing.assert_allclose(metrics['margin'] / .1, .2, atol=1e-5)  # h
    close(metrics['chosen'], .02)
    close(metrics['rejected'], 0)
    assert metrics['accuracy'] == 1 and metrics['pairs'] == 1
    ipo, _ = losses.dpo(*golden_sums(), beta=.1, loss_type='ipo')
    np.testing.assert_allclose(ipo, 23.04, atol=1e-4)


def test_golden_online_dpo_picks_the_same_pair():
    pair = lambda x: x[None, :2]
    loss, metrics = losses.online_dpo(pair(golden.LOGPROBS), pair(golden.REF_LOGPROBS), pair(golden.MASK),
                                      jnp.array([[1.2, -1.0]]))
    np.testing.assert_allclose(loss, .683197, atol=1e-6)
    close(metrics['reward_gap'], 2.2)


def test_dpo_gradient_in_closed_form():
    s = [jnp.array([-3.0, -2.0]), jnp.array([-4.0, -1.0]), jnp.array([-3.5, -2.5]), jnp.array([-3.0, -2.0])]
    h = (s[0] - s[1]) - (s[2] - s[3])
    chosen, rejected = jax.grad(lambda c, r: losses.dpo(c, r, *s[2:], beta=.3)[0], (0, 1))(*s[:2])
    close(chosen, -.3 * sigmoid(-.3 * h) / 2)
    close(rejected, -chosen)
    ref = jax.grad(lambda a: losses.dpo(*s[:2], a, s[3], beta=.3)[0])(s[2])
    np.testing.assert_array_equal(ref, 0)


def test_weights_drop_pairs_from_the_mean():
    s = [np.array(x) for x in ([-3.0, -2.0, np.nan], [-4.0, -1.0, 0], [-3.5, -2.5, 0], [-3.0, -2.0, 0])]
    both, _ = losses.dpo(*(x[:2] for x in s))
    weighted, metrics = losses.dpo(*s, weights=np.array([1, 1, 0]))
    close(weighted, both, 1e-7)
    assert metrics['pairs'] == 2


@pytest.mark.parametrize('kwargs, message', [({'loss_type': 'hinge'}, "loss_type='hinge'"), ({'beta': 0}, 'beta=0')])
def test_dpo_refuses_what_it_does_not_know(kwargs, message):
    with pytest.raises(ValueError, match=message):
        losses.dpo(*golden_sums(), **kwargs)


# Pairs

def test_golden_pairing():
    scores = jnp.array([[.5, .5], [-1, -1], [2, 1]])  # prompts 0 and 1 are tied
    with_vllm = losses.best_worst(scores, ties='same')
    np.testing.assert_array_equal(with_vllm[0], [0, 0, 0])
    np.testing.assert_array_equal(with_vllm[1], [0, 0, 1])
    in_library = losses.best_worst(scores, ties='order')
    np.testing.assert_array_equal(in_library[0], [0, 0, 0])
    np.testing.assert_array_equal(in_library[1], [1, 1, 1])
    assert in_library[2].all() and with_vllm[2].all()
    dropped = losses.best_worst(scores)
    np.testing.assert_array_equal(dropped[2], [False, False, True])
    assert (dropped[0][2], dropped[1][2]) == (0, 1)


def test_ties_cost_nothing_ln2_or_a_pair():
    rewards = jnp.array([[1.0, 1], [5, 2]])  # prompt 0 is tied, prompt 1 prefers its first completion
    only, _ = losses.online_dpo(NEW[1:], REF[1:], MASK[1:], rewards[1:])
    dropped, metrics = losses.online_dpo(NEW, REF, MASK, rewards)
    close(dropped, only)
    assert metrics['tied'] == .5 and metrics['pairs'] == 1
    same, _ = losses.online_dpo(NEW, REF, MASK, rewards, ties='same')
    close(same, (only + np.log(2)) / 2)
    pair, _ = losses.online_dpo(NEW[:1], REF[:1], MASK[:1], jnp.array([[2.0, 1]]))
    ordered, _ = losses.online_dpo(NEW, REF, MASK, rewards, ties='order')
    close(ordered, (only + pair) / 2)


def test_a_batch_of_ties_has_neither_loss_nor_gradient():
    f = jax.value_and_grad(losses.online_dpo, has_aux=True)
    (loss, metrics), grad = f(jnp.asarray(NEW), REF, MASK, jnp.ones((2, 2)))
    assert loss == 0 and metrics['pairs'] == 0 and metrics['tied'] == 1
    np.testing.assert_array_equal(grad, 0)


def test_of_many_completions_only_the_extremes_count():
    rng = np.random.default_rng(3)
    x, ref = (rng.normal(-1, .3, (2, 4, 3)).astype(np.float32) for _ in range(2))
    rewards = jnp.array([[3.0, 2, 5, 4], [1, 1, 4, 0]])
    chosen, rejected, counts = losses.best_worst(rewards)
    np.testing.assert_array_equal(chosen, [2, 2])
    np.testing.assert_array_equal(rejected, [1, 3])
    extremes = lambda x: np.stack([x[[0, 1], chosen], x[[0, 1], rejected]], 1)
    mask = np.ones((2, 4, 3))
    expected, _ = losses.online_dpo(*map(extremes, (x, ref, mask)), extremes(np.asarray(rewards)))
    loss, _ = losses.online_dpo(x, ref, mask, rewards)
    close(loss, expected)


def test_online_dpo_does_not_depend_on_the_order_of_prompts_or_samples():
    rng = np.random.default_rng(4)
    x, ref = (rng.normal(-1, .3, (5, 3, 2)).astype(np.float32) for _ in range(2))
    rewards, mask = rng.normal(size=(5, 3)).astype(np.float32), np.ones((5, 3, 2))
    loss = lambda x, ref, rewards: losses.online_dpo(x, ref, mask, rewards)[0]
    p, s = rng.permutation(5), rng.permutation(3)
    close(loss(x[p][:, s], ref[p][:, s], rewards[p][:, s]), loss(x, ref, rewards), 1e-6)


def test_a_missing_reward_leaves_its_group():
    """The pair is of the others, and a group of one reward has no pair; the best is the best of the others."""
    rng, nan = np.random.default_rng(5), jnp.nan
    x, ref = (rng.normal(-1, .3, (3, 3, 4)).astype(np.float32) for _ in range(2))
    mask, rewards = np.ones((3, 3, 4)), jnp.array([[nan, 1, 5], [3, nan, nan], [2, 4, 3]])
    chosen, rejected, counts = losses.best_worst(rewards)
    assert chosen[0] == 2 and rejected[0] == 1 and counts.tolist() == [True, False, True]
    pairs = np.array([[0, 0, 2, 2], [1, 2, 0, 1]])
    picked = lambda x: np.asarray(x)[pairs[0], pairs[1]].reshape(2, 2, *np.shape(x)[2:])
    only, _ = losses.online_dpo(picked(x), picked(ref), picked(mask), picked(rewards))
    (loss, metrics), grad = jax.value_and_grad(losses.online_dpo, has_aux=True)(x, ref, mask, rewards)
    close(loss, only)
    assert metrics['missing_rewards'] == pytest.approx(1 / 3) and metrics['reward'] == 3
    assert metrics['reward_gap'] == 3 and metrics['pairs'] == 2
    assert (np.asarray(grad)[[0, 1, 1, 1], [0, 0, 1, 2]] == 0).all()
    tied = jnp.array([[nan, 1, 1]])
    assert [int(i[0]) for i in losses.best_worst(tied, ties='order')[:2]] == [1, 2]
    assert not losses.best_worst(tied)[2][0] and losses.best_worst(tied, ties='order')[2][0]
    best, metrics = losses.best_of_n(x, mask, jnp.array([[nan, 1, 5], [nan, nan, nan], [nan, 0, -1]]))
    close(best, -(x[0, 2].sum() + x[2, 1].sum()) / 2)
    assert metrics['best_reward'] == 2.5 and metrics['reward'] == 1.25


@pytest.mark.parametrize('shape, ties, message', [
    ((4, 1), 'drop', r'shape \(4, 1\), .* at least 2 completions'), ((4,), 'drop', r'shape \(4,\), expected \[prompts'),
    ((2, 2), 'first', "ties='first'")])
def test_pairs_that_cannot_be_formed_are_refused(shape, ties, message):
    with pytest.raises(ValueError, match=message):
        losses.best_worst(jnp.zeros(shape), ties=ties)


# Best of N

def test_best_of_n_by_hand():
    loss, metrics = losses.best_of_n(NEW, MASK, REWARDS)
    close(loss, -(sums(NEW)[0, 1] + sums(NEW)[1, 0]) / 2)
    assert metrics['best_reward'] == 3.5 and metrics['reward'] == 2.5
    tied, _ = losses.best_of_n(NEW, MASK, jnp.ones((2, 2)))
    close(tied, -sums(NEW)[:, 0].mean())  # the first of equals
    grads = jax.grad(lambda x: losses.best_of_n(x, MASK, REWARDS)[0])(jnp.asarray(NEW))
    np.testing.assert_allclose(grads, -0.5 * MASK * np.array([[[0], [1]], [[1], [0]]]))


# PPO

def surrogate(advantage, ratio, low=.8, high=1.2):
    return np.maximum(-advantage * ratio, -advantage * np.clip(ratio, low, high))


def test_ppo_by_hand():
    ratio = np.exp(np.float64(NEW) - OLD)
    terms = surrogate(WIDE, ratio)
    loss, metrics = losses.ppo(NEW, OLD, WIDE, MASK)
    close(loss, terms[MASK].mean())
    close(metrics['ratio'], ratio[MASK].mean())
    stopped = -WIDE * np.clip(ratio, .8, 1.2) > -WIDE * ratio
    close(metrics['clip_fraction'], stopped[MASK].mean())
    assert 0 < stopped[MASK].mean() < 1
    d = np.float64(OLD) - NEW
    close(metrics['old_kl'], (np.exp(-d) - 1 + d)[MASK].mean())
    high, _ = losses.ppo(NEW, OLD, WIDE, MASK, clip=.1, clip_high=.4)
    close(high, surrogate(WIDE, ratio, .9, 1.4)[MASK].mean())
    close(losses.ppo(NEW, OLD, ADVANTAGES[..., None], MASK)[0], loss, 1e-7)


@pytest.mark.parametrize('advantage, ratio, free', [(1, 1.5, False), (1, .5, True), (-1, 1.5, True), (-1, .5, False)])
def test_the_clip_stops_gradients_only_where_it_should(advantage, ratio, free):
    f = lambda x: losses.ppo(x, jnp.zeros((1, 1)), jnp.full((1, 1), float(advantage)), jnp.ones((1, 1)))[0]
    close(jax.grad(f)(jnp.log(jnp.full((1, 1), ratio)))[0, 0], -advantage * ratio if free else 0)


def test_on_policy_ppo_has_the_policy_gradient():
    f = lambda x: losses.ppo(x, NEW, WIDE, MASK)[0]
    close(jax.grad(f)(jnp.asarray(NEW)), -WIDE * MASK / MASK.sum())


def test_advantages_and_what_values_are_compared_with_get_no_gradient():
    assert not jax.grad(lambda a: losses.ppo(NEW, OLD, a, MASK)[0])(WIDE).any()
    for grad in jax.grad(lambda old, returns: losses.value_loss(NEW, old, returns, MASK)[0], (0, 1))(OLD, REF):
        np.testing.assert_array_equal(grad, 0)


def test_value_loss_by_hand():
    values, old, returns = (jnp.array([x]) for x in ([1.0, 0, 2, 9], [.5, 0, 2.1, 9], [0.0, 1, 2, 9]))
    mask = jnp.array([[1, 1, 1, 0]])
    # Clipped to .5 + .2, 0, 2: squared errors max(1, .49), max(1, 1), max(0, 0).
    loss, metrics = losses.value_loss(values, old, returns, mask)
    close(loss, .5 * (1 + 1 + 0) / 3)
    moved, metrics = losses.value_loss(jnp.array([[.1, 0, 2, 9]]), old, returns, mask)
    close(moved, .5 * (.3 ** 2 + 1 + 0) / 3)  # the first is pulled back to .3, further from its target: that counts
    close(metrics['value_clip_fraction'], 1 / 3)
    free, _ = losses.value_loss(jnp.array([[.1, 0, 2, 9]]), old, returns, mask, clip=None)
    close(free, .5 * (.01 + 1 + 0) / 3)
    close(losses.value_loss(returns, old, returns, mask, clip=None)[1]['explained_variance'], 1)
    of, to = NEW[MASK].astype(np.float64), REF[MASK].astype(np.float64)
    close(losses.value_loss(NEW, OLD, REF, MASK)[1]['explained_variance'], 1 - np.var(to - of) / np.var(to))


# Stale samples

def test_importance_weights_by_hand():
    w = np.exp(np.float64(OLD) - BEHAVIOUR)
    close(losses.importance_weights(OLD, BEHAVIOUR, MASK, cap=1.1), np.where(MASK, np.minimum(w, 1.1), 1))
    close(losses.importance_weights(OLD, BEHAVIOUR, MASK, cap=1.1, beyond='mask'),
          np.where(MASK, np.where(w > 1.1, 0, w), 1))
    close(losses.importance_weights(OLD, BEHAVIOUR, MASK, cap=1.5, level='sequence')[..., 0],
          np.minimum(np.exp(sums(OLD) - sums(BEHAVIOUR)), 1.5))
    assert (w[MASK] > 1.1).any() and (w[MASK] < 1.1).any()
    for kwargs, message in (({'cap': 0}, 'cap=0'), ({'level': 'batch'}, "level='batch'"),
                            ({'beyond': 'x'}, "beyond='x'")):
        with pytest.raises(ValueError, match=message):
            losses.importance_weights(OLD, BEHAVIOUR, MASK, **kwargs)


def test_decoupled_ppo_by_hand():
    w, ratio = np.exp(np.float64(OLD) - BEHAVIOUR), np.exp(np.float64(NEW) - OLD)
    loss, metrics = losses.decoupled_ppo(NEW, OLD, BEHAVIOUR, WIDE, MASK, cap=1.2)
    close(loss, (np.minimum(w, 1.2) * surrogate(WIDE, ratio))[MASK].mean())
    close(metrics['weight'], np.minimum(w, 1.2)[MASK].mean())
    d = np.float64(BEHAVIOUR) - OLD
    close(metrics['behaviour_kl'], (np.exp(-d) - 1 + d)[MASK].mean())


def test_decoupled_ppo_is_ppo_where_the_sampler_is_the_proximal_policy():
    decoupled, metrics = losses.decoupled_ppo(NEW, OLD, OLD, WIDE, MASK)
    assert decoupled == losses.ppo(NEW, OLD, WIDE, MASK)[0] and metrics['behaviour_kl'] == 0


def test_untruncated_weights_make_the_gradient_unbiased():
    """A two-armed policy, samples from another: weighted, the expected gradient is the on-policy one."""
    logits, behaviour, reward = jnp.array([.3, -.2]), jnp.log(jnp.array([.9, .1])), np.array([[1.0], [3.0]])
    def gradient(weighted, sampler):
        def loss(logits):
            logp = jax.nn.log_softmax(logits)[:, None]
            w = losses.importance_weights(logp, sampler[:, None], np.ones((2, 1)), cap=1e9) if weighted else None
            each = [losses.rloo(logp[i:i + 1], reward[i], np.ones((1, 1)), weights=None if w is None else w[i:i + 1])[0]
                    for i in range(2)]
            return sum(jax.lax.stop_gradient(jnp.exp(sampler[i])) * each[i] for i in range(2))
        return jax.grad(loss)(logits)
    exact = gradient(False, jax.nn.log_softmax(logits))
    close(gradient(True, behaviour), exact)
    assert np.abs(gradient(False, behaviour) - exact).max() > .1


def test_staleness_shows_in_the_ratio_of_sampler_logprobs():
    """Ratios against the sampler's own log-probabilities differ from 1 at the first step on a stale batch."""
    stale, metrics = losses.proximal_rloo(NEW, OLD, ADVANTAGES, MASK)
    assert abs(metrics['ratio'] - 1) > 1e-2
    _, recomputed = losses.proximal_rloo(NEW, NEW, ADVANTAGES, MASK)
    assert recomputed['ratio'] == 1


# RLOO

def test_golden_proximal_rloo():
    k1 = kl.estimate(golden.LOGPROBS, golden.REF_LOGPROBS)[:2]
    r = kl.penalized_scores(jnp.array([1.2, -1.0]), k1, golden.MASK[:2], .05)
    a = advantages.leave_one_out(r[None])[0]
    new = golden.LOGPROBS[:2] + np.array([[.05], [.03]], np.float32)
    loss, metrics = losses.proximal_rloo(new, golden.LOGPROBS[:2], a, golden.MASK[:2])
    np.testing.assert_allclose(loss, .038744, atol=1e-6)
    np.testing.assert_allclose(metrics['ratio'], (1.161834 + 1.197217) / 2, atol=1e-6)


def test_rloo_by_hand():
    loss, _ = losses.rloo(NEW, ADVANTAGES, MASK)
    close(loss, -(ADVANTAGES * sums(NEW)).mean())
    w = np.array([[.5, 1], [2, 0]], np.float32)
    for weights in (w, w[..., None]):
        close(losses.rloo(NEW, ADVANTAGES, MASK, weights=weights)[0], -(w * ADVANTAGES * sums(NEW)).mean())


def test_proximal_rloo_on_policy_has_the_gradient_of_rloo():
    near = jax.grad(lambda x: losses.proximal_rloo(x, NEW, ADVANTAGES, MASK)[0])(jnp.asarray(NEW))
    close(near, jax.grad(lambda x: losses.rloo(x, ADVANTAGES, MASK)[0])(jnp.asarray(NEW)))


def test_proximal_rloo_clips_whole_sequences():
    ratio = np.exp(sums(NEW) - sums(OLD))
    loss, metrics = losses.proximal_rloo(NEW, OLD, ADVANTAGES, MASK)
    close(loss, surrogate(ADVANTAGES, ratio).mean())
    assert metrics['clip_fraction'] == (-ADVANTAGES * np.clip(ratio, .8, 1.2) > -ADVANTAGES * ratio).mean() > 0
    with pytest.raises(ValueError, match='clip=1.5'):
        losses.proximal_rloo(NEW, OLD, ADVANTAGES, MASK, clip=1.5)


# GRPO

def test_grpo_by_hand():
    ratio, d = np.exp(np.float64(NEW) - OLD), np.float64(REF) - NEW
    terms = surrogate(WIDE, ratio) + .1 * (np.exp(d) - d - 1)
    loss, metrics = losses.grpo(NEW, OLD, ADVANTAGES, MASK, ref_logprobs=REF, beta=.1)
    close(loss, ((terms * MASK).sum(-1) / MASK.sum(-1)).mean())
    close(metrics['ref_kl'], (np.exp(d) - d - 1)[MASK].mean())
    per_token, _ = losses.grpo(NEW, OLD, ADVANTAGES, MASK, ref_logprobs=REF, beta=.1, mean_over='token')
    close(per_token, terms[MASK].mean())
    assert abs(per_token - loss) > 1e-3
    w = np.array([[[1.], [.5]], [[0], [1]]], np.float32)
    weighted, _ = losses.grpo(NEW, OLD, ADVANTAGES, MASK, weights=w)
    close(weighted, ((surrogate(WIDE, ratio) * w * MASK).sum(-1) / MASK.sum(-1)).mean())
    as_array, _ = losses.grpo(NEW, OLD, ADVANTAGES, MASK, ref_logprobs=REF, beta=jnp.full((2, 1, 1), .1))
    close(as_array, loss, 1e-7)
    with pytest.raises(ValueError, match='beta=0.1 needs ref_logprobs'):
        losses.grpo(NEW, OLD, ADVANTAGES, MASK, beta=.1)
    with pytest.raises(ValueError, match="mean_over='batch'"):
        losses.grpo(NEW, OLD, ADVANTAGES, MASK, mean_over='batch')


def test_a_tied_group_pays_for_its_divergence_alone():
    """Whatever KL costs, equal rewards give no advantage: no gradient where policy and reference agree."""
    a = advantages.group_normalized(jnp.ones((2, 2)))
    f = lambda x, ref: losses.grpo(x, OLD, a, MASK, ref_logprobs=ref, beta=.1)[0]
    np.testing.assert_array_equal(jax.grad(f)(jnp.asarray(NEW), NEW), 0)
    d = np.float64(REF) - NEW
    close(f(NEW, REF), .1 * (((np.exp(d) - d - 1) * MASK).sum(-1) / MASK.sum(-1)).mean())

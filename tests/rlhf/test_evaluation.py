"""Measures of a policy, through the whole path, on models whose probabilities are known in advance."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.rlhf import base
from experiments.rlhf.data import tasks
from experiments.rlhf.models import inference, loading
from experiments.rlhf.models.inference import Policy
from experiments.rlhf.policy import completions, evaluation, reward_model, rewards
from experiments.runtime import mesh as mesh_lib
from rlhf_jax import convert, tokenizers
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.gpt_neox import GPTNeoX
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.weights import files
from rlhf_jax.weights.rules import flatten, param_shapes, unflatten
from tests.rlhf.tiny_models import random_params

MODULE = GPTNeoX(vocab_size=259, width=8, depth=1, num_heads=1, max_length=384)
A = ord('a')
ONE = mesh_lib.make_mesh({}, jax.devices()[:1])


def constant(nll, mesh=ONE):
    """A policy that says 'a' with probability exp(-nll), whatever came before, and anything else alike."""
    shapes = flatten(param_shapes(MODULE, np.zeros((1, 1), np.int32)))
    flat = {name: np.zeros(x.shape, np.float32) for name, x in shapes.items()}
    flat['norm/bias'][0] = 1
    flat['lm_head/kernel'][0] = math.log((1 - math.exp(-nll)) / 258)
    flat['lm_head/kernel'][0, A] = -nll
    return Policy(MODULE, unflatten(flat), tokenizers.ByteTokenizer(), mesh=mesh)


@pytest.fixture(scope='module')
def policy():
    return constant(0.7)


def test_published_kl_beside_the_true_one(policy):
    """30 tokens of 0.7 nats after 320: 1.062 where prompts are counted, 2.014 where they are not."""
    prompts, rows = ['x' * 320] * 3, [{}] * 3
    found, responses = evaluation.evaluate_policy(
        policy, prompts, rows, policy.sampling(max_new_tokens=30, temperature=0.0), key=jax.random.key(0), batch_size=2,
        reference=constant(1.0))
    assert responses.texts == [['a' * 30]] * 3
    assert (found['length'], found['ended'], found['num_prompts']) == (30, 0, 3)
    np.testing.assert_allclose([found['kl'], found['kl_per_token']], [0.3 * 30, 0.3], rtol=1e-5)
    np.testing.assert_allclose([found['perplexity'], found['legacy_kl_perplexity']],
                               [math.e, math.exp(30 / 349)], rtol=1e-5)
    itself = evaluation.of_drift(policy, policy, responses, batch_size=2)
    assert (round(itself['perplexity'], 3), round(itself['legacy_kl_perplexity'], 3)) == (2.014, 1.062)
    assert itself['kl'] == 0


def test_weights_between_a_policy_and_its_start(policy):
    """The ends are the two policies; on the way the bias of 'a' and so its probability lies between."""
    start, prompts, how = constant(2.0), ['x'], policy.sampling(max_new_tokens=4, temperature=0.0)

    def nll(alpha):
        between = policy.interpolated(start, alpha)
        return evaluation.of_drift(policy, between, policy.sample(prompts, how, jax.random.key(0)))['perplexity']
    np.testing.assert_allclose([nll(0.0), nll(1.0)], [math.exp(2.0), math.exp(0.7)], rtol=1e-4)
    assert math.exp(0.7) < nll(0.5) < math.exp(2.0)
    np.testing.assert_allclose(policy.params['lm_head']['kernel'][0, A], -0.7)  # it is left as it was
    other = Policy(MODULE.clone(width=16), random_params(MODULE.clone(width=16)), tokenizers.ByteTokenizer(), mesh=ONE)
    with pytest.raises(ValueError, match='weights of different models cannot be interpolated; give the --reference'):
        policy.interpolated(other, 0.5)


def test_samples_hang_on_their_prompt_and_not_on_the_batch(policy):
    how, key = policy.sampling(max_new_tokens=6, temperature=1.0), jax.random.key(3)
    prompts = ['one', 'two and more', 'three', 'one']
    done = []
    found = policy.sample(prompts, how, key, batch_size=3, num_samples=2, progress=done.append)
    assert found.tokens.shape == (4, 2, 6) and done == [3, 4]
    spread = Policy(MODULE, constant_params(policy), policy.tokenizer, mesh=mesh_lib.make_mesh({'data': 2},
                                                                                              jax.devices()[:2]))
    again = spread.sample(prompts[:2], how, key, batch_size=2, num_samples=2)
    np.testing.assert_array_equal(again.tokens, found.tokens[:2])
    assert len({tuple(x) for x in found.tokens.reshape(8, 6)}) > 6  # samples, and equal prompts, draw apart
    np.testing.assert_allclose(policy.logprobs(found, batch_size=8), found.logprobs, atol=1e-5)
    with pytest.raises(ValueError, match='prompt 1 has too many tokens: 380 and a response of 6 exceed the context'):
        policy.sample(['a', 'b' * 380], how, key)


def constant_params(policy):
    """Split blocks -> stacked ones, of a depth of 1."""
    params = dict(policy.params)
    return params | {'blocks': jax.tree.map(lambda x: np.asarray(x)[None], params.pop('block_0'))}


def test_text_is_read_through_a_window(policy):
    """Every token but the first counts once; a last window of one token counts as much as another if unweighted."""
    other = -math.log((1 - math.exp(-0.7)) / 258)
    text = 'x' + 'a' * 7 + 'b'  # windows of 4 by 2: counts 3, 2, 2, 1
    found = evaluation.of_text(policy, text, size=4, stride=2, batch_size=2)
    np.testing.assert_allclose(found['drift_perplexity'], math.exp((7 * 0.7 + other) / 8), rtol=1e-4)
    np.testing.assert_allclose(found['drift_perplexity_unweighted'], math.exp((3 * 0.7 + other) / 4), rtol=1e-4)


def test_wins_are_strict_and_over_every_sample(policy):
    prompts, rows = ['p', 'q'], [{'reference': 'aaa'}, {'reference': 'aaaaaaaa'}]
    gold = lambda c: np.array([len(text) for text in c.texts], np.float32)
    found, responses = evaluation.evaluate_policy(
        policy, prompts, rows, policy.sampling(max_new_tokens=3, temperature=0.0), key=jax.random.key(0), batch_size=2,
        gold=gold, reward=lambda c: np.array([row['reference'] == 'aaa' for row in c.rows], np.float32),
        task=tasks.Task(metrics=lambda texts, rows: {'mine': float(len(texts))}))
    assert (found['win_rate'], found['win_ties'], found['win_margin']) == (0, 0.5, -2.5)
    assert (found['gold'], found['reference_gold'], found['mine'], found['reward']) == (3, 5.5, 2, 0.5)
    assert found['pass_at_1'] == 0.5 and found['distinct_1'] == 0.5
    more = evaluation.of_wins(policy, prompts, rows, np.array([3.0, 4.0, 3.0, 9.0]), gold)  # two samples of each
    assert (more['win_rate'], more['win_ties'], more['win_margin']) == (0.5, 0.25, -0.75)
    given = policy.given(prompts, ['aaaa', 'b'])
    assert given.mask.sum(-1).tolist() == [[5], [2]] and given.tokens[1, 0, 1] == policy.tokenizer.eos
    completions = evaluation.completions_of(dataclasses.replace(
        given, texts=[['1', '2'], ['3', '4']], **{name: np.repeat(getattr(given, name), 2, 1)
                                                  for name in ('tokens', 'mask', 'ended')}), rows)
    assert completions.texts == ['1', '2', '3', '4'] and completions.rows == [rows[0], rows[0], rows[1], rows[1]]
    assert completions.tokens[3].tolist() == [*given.prompt_tokens[1], *given.tokens[1, 0]]


def test_answers_of_the_data_that_are_too_long_cost_the_win_rate_alone(policy, caplog):
    rows = [{'reference': 'a'}, {'reference': 'a' * policy.module.max_length}]
    found, _ = evaluation.evaluate_policy(
        policy, ['p', 'q'], rows, policy.sampling(max_new_tokens=3, temperature=0.0), key=jax.random.key(0),
        batch_size=2, gold=lambda c: np.array([len(text) for text in c.texts], np.float32))
    assert found['gold'] == 3 and 'win_rate' not in found
    assert "there is no win rate: of the data's own responses one is too long (prompt 0 has" in caplog.text


def test_an_interrupted_evaluation_goes_on(policy, tmp_path, monkeypatch):
    prompts, how = ['one', 'two and more', 'three', 'one', 'five'], policy.sampling(max_new_tokens=6, temperature=1.0)
    computed, stop = [], []

    def counted(name, real):
        def once(*args, **settings):
            if len(computed) in stop:
                raise KeyboardInterrupt
            computed.append(name)
            return real(*args, **settings)
        return once
    monkeypatch.setattr(inference.generate_lib, 'generate', counted('responses', inference.generate_lib.generate))
    monkeypatch.setattr(inference, '_score', counted('logprobs', inference._score))

    def measure(place=str(tmp_path)):
        computed.clear()
        return evaluation.evaluate_policy(
            policy, prompts, [{}] * 5, how, key=jax.random.key(3), num_samples=2, batch_size=2,
            reward=lambda c: np.array([len(text) for text in c.texts], np.float32), reference=constant(1.0),
            human_text='x' + 'a' * 7, place=place)
    whole, responses = measure(place='')
    everything = ['responses'] * 3 + ['logprobs'] * 11  # of ten rows by two models, and a window
    assert computed == everything and not list(tmp_path.iterdir())
    for done in (2, 5):
        stop[:] = [done]
        with pytest.raises(KeyboardInterrupt):
            measure()
    stop.clear()
    out, again = measure()
    assert computed == everything[7:] and out == whole and again.texts == responses.texts
    for name in ('tokens', 'mask', 'logprobs', 'ended'):
        np.testing.assert_array_equal(getattr(again, name), getattr(responses, name))
    assert measure()[0] == whole and not computed

    def sample(measured=policy, how=how, seed=3, num=5, **size):
        return measured.sample(prompts[:num], how, jax.random.key(seed),
                               **dict(num_samples=2, batch_size=2, place=str(tmp_path)) | size)
    stop[:] = [0]
    assert sample().texts == responses.texts
    for changed in (dict(seed=4), dict(how=dataclasses.replace(how, temperature=0.9)), dict(num=4), dict(num_samples=3),
                    dict(measured=policy.interpolated(constant(2.0), 0.5)), dict(batch_size=3)):
        with pytest.raises(KeyboardInterrupt):  # it begins to draw
            sample(**changed)


def test_scores_of_models_are_read_again(tmp_path):
    module = RewardModel(GPT2(vocab_size=259, width=16, depth=1, num_heads=2, max_length=16))
    for name, scale in (('a', 1), ('b', 2)):
        params = jax.tree.map(lambda x, scale=scale: scale * x, random_params(module))
        files.save(tmp_path / name, convert.to_torch('gpt2', module, params), convert.config_of('gpt2', module))
    tokens = np.arange(20).reshape(5, 4).astype(np.int32)
    batch = completions.Completions(['x'] * 5, [{}] * 5, tokens, np.ones((5, 4), bool), np.ones(5, bool))
    called = []

    def scorer(name, **how):
        model = reward_model.RewardModel(str(tmp_path / name), ONE, batch_size=2, **how)
        run = model._run
        model._run = lambda *args: called.append(name) or run(*args)
        return evaluation.written(model, str(tmp_path / 'kept'))

    def scores(reward, batch=batch):
        called.clear()
        return evaluation.scores_of(reward, batch, 2)
    first = scores(scorer('a'))
    assert called == ['a'] * 3 and (scores(scorer('a')) == first).all() and not called
    others = [scores(scorer('b')), scores(scorer('a', before_eos=True)),
              scores(scorer('a'), dataclasses.replace(batch, tokens=tokens + 1))]
    assert all((other != first).all() for other in others) and len(called) == 3
    assert (scores(scorer('a'), batch.part(slice(0, 2))) == first[:2]).all() and not called


def test_a_reward_model_is_compiled_with_the_options_of_steps(tmp_path, monkeypatch):
    module = RewardModel(GPT2(vocab_size=259, width=16, depth=1, num_heads=2, max_length=16))
    files.save(tmp_path, convert.to_torch('gpt2', module, random_params(module)), convert.config_of('gpt2', module))
    monkeypatch.setattr(reward_model.compiler, 'options', lambda mesh: {'no_such_option': str(mesh is ONE)})
    tokens = np.zeros((2, 4), np.int32)
    batch = completions.Completions(['x'] * 2, [{}] * 2, tokens, np.ones((2, 4), bool), np.ones(2, bool))
    with pytest.raises(jax.errors.JaxRuntimeError, match='no_such_option'):
        reward_model.RewardModel(str(tmp_path), ONE, batch_size=2)(batch)


def test_rewards_see_some_prompts_at_a_time(policy):
    seen = []
    batch = completions.Completions([str(i) for i in range(5)], [{'i': i} for i in range(5)], *np.zeros((2, 5, 3), int),
                                    np.ones(5, bool))

    def reward(c):
        seen.append(len(c.texts))
        return [row['i'] + int(text) for text, row in zip(c.texts, c.rows)]
    done = []
    assert evaluation.scores_of(reward, batch, 2, done.append).tolist() == [0, 2, 4, 6, 8]
    assert seen == [2, 2, 1] and done == [2, 4, 5]
    with pytest.raises(ValueError, match='rewards: 1 of 2 are not finite'):
        evaluation.scores_of(lambda c: [math.nan if row['i'] == 3 else 0.0 for row in c.rows], batch, 2)


def test_a_process_without_a_share_has_no_gold_scores(monkeypatch):
    """Of five references and four processes the last one scores none; one whose rewards are missing has others' beside
    it."""
    batch = completions.Completions(list('abcde'), [{}] * 5, np.zeros((5, 4), np.int32), np.ones((5, 4), bool),
                                    np.ones(5, bool))
    scorer = rewards.Scorer(base.policy().reward, None, lambda c: [None if text == 'e' else 1.0 for text in c.texts])
    with pytest.raises(ValueError, match='all 1 are missing'):
        scorer.gold(batch.part(slice(4, 5)))
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    assert scorer.gold(batch.part(slice(5, 5))).shape == (0,)
    np.testing.assert_array_equal(scorer.gold(batch.part(slice(3, 5))), [1, np.nan])
    assert np.isnan(scorer.gold(batch.part(slice(4, 5)))).all()


def test_pass_rates_and_variety():
    scores = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1]], np.float32)
    found = evaluation.of_passes(scores)
    assert set(found) == {'pass_at_1', 'pass_at_2', 'pass_at_3'}
    np.testing.assert_allclose([found['pass_at_1'], found['pass_at_2'], found['pass_at_3']],
                               [4 / 9, (2 / 3 + 1) / 3, 2 / 3])
    assert evaluation.of_passes(scores * 0.5) == {}


def test_gold_is_read_at_eos_or_one_before(tmp_path):
    module = RewardModel(GPT2(vocab_size=259, width=16, depth=1, num_heads=2, max_length=16))
    params = random_params(module)
    files.save(tmp_path, convert.to_torch('gpt2', module, params), convert.config_of('gpt2', module))
    tokens = np.arange(12).reshape(3, 4).astype(np.int32)
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    batch = completions.Completions([''] * 3, [{}] * 3, tokens, mask, np.array([True, True, False]))
    values = np.asarray(module.apply({'params': params}, jnp.asarray(tokens), mask=jnp.asarray(mask)))
    at = reward_model.RewardModel(str(tmp_path), ONE, batch_size=2)(batch)
    before = reward_model.RewardModel(str(tmp_path), ONE, batch_size=2, before_eos=True)(batch)
    np.testing.assert_allclose(at, values[[0, 1, 2], [3, 2, 3]], atol=1e-5)
    np.testing.assert_allclose(before, values[[0, 1, 2], [2, 1, 3]], atol=1e-5)  # the third never ended
    held = reward_model.shared(str(tmp_path), ONE, batch_size=2)
    assert reward_model.shared(str(tmp_path), ONE, batch_size=2) is held
    assert reward_model.shared(str(tmp_path), ONE, batch_size=2, before_eos=True) is not held
    with pytest.raises(ValueError, match='the reward model has 259 tokens, the tokenizer 300'):
        reward_model.RewardModel(str(tmp_path), ONE, num_ids=300)
    with pytest.raises(ValueError, match='holds a reward model, not a policy'):
        loading.load_policy(str(tmp_path))

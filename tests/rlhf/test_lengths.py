"""Batches cut to the least length that holds them, texts packed a batch at a time: smaller shapes, the same loss."""
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs.rlhf import base
from experiments.rlhf.data import lengths, texts
from experiments.rlhf.policy import algorithms, autoregressive
from experiments.rlhf.policy.completions import Completions
from experiments.rlhf.policy.reward_model import RewardModel as RewardScorer
from experiments.rlhf.supervised import sft as sft_stage
from experiments.runtime import mesh as mesh_lib
from experiments.runtime.stream import Share
from rlhf_jax import convert
from rlhf_jax.losses.supervised import sft
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.weights import files
from tests.rlhf.test_texts import BYTES
from tiny_models import MODELS, random_params


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(lengths, 'TILE', 4)


def test_a_few_lengths_up_to_the_longest():
    assert lengths.lengths(30, 3) == (12, 20, 30) and lengths.lengths(30, 1) == (30,)
    assert lengths.lengths(3, 4) == (3,) and lengths.lengths(8, 4) == (4, 8)
    assert [lengths.least((12, 20, 30), n) for n in (0, 12, 13, 30, 99)] == [12, 12, 20, 30, 30]
    config = base.policy()
    config.length_buckets = 0
    with pytest.raises(ValueError, match='length_buckets=0 must be at least 1'):
        autoregressive.check(config)


# ---- Rollouts --------------------------------------------------------------------------------------------------------

def rollouts(prompt=11, response=13, longest=(6, 7), seed=0):
    """3 prompts of 2 completions; the longest prompt and response have `longest` tokens."""
    rng = np.random.default_rng(seed)
    counts = [rng.integers(1, n + 1, (3, 2)) for n in longest]
    for n, count in zip(longest, counts):
        count[0, 0] = n
    mask = np.arange(response) < counts[1][..., None]
    return {'tokens': rng.integers(0, 5, (3, 2, prompt + response)), 'mask': mask,
            'prompt_mask': np.arange(prompt) >= prompt - counts[0][..., None],
            'logprobs': np.where(mask, -rng.random(mask.shape), 0).astype(np.float32),
            'rewards': rng.random((3, 2)).astype(np.float32), 'policy_version': np.zeros(mask.shape, np.int32),
            'ended': np.ones((3, 2), bool), 'replaced': np.zeros((3, 2), bool)}


def cut(batch, buckets=3):
    config = base.policy()
    config.length_buckets = buckets
    config.sampling.update(dict(max_prompt=batch['prompt_mask'].shape[-1], max_new_tokens=batch['mask'].shape[-1]))
    return autoregressive.shortened(config, batch)


@pytest.mark.parametrize('longest, prompt, response', [((6, 7), 8, 8), ((3, 8), 4, 12), ((9, 3), 11, 8),
                                                       ((11, 13), 11, 13), ((8, 11), 8, 12), ((8, 12), 8, 13)])
def test_rollouts_keep_every_token_and_the_place_after_the_last(longest, prompt, response):
    batch = rollouts(longest=longest)
    out = cut(batch)
    assert out['prompt_mask'].shape == (3, 2, prompt) and out['tokens'].shape == (3, 2, prompt + response)
    assert {out[name].shape for name in ('mask', 'logprobs', 'policy_version')} == {(3, 2, response)}
    whole = lambda b, row: b['tokens'][row][np.concatenate([b['prompt_mask'][row], b['mask'][row]])]
    for row in np.ndindex(3, 2):
        np.testing.assert_array_equal(whole(out, row), whole(batch, row))
    assert all(out[name] is batch[name] for name in ('rewards', 'ended', 'replaced'))
    assert {k: v.shape for k, v in cut(batch, 1).items()} == {k: v.shape for k, v in batch.items()}


def test_a_model_scores_a_cut_rollout_as_it_scores_the_whole():
    module = MODELS['gpt_neox'].clone(vocab_size=5)
    config = base.policy()
    config.sampling.max_new_tokens = 13
    networks = autoregressive.PolicyModels(config, has_critic=False)
    networks._policy = module
    params = {'policy': random_params(module)}
    batch = rollouts()
    for rows in (batch, cut(batch)):
        assert rows is batch or rows['tokens'].shape[-1] == 16
        scores = networks.forward(params, {name: jnp.asarray(rows[name]) for name in ('tokens', 'prompt_mask', 'mask')})
        if rows is batch:
            want = scores[0][rows['mask']]
    np.testing.assert_allclose(scores[0][rows['mask']], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['online_dpo', 'ppo', 'proximal_rloo', 'grpo', 'best_of_n'])
def test_losses_and_gradients_of_a_cut_rollout_are_those_of_the_whole(name):
    """The longest response has a token less than a bucket: PPO still reads the value past its EOS."""
    batch = rollouts(longest=(6, 8))
    settings = base.policy().algorithm
    settings.update(dict(name=name, after_eos=True))
    algorithm, table = algorithms.get(settings), jnp.linspace(-1.0, 1.0, 5)

    def score(weights, rows):
        """Scores and values that depend on the token and how many lie before it."""
        length = rows['mask'].shape[-1]
        tokens = rows['tokens'][..., -length:]
        scores = jax.nn.log_softmax(weights)[tokens] - 0.01 * jnp.arange(length)
        return scores, jnp.where(jnp.arange(length) <= rows['mask'].sum(-1, keepdims=True), scores ** 2, jnp.nan)

    def value_and_gradient(batch):
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        scorers = algorithms.Scorers(*(lambda rows, w=w, i=i: score(w, rows)[i] for w, i in
                                       ((0.9 * table, 0), (table, 0), (table, 1))), columns=('tokens', 'mask'))
        rows, metrics = algorithm.prepare(settings, batch, scorers, jnp.float32(0.05))
        (loss, more), gradient = jax.value_and_grad(
            lambda w: algorithm.loss(settings, *score(w, rows), rows), has_aux=True)(table)
        return metrics | more | {'loss': loss, 'gradient': gradient}
    whole, short = value_and_gradient(batch), value_and_gradient(cut(batch))
    assert whole.keys() == short.keys()
    for key, value in whole.items():
        np.testing.assert_allclose(short[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


def test_reward_models_read_rows_cut_to_the_longest_of_their_batch(tmp_path):
    module = RewardModel(GPT2(vocab_size=259, width=16, depth=1, num_heads=2, max_length=32))
    params, rng = random_params(module), np.random.default_rng(0)
    files.save(tmp_path, convert.to_torch('gpt2', module, params), convert.config_of('gpt2', module))
    prompts, responses = np.array([9, 2, 3, 11, 1]), np.array([4, 3, 2, 13, 2])  # 13, 5, 5, 24 and 3 tokens
    mask = np.concatenate([np.arange(11) >= 11 - prompts[:, None], np.arange(13) < responses[:, None]], 1)
    tokens = rng.integers(0, 259, mask.shape).astype(np.int32)
    batch = Completions([''] * 5, [{}] * 5, tokens, mask, np.array([True, False, True, True, True]))
    values = np.asarray(module.apply({'params': params}, jnp.asarray(tokens), mask=jnp.asarray(mask)))
    one = mesh_lib.make_mesh({}, jax.devices()[:1])
    for buckets, shapes in ((3, [(2, 8), (2, 16), (2, 24)]), (1, [(2, 24)] * 3)):
        model, seen = RewardScorer(str(tmp_path), one, batch_size=2, length_buckets=buckets, before_eos=True), []
        run = model._run
        model._run = lambda params, tokens, *more, run=run, seen=seen: seen.append(tokens.shape) or run(
            params, tokens, *more)
        last = 10 + responses - batch.ended  # the last token, or the one before an EOS
        np.testing.assert_allclose(model(batch), values[np.arange(5), last], atol=1e-6)
        assert seen == shapes


# ---- Texts -----------------------------------------------------------------------------------------------------------

WORDS = [('ab' * (i % 3), 'c' * (1 + 5 * i % 13)) for i in range(9)]


def config_of(**fields):
    config = base.sft()
    config.update(dict(batch_size=4, seed=3, max_length=22, length_buckets=3) | fields)
    return config


def demonstrations():
    return texts.demonstrations(WORDS, texts.Encoder(BYTES), pad=BYTES.pad, max_length=22)


def test_batches_are_as_long_as_their_longest_text_needs_in_all_processes():
    arrays, whole = demonstrations(), texts.ArrayBatches(demonstrations(), 4, seed=3)
    streams = [texts.batches(arrays, config_of(), share) for share in (Share(), Share((0,), 2), Share((1,), 2))]
    seen = set()
    for _ in range(8):
        full, one, first, second = next(whole), *map(next, streams)
        longest, width = full['mask'].sum(1).max(), one['tokens'].shape[1]
        assert longest <= width == lengths.least((8, 16, 22), longest)
        for name, x in one.items():
            np.testing.assert_array_equal(x, full[name][:, :width])
            np.testing.assert_array_equal(x, np.concatenate([first[name], second[name]]))
        seen.add(width)
    assert len(seen) > 1
    again = texts.batches(arrays, config_of())
    again.set_state(streams[0].get_state())
    np.testing.assert_array_equal(next(again)['tokens'], next(streams[0])['tokens'])


def test_pairs_are_cut_together():
    arrays = texts.preferences([('a', 'b', 'c' * 9)] * 4, texts.Encoder(BYTES), pad=0, max_length=22)
    config = ml_collections.ConfigDict(dict(batch_size=2, seed=0, max_length=22, length_buckets=3))
    assert {name: x.shape for name, x in next(texts.batches(arrays, config)).items()} == {
        'prompt_length': (2,), 'chosen': (2, 16), 'chosen_mask': (2, 16), 'rejected': (2, 16), 'rejected_mask': (2, 16)}


def test_numbers_of_packed_rows():
    assert texts.row_counts(128, 16) == (8, 16, 24, 32, 48, 64, 96, 128)
    assert texts.row_counts(16, 1) == (16,) and texts.row_counts(20, 5) == (4, 8, 12, 16, 20)


def test_a_batch_of_texts_is_packed_with_the_same_loss():
    module = MODELS['gpt_neox'].clone(vocab_size=259)
    params, arrays = random_params(module), demonstrations()
    config = config_of(pack_batch=True, batch_size=8, accumulate=8)
    stream, plain = texts.batches(arrays, config), texts.ArrayBatches(arrays, 8, seed=3)
    parts = [texts.batches(arrays, config, Share((i,), 2)) for i in range(2)]
    for _ in range(2):
        rows, want = next(stream), next(plain)
        assert len(rows['tokens']) < 8 and rows['mask'].dtype == np.int32
        assert sorted(rows['tokens'][rows['mask'] > 0]) == sorted(want['tokens'][want['mask']])
        if len(rows['tokens']) % 2 == 0:
            halves = list(map(next, parts))
            np.testing.assert_array_equal(np.concatenate([half['mask'] for half in halves]), rows['mask'])
        losses = []
        for batch, number in ((want, None), (rows, rows['mask'])):
            logits = module.apply({'params': params}, batch['tokens'], mask=jnp.asarray(batch['mask'], jnp.int32))
            losses.append(sft(logits, batch['tokens'], batch['mask'], prompt_mask=batch['prompt_mask'],
                              segment_ids=number))
        np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=2e-6)
        assert losses[1][1]['tokens'] == losses[0][1]['tokens']


def test_packing_twice_is_refused():
    with pytest.raises(ValueError, match='pack_batch=True packs the texts of a batch, but packing=True'):
        sft_stage.build(config_of(packing=True, pack_batch=True), mesh_lib.make_mesh({}, jax.devices()[:1]))

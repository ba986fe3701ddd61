import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.tasks import rows, translation
from rlhf_jax.tasks.translation import BOS, EOS, PAD


def test_sequences():
    tokens, lengths = translation.pad_right([translation.sequence([7, 8, 9], 2), translation.sequence([5])])
    np.testing.assert_array_equal(tokens, [[BOS, 7, 8, EOS], [BOS, 5, EOS, PAD]])
    read, read_lengths = translation.source(tokens, lengths)
    np.testing.assert_array_equal(read, [[7, 8, EOS], [5, EOS, PAD]])  # no BOS
    np.testing.assert_array_equal(read_lengths, [3, 2])
    fed, said, mask = translation.target(tokens, lengths)
    np.testing.assert_array_equal(fed, [[BOS, 7, 8], [BOS, 5, EOS]])
    np.testing.assert_array_equal(said, [[7, 8, EOS], [5, EOS, PAD]])
    np.testing.assert_array_equal(mask, [[True, True, True], [True, True, False]])
    with pytest.raises(ValueError, match='sentence 1 has no token'):
        translation.pad_right([[BOS, 5, EOS], translation.sequence([])])


def test_messages_are_closed():
    sampled = jnp.array([[5, 6, 7, EOS, 9],   # ends by itself; what follows goes
                         [5, 6, 7, 8, 9],     # never ends: EOS is added
                         [EOS, 6, 7, 8, 9],   # ends too early: three tokens, then EOS
                         [5, 6, EOS, 8, 9],   # three tokens with EOS are enough
                         [5, 6, 7, 8, EOS]])
    message, lengths, kept = translation.close(sampled)
    np.testing.assert_array_equal(message, [
        [5, 6, 7, EOS, PAD, PAD], [5, 6, 7, 8, 9, EOS], [EOS, 6, 7, EOS, PAD, PAD], [5, 6, EOS, PAD, PAD, PAD],
        [5, 6, 7, 8, EOS, PAD]])
    np.testing.assert_array_equal(lengths, [4, 6, 4, 3, 5])
    np.testing.assert_array_equal(kept.sum(-1), [4, 5, 3, 3, 5])  # an EOS that was added was not sampled
    limited, lengths, _ = translation.close(sampled, jnp.array([4, 4, 2, 3, 3]))
    np.testing.assert_array_equal(limited[1], [5, 6, 7, 8, EOS, PAD])
    np.testing.assert_array_equal(limited[4], [5, 6, 7, EOS, PAD, PAD])
    np.testing.assert_array_equal(lengths, [4, 5, 4, 3, 4])
    with pytest.raises(ValueError, match='min_length=3 is more than the 2 tokens'):
        translation.close(sampled[:, :2])


def test_batches_hold_every_row_once_within_their_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, (500, 3))
    for shuffled in (None, np.random.default_rng(1)):
        found = translation.batches(lengths, 200, shuffled, pool=5)
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(500))
        assert all(lengths[rows].max(-1).sum() <= 200 for rows in found)
        assert np.mean([np.ptp(lengths[rows].max(-1)) for rows in found]) < 10  # of similar length
    again = translation.batches(lengths, 200, np.random.default_rng(1), pool=5)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    np.testing.assert_array_equal(translation.batches(np.array([[2, 4], [3, 1], [4, 4], [9, 1]]), 9)[-1], [3])
    with pytest.raises(ValueError, match='max_tokens=9: row 1 alone has 10'):
        translation.batches(np.array([[2, 4], [10, 1]]), 9)


def test_reward_is_the_mean_likelihood_of_the_gold_german():
    logprobs = jnp.array([[-1., -2, -3], [-4, jnp.nan, 9]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    np.testing.assert_allclose(translation.reward(logprobs, mask), [-2, -4])
    assert not jax.grad(lambda x: translation.reward(x, mask).sum())(logprobs).any()  # no path to the second agent


def test_speaker_loss_by_hand():
    nan = jnp.nan
    logprobs, baseline = jnp.array([[-1., -2, nan], [-3, nan, nan]]), jnp.array([[-2., 0, nan], [1, 9, 9]])
    mask, entropy = jnp.array([[1, 1, 0], [1, 0, 0]], bool), jnp.array([[.5, 1, nan], [3, nan, nan]])
    loss = lambda lp, b: translation.speaker_loss(lp, entropy, b, jnp.array([-1., -2]), mask)
    value, found = loss(logprobs, baseline)
    # Advantages 1, -1 and -3: (1 - 2) / 2 and -9; squares (1 + 1) / 2 and 9.
    np.testing.assert_allclose([found['policy_loss'], found['baseline_loss'], found['entropy']], [-4.75, 5, 1.5])
    np.testing.assert_allclose(value, -4.75 + 50 - .0015, rtol=1e-6)
    by_logprobs, by_baseline = jax.grad(lambda *x: loss(*x)[0], (0, 1))(logprobs, baseline)
    np.testing.assert_allclose(by_logprobs, [[-.25, .25, 0], [1.5, 0, 0]])
    np.testing.assert_allclose(by_baseline, [[-5, 5, 0], [30, 0, 0]])  # of the squares alone


def test_metrics_of_task_and_drift():
    de, en = ['ein hund läuft im park'], ['a dog runs in the park']
    found = translation.metrics({'de': de, 'en': ['a dog runs in a park']}, {'de': de, 'en': en})
    assert found['bleu_de'] == 100 and 0 < found['bleu_en'] < 100


def test_real_triples(shared_data):
    folder = shared_data / 'multi30k' / 'task1_raw'
    data = rows.read_parallel({language: folder / f'val.{language}.gz' for language in translation.FIELDS})
    assert len(data) == 1014 and data[0]['en'] == 'A group of men are loading cotton onto a truck'
    lengths = np.array([[len(row[language].split()) + 2 for language in translation.FIELDS] for row in data])
    found = translation.batches(lengths, rng=np.random.default_rng(0))
    assert sum(map(len, found)) == 1014
    full = [lengths[i].max(-1).sum() for i in found]
    assert max(full) <= 1024 and np.mean(full) > 900
    text = {language: [row[language].lower() for row in data] for language in ('de', 'en')}
    assert translation.metrics(text, text)['bleu_en'] > 99.9

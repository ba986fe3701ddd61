import math

import numpy as np
import pytest

from rlhf_jax.tasks import imdb, perplexity, rows


def test_prompts_are_first_halves_cut_from_the_left():
    assert imdb.halves('a b c d e') == ('a b', 'c d e')
    assert imdb.halves('a  b c') == ('a ', 'b c')  # two spaces part an empty word
    words = lambda text: [ord(word) for word in text.split()]
    assert imdb.prompt_tokens('a b c d e f g h', words, 3) == [98, 99, 100]
    with pytest.raises(ValueError, match="text: 'one' has no first half"):
        imdb.prompt_tokens('one', words)


def test_stretches_have_exactly_their_words_and_follow_each_other():
    assert imdb.stretches('a b c d e', 2) == ['a b', ' c d']
    assert imdb.stretches('a b c d', 2) == ['a b', ' c d'] and imdb.stretches('a b', 2) == ['a b']
    assert imdb.stretches('a b', 3) == imdb.stretches('a b', 0) == ['a b']


def test_split():
    train, held_out = imdb.split(25000)
    assert (len(train), len(held_out)) == (20000, 5000)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(25000))
    np.testing.assert_array_equal(train, imdb.split(25000)[0])
    assert (train != imdb.split(25000, seed=1)[0]).any() and (train[:100] != np.arange(100)).any()
    with pytest.raises(ValueError, match='held_out=0.1 of 2 rows'):
        imdb.split(2, held_out=0.1)


def test_diversity_by_hand():
    found = imdb.diversity(['a b a', 'a b'], orders=(1, 2), segment=2)
    assert found['distinct_1'] == 2 / 5 and found['distinct_2'] == 2 / 3  # a b, b a, a b; none across texts
    entropy = lambda *p: -sum(x * math.log2(x) for x in p)
    np.testing.assert_allclose([found['entropy_1'], found['entropy_2']], [entropy(.6, .4), entropy(2 / 3, 1 / 3)])
    assert found['msttr'] == 0.75  # a b | a a | b
    with pytest.raises(ValueError, match='none of 1 has 3 words'):
        imdb.diversity(['a b'])


def test_windows_count_every_token_but_the_first_once():
    assert perplexity.windows(10, size=4, stride=2) == [
        perplexity.Window(0, 1, 4), perplexity.Window(2, 4, 6), perplexity.Window(4, 6, 8), perplexity.Window(6, 8, 10)]
    assert perplexity.windows(1024) == [perplexity.Window(0, 1, 1024)]
    assert perplexity.windows(1025) == [perplexity.Window(0, 1, 1024), perplexity.Window(512, 1024, 1025)]
    for num, size, stride in ((7, 5, 2), (100, 16, 7), (2, 8, 4), (33, 8, 1)):
        found = perplexity.windows(num, size=size, stride=stride)
        assert [t for w in found for t in range(w.first, w.end)] == list(range(1, num))
        assert all(w.end - w.begin <= size and w.first > w.begin for w in found)
        assert all(w.first - w.begin >= size - stride for w in found[1:])


def test_perplexity_weighted_by_tokens_or_windows():
    # 2 nats over 1 token and 3 nats over 3: 5 / 4 a token, (2 + 1) / 2 a window.
    np.testing.assert_allclose(perplexity.perplexity([2, 3], [1, 3]), math.exp(1.25))
    np.testing.assert_allclose(perplexity.perplexity([2, 3], [1, 3], weighted=False), math.exp(1.5))


def test_perplexity_of_what_is_none():
    with pytest.raises(ValueError, match='num_tokens=1'):
        perplexity.windows(1)
    with pytest.raises(ValueError, match='stride=8 must be at least 1 and below size=8'):
        perplexity.windows(9, size=8, stride=8)
    for sums, counts in (([], []), ([1.], [0]), ([1., 2], [1])):
        with pytest.raises(ValueError, match='nll_sums'):
            perplexity.perplexity(sums, counts)


def test_real_reviews(shared_data):
    texts = [row['text'] for row in rows.read(shared_data / 'imdb' / 'imdb_train_labelled.jsonl.xz', imdb.FIELDS)]
    assert len(texts) == 25000
    for text in texts[::50]:
        first, second = imdb.halves(text)
        assert f'{first} {second}' == text and 0 <= second.count(' ') - first.count(' ') <= 1
        assert 1 <= len(imdb.prompt_tokens(text, lambda t: t.encode(), 64)) <= 64
    joined = imdb.drift_text(texts[:3])
    assert joined.count('\n\n') == 2 and joined.startswith(texts[0])

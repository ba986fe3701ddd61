import gzip
import random
import sys

import numpy as np
import pytest

from rlhf_jax.tasks import bleu

SAID, MEANT = 'the cat sat on the mat', 'the cat sat on a mat'


def test_by_hand():
    # 1-grams: the second `the` has no partner, 5 of 6; then 3 of 5, 2 of 4, 1 of 3. Equal lengths.
    found = bleu.legacy([SAID], [MEANT])
    np.testing.assert_allclose(found.precisions, [100 * 5 / 6, 60, 50, 100 / 3])
    assert (found.brevity_penalty, found.hypothesis_length, found.reference_length) == (1, 6, 6)
    assert found.score == round(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, 4) == 53.7285


def test_a_short_sentence_counts_as_an_ngram_that_is_missed():
    # "a dog" has no 3-gram and no 4-gram: 2 of 4 + 1 and 1 of 3 + 1, where multi-bleu.perl has 2 of 4 and 1 of 3.
    found = bleu.legacy([SAID, 'a dog'], [MEANT, 'a dog'])
    np.testing.assert_allclose(found.precisions, [100 * 7 / 8, 100 * 4 / 6, 40, 25])
    assert found.score == round(100 * (7 / 8 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25, 4)


def test_brevity():
    found = bleu.legacy(['the cat sat on'], [MEANT])
    assert found.brevity_penalty == pytest.approx(np.exp(1 - 6 / 4)) and found.score == pytest.approx(60.6531)
    assert bleu.legacy([MEANT + ' in the sun'], [MEANT]).brevity_penalty == 1


def test_nothing_in_common():
    assert bleu.legacy(['x y z u'], [MEANT]) == bleu.Bleu(0.0, (0.0,) * 4, 0.0, 0, 0)
    some = bleu.legacy(['mat on cat the'], [MEANT])  # words, but no two in a row
    assert some.score == 0 and some.precisions == (100, 0, 0, 0) and some.reference_length == 6
    assert bleu.legacy([''], [MEANT]).score == 0


def test_subwords_are_joined():
    assert bleu.words('ein@@ kauf im zent@@ rum@@') == ['einkauf', 'im', 'zentrum@@']
    assert bleu.legacy(['the ca@@ t sat on a m@@ at'], [MEANT]).score == 100


def test_bad_input(monkeypatch):
    for function in (bleu.legacy, bleu.sacrebleu):
        with pytest.raises(ValueError, match='references: there are 1 for 2 hypotheses'):
            function(['a', 'b'], ['a'])
        with pytest.raises(ValueError, match='there are 0 for 0'):
            function([], [])
    monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
    with pytest.raises(ImportError, match='sacrebleu is not installed'):
        bleu.sacrebleu(['a'], ['a'])


@pytest.fixture(scope='module')
def corpus():
    """Sentences of four words and more, and the same with words lost, doubled and exchanged."""
    rng = random.Random(0)
    references = [' '.join(rng.choices('abcdefgh', k=rng.randint(6, 14))) for _ in range(200)]
    hypotheses = []
    for reference in references:
        tokens = [t if rng.random() > 0.15 else rng.choice('abcdefgh') for t in reference.split()]
        hypotheses.append(' '.join(tokens[:rng.randint(4, len(tokens))] + tokens[:rng.randint(0, 1)]))
    return hypotheses, references


def test_agrees_with_sacrebleu_without_short_sentences(corpus):
    metrics = pytest.importorskip('sacrebleu.metrics')
    found, theirs = bleu.legacy(*corpus), metrics.BLEU(tokenize='none', smooth_method='none').corpus_score(
        corpus[0], [corpus[1]])
    assert 10 < found.score < 90 and found.brevity_penalty < 1
    np.testing.assert_allclose(found.score, theirs.score, atol=1e-4)
    np.testing.assert_allclose(found.precisions, theirs.precisions, rtol=1e-6)
    np.testing.assert_allclose(found.brevity_penalty, theirs.bp, rtol=1e-6)
    assert (found.hypothesis_length, found.reference_length) == (theirs.sys_len, theirs.ref_len)


def test_sacrebleu_with_its_signature():
    pytest.importorskip('sacrebleu')
    score, signature = bleu.sacrebleu(['The cat sat on the mat.'], ['The cat sat on the mat.'])
    assert score == pytest.approx(100) and 'tok:13a' in signature and 'case:mixed' in signature
    assert bleu.sacrebleu(['THE CAT SAT ON IT.'], ['The cat sat on it.'], lowercase=True)[0] == pytest.approx(100)
    assert bleu.sacrebleu(['THE CAT SAT ON IT.'], ['The cat sat on it.'])[0] < 50


def test_real_sentences(shared_data):
    metrics = pytest.importorskip('sacrebleu.metrics')
    with gzip.open(shared_data / 'multi30k' / 'task1_raw' / 'val.de.gz', 'rt', encoding='utf-8') as f:
        german = [line.strip().lower() for line in f]
    said = [' '.join(s.split()[::2] + s.split()[1::2][:6]) if i % 3 else s for i, s in enumerate(german)]
    assert min(len(s.split()) for s in said) >= 3
    theirs = metrics.BLEU(tokenize='none', smooth_method='none').corpus_score(said, [german])
    short = sum(len(s.split()) == 3 for s in said)
    found = bleu.legacy(said, german)
    np.testing.assert_allclose(found.precisions[:3], theirs.precisions[:3], rtol=1e-6)
    matches = theirs.precisions[3] * theirs.totals[3]
    np.testing.assert_allclose(found.precisions[3] * (theirs.totals[3] + short), matches, rtol=1e-6)

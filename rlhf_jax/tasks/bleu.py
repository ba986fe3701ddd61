"""Corpus BLEU, one reference each: as everyone reports it, and as the translation game was measured.

The two differ in what a word is and in short sentences, so name the one that a number comes from.
"""
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

ORDERS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Bleu:
    """Attributes: `score` and `precisions` (of 1- to 4-grams) in percent; `brevity_penalty`; lengths in words."""
    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    hypothesis_length: int
    reference_length: int


def sacrebleu(hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = '13a',
              lowercase: bool = False) -> tuple[float, str]:
    """Corpus BLEU of plain (detokenized) text by the sacrebleu package (Post, arXiv 1804.08771).

    Returns:
        `(score, signature)`; the signature goes wherever the score goes.

    Raises:
        ValueError: not as many references as hypotheses, or none.
        ImportError: sacrebleu is not installed.
    """
    _check(hypotheses, references)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ImportError("sacrebleu is not installed; `pip install 'dlc-jax[translation]'`") from None
    metric = BLEU(tokenize=tokenize, lowercase=lowercase)
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return score.score, str(metric.get_signature())


def words(text: str) -> list[str]:
    """Words of tokenized text after subwords are joined, `ein@@ kauf` -> `einkauf`; an open piece at the end stays."""
    return text.replace('@@ ', '').split()


def legacy(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """BLEU as the translation game has reported it, over tokenized, lower-cased text: multi-bleu by way of NLTK.

        score = 100 min(1, exp(1 - r / h)) (p_1 p_2 p_3 p_4)^(1/4),   rounded to four decimals

    p_n = matches of n-grams, clipped by the reference's count, over n-grams. Unlike multi-bleu.perl itself, a sentence
    of fewer than n words still counts as one n-gram that matches nothing, so a policy that talks in few words scores
    lower than it would there. Without a match of some order the score is 0; without one of any, so is everything else.

    Raises:
        ValueError: not as many references as hypotheses, or none.
    """
    _check(hypotheses, references)
    matches, totals = [0] * len(ORDERS), [0] * len(ORDERS)
    hypothesis_length = reference_length = 0
    for hypothesis, reference in zip(map(words, hypotheses), map(words, references)):
        hypothesis_length += len(hypothesis)
        reference_length += len(reference)
        for i, n in enumerate(ORDERS):
            proposed, wanted = _ngrams(hypothesis, n), _ngrams(reference, n)
            matches[i] += sum((proposed & wanted).values())
            totals[i] += max(1, sum(proposed.values()))
    if not matches[0]:
        return Bleu(0.0, (0.0,) * len(ORDERS), 0.0, 0, 0)
    precisions = [m / t for m, t in zip(matches, totals)]
    brevity = 1.0 if hypothesis_length > reference_length else math.exp(1 - reference_length / hypothesis_length)
    score = 0.0
    if all(matches):
        score = round(100 * brevity * math.exp(sum(map(math.log, precisions)) / len(ORDERS)), 4)
    return Bleu(score, tuple(100 * p for p in precisions), brevity, hypothesis_length, reference_length)


def _ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not len(hypotheses):
        raise ValueError(f'references: there are {len(references)} for {len(hypotheses)} hypotheses; need one each')

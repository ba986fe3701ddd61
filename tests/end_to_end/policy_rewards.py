"""Reward functions that the tests of policies name in `reward.function`; some are wrong in the ways rewards can be."""
import time

import numpy as np


def ascii_share(texts, rows):
    """Share of a completion's characters that are ASCII: about a half at first, and soon learnt."""
    return [sum(c < '\x80' for c in text) / max(len(text), 1) for text in texts]


def same(texts, rows):
    return [1.0] * len(texts)


def nan(texts, rows):
    return [float('nan')] + [i / len(texts) for i in range(1, len(texts))]


def no_rewards(texts, rows):
    return [None, float('nan')] * (len(texts) // 2)


def infinite(texts, rows):
    return [float('inf')] + [i / len(texts) for i in range(1, len(texts))]


def none(texts, rows):
    return [None] + ascii_share(texts, rows)[1:]


def too_few(texts, rows):
    return np.zeros(len(texts) - 1)


def raises(texts, rows):
    raise ZeroDivisionError('the reward divides by zero')


def hangs(texts, rows):
    time.sleep(20)
    return np.zeros(len(texts))

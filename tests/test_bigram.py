"""The bigram model: its probabilities, its loss and its samples."""

import itertools
import math
from collections import Counter

import pytest

import bigram

PAIRS = bigram.bigram([0, 1, 0, 1, 0, 2], n_vocab=3)


def test_bigram_counts_pairs_and_adds_one():
    assert PAIRS(0).tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert PAIRS(1).tolist() == pytest.approx([3 / 5, 1 / 5, 1 / 5])
    assert PAIRS(2).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])  # no token follows 2


def test_bigram_loss_is_the_mean_over_all_tokens_but_the_first():
    expected = -(math.log(3 / 6) + math.log(1 / 5) + math.log(1 / 3)) / 3
    assert bigram.loss(PAIRS, [0, 1, 2, 2]) == pytest.approx(expected)


def test_bigram_samples_follow_its_probabilities():
    prompt = [1, 0]
    ids = bigram.generate(PAIRS, prompt, 20_000, 1.0, seed=0)
    assert (ids[:2], len(ids), prompt) == ([1, 0], 20_002, [1, 0])
    after_0 = Counter(b for a, b in itertools.pairwise(ids[1:]) if a == 0)
    assert [after_0[i] / after_0.total() for i in range(3)] == pytest.approx([1 / 6, 3 / 6, 2 / 6], abs=0.02)
    assert bigram.generate(PAIRS, [0], 4, 0, seed=0) == [0, 1, 0, 1, 0]  # at temperature 0

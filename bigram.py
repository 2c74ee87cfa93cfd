"""The bigram model, which only counts how often each token follows another. A GPT must beat its loss."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray as Array

from sampling import sample


def bigram(tokens: Sequence[int], n_vocab: int) -> Callable[[int], Array]:
    """Return a function of a token a: P(b | a) = (count of a b + 1) / (count of a + n_vocab) for all b, [n_vocab]."""
    followers: dict[int, Counter] = defaultdict(Counter)
    for a, b in itertools.pairwise(tokens):
        followers[a][b] += 1

    def probabilities(a: int) -> Array:
        counts = np.ones(n_vocab)
        counts[list(followers[a])] += list(followers[a].values())
        return counts / counts.sum()

    return probabilities


def loss(probabilities: Callable[[int], Array], tokens: Sequence[int]) -> float:
    """The mean loss of all `tokens` but the first under a bigram model, in nats."""
    return -math.fsum(math.log(probabilities(a)[b]) for a, b in itertools.pairwise(tokens)) / (len(tokens) - 1)


def generate(probabilities: Callable, ids: list[int], n_tokens: int, temperature: float, seed: int) -> list[int]:
    """`ids`, and n_tokens more tokens, each drawn by a bigram model from the token before it."""
    ids, rng = list(ids), np.random.default_rng(seed)
    for _ in range(n_tokens):
        ids.append(int(sample(np.log(probabilities(ids[-1])), rng, temperature)))
    return ids

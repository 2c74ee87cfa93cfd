"""The bigram model: it only counts which token follows which, and has the loss that a GPT must beat."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy import ndarray as Array

from sampling import sample


def bigram(tokens: Sequence[int], n_vocab: int) -> Callable[[int], Array]:
    """A function from a token a to P(b | a) = (count of a b + 1) / (count of a + n_vocab) for all b, [n_vocab]."""
    followers = defaultdict(Counter)
    for a, b in itertools.pairwise(tokens):
        followers[a][b] += 1

    def probabilities(a: int) -> Array:
        counts = np.ones(n_vocab)
        counts[list(followers[a])] += list(followers[a].values())
        return counts / counts.sum()

    return probabilities


def loss(probabilities: Callable[[int], Array], tokens: Sequence[int]) -> float:
    """The mean loss of `tokens` but the first under a bigram model, in nats."""
    return -math.fsum(math.log(probabilities(a)[b]) for a, b in itertools.pairwise(tokens)) / (len(tokens) - 1)


def generate(
    probabilities: Callable[[int], Array], ids: list[int], n_tokens: int, temperature: float, rng: np.random.Generator
) -> list[int]:
    """`ids`, and n_tokens more that a bigram model draws after them."""
    ids = list(ids)
    for _ in range(n_tokens):
        ids.append(int(sample(np.log(probabilities(ids[-1])), rng, temperature)))
    return ids

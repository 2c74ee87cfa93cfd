"""From logits to the next token: greedy, temperature, top-k, top-p. Pure functions over the last axis, [..., n_vocab].

A filter gives each token that it rules out the logit -inf, so filters can be chained. The last functions check options.
"""

import math
import os
from numbers import Integral, Real

import numpy as np


def apply_temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Sharpen (temperature < 1) or flatten (> 1) logits; the largest becomes 0. Temperature 0 keeps only one token."""
    if temperature == 0:
        best = np.arange(logits.shape[-1]) == np.argmax(logits, axis=-1, keepdims=True)
        return np.where(best, logits.dtype.type(0), -np.inf)
    with np.errstate(over="ignore"):  # at a tiny temperature all logits but the largest become -inf, as they should
        below_best = logits - logits.max(axis=-1, keepdims=True)
        return np.divide(below_best, temperature, dtype=np.float64).astype(logits.dtype)


def apply_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Keep the tokens whose logit is at least the k-th largest; 0 keeps all tokens (Fan et al. 2018)."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    kth_largest = np.partition(logits, -top_k, axis=-1)[..., -top_k, None]
    return np.where(logits >= kth_largest, logits, -np.inf)


def apply_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all (Holtzman et al. 2020).

    The token that crosses p is kept, so at least one remains. Among equal tokens, those with lower ids are kept.
    """
    if top_p >= 1:
        return logits
    ordered = -np.sort(-logits, axis=-1)
    reached = np.cumsum(to_probabilities(ordered), axis=-1)
    n_kept = 1 + (reached[..., :-1] < top_p).sum(axis=-1, keepdims=True)  # kept: if those before it fall short of p
    least = np.take_along_axis(ordered, n_kept - 1, axis=-1)
    above, equal = logits > least, logits == least
    kept = above | (equal & (np.cumsum(equal, axis=-1) <= n_kept - above.sum(axis=-1, keepdims=True)))
    return np.where(kept, logits, -np.inf)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) over the last axis, in float64. A logit minus this sum is the log of a probability."""
    largest = logits.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(logits - largest, dtype=np.float64).sum(axis=-1))


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax in float64, so that 50,257 probabilities add up to 1 with 13 correct digits."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    return exp / exp.sum(axis=-1, keepdims=True)


def sample(
    logits: np.ndarray, rng: np.random.Generator, temperature: float = 0, top_k: int = 0, top_p: float = 1
) -> np.ndarray:
    """Choose the next token, greedily at temperature 0: [..., n_vocab] -> ids [...]. Raises ValueError for NaN."""
    largest = logits.max(axis=-1, keepdims=True)
    check_finite(largest[~np.isinf(largest)])
    if temperature == 0:
        return np.argmax(logits, axis=-1)  # the first one if several are equal
    # Differences of infinite logits would be NaN, so +inf becomes a huge number and a row of -inf becomes zeros.
    logits = np.minimum(np.where(largest == -np.inf, 0, logits), np.finfo(np.float32).max, dtype=np.float64)
    logits = apply_top_p(apply_top_k(apply_temperature(logits, temperature), top_k), top_p)
    cumulative = np.cumsum(to_probabilities(logits), axis=-1)
    draw = rng.random(cumulative.shape[:-1])[..., None] * cumulative[..., -1:]
    return np.argmax(cumulative > draw, axis=-1)


def check_finite(values: np.ndarray, name: str = "logits") -> np.ndarray:
    """Return `values`. Raise ValueError if one of them is NaN or infinite."""
    if not np.isfinite(values).all():
        raise ValueError(f"the model's {name} are not finite numbers (NaN): its weights are damaged or not a GPT-2's")
    return values


def check_count(name: str, value: int, least: int = 0, most: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most` (None: no upper limit)."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        wanted = f", {least} or more" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} must be a whole number{wanted}, not {value!r}")


def check_memory(n_bytes: int, purpose: str) -> None:
    """Raise ValueError if `purpose` needs more memory than this machine has. On Windows there is no check."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if n_bytes > most:
        sizes = f"{n_bytes / 1e9:,.1f} GB of memory, and this machine has {most / 1e9:,.1f}"
        raise ValueError(f"{purpose} takes {sizes}: choose less")


def check_options(temperature: float, top_k: int, top_p: float, seed: int | None) -> None:
    """Raise ValueError, with the option's name, if an option of `sample` is invalid."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a number, not {value!r}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    check_count("top_k", top_k)
    if seed is not None:
        check_count("seed", seed)

"""Sampling: each filter matches its definition, and any logits work without a warning."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sampling import apply_temperature, apply_top_k, apply_top_p, check_options, sample, to_probabilities

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0], dtype=np.float32)
LEVELS = st.sampled_from([-9.5, -1.0, 0.0, 0.25, 1.0, 3.0, 7.5])  # so that many are equal


def kept(logits):
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def brute_force_top_p(logits, top_p):
    """The smallest set of most likely tokens whose probability reaches p, found one token at a time."""
    weights = [np.exp(float(x) - float(max(logits))) for x in logits]
    chosen, reached = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        if chosen and reached >= top_p:
            break
        chosen.add(i)
        reached += weights[i] / np.sum(weights)
    return chosen


def test_greedy_takes_the_first_of_the_largest():
    assert sample(LOGITS, np.random.default_rng(0)) == 1
    assert kept(apply_temperature(LOGITS, 0)) == {1}


def test_temperature_divides_the_logits():
    found, expected = (to_probabilities(x) for x in (apply_temperature(LOGITS, 0.5), LOGITS.astype(np.float64) / 0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=32) | LEVELS), st.integers(1, 45))
def test_top_k_keeps_every_token_equal_to_the_kth_largest(logits, top_k):
    kth_largest = sorted(logits.tolist(), reverse=True)[min(top_k, len(logits)) - 1]
    assert kept(apply_top_k(logits, top_k)) == {i for i, x in enumerate(logits.tolist()) if x >= kth_largest}
    assert kept(apply_top_k(logits, 0)) == set(range(len(logits)))


HALVES = np.log([0.5 + 1e-12, 0.25, 0.125, 0.125])  # rounding leaves the first a hair above 0.5
EQUAL = np.zeros(4)


@pytest.mark.parametrize(("logits", "top_p", "n_kept"), [
    (HALVES, 0.1, 1), (HALVES, 0.5, 1), (HALVES, 0.51, 2), (HALVES, 0.75, 2), (HALVES, 0.76, 3), (HALVES, 1.0, 4),
    (EQUAL, 0.25, 1), (EQUAL, 0.5, 2), (EQUAL, 0.75, 3), (EQUAL, 0.76, 4),
])  # fmt: skip
def test_top_p_keeps_the_token_that_crosses_p_and_the_first_of_equal_ones(logits, top_p, n_kept):
    assert kept(apply_top_p(logits, top_p)) == set(range(n_kept))


@given(arrays(np.float32, st.integers(1, 40), elements=LEVELS), st.floats(0.01, 1, exclude_max=True))
def test_top_p_matches_its_definition(logits, top_p):
    found, expected = kept(apply_top_p(logits, top_p)), brute_force_top_p(logits, top_p)
    assert abs(len(found) - len(expected)) <= 1  # rounding, at p itself
    for nearby in (top_p - 1e-9, top_p + 1e-9):
        if brute_force_top_p(logits, nearby) != expected:
            return
    assert found == expected


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 4, 1), (1.5, 0, 0.8), (1.2, 5, 0.9)])
def test_ten_thousand_draws_follow_the_filtered_distribution(temperature, top_k, top_p):
    weights = np.exp(LOGITS.astype(np.float64) / temperature)
    if top_k:
        weights[weights < sorted(weights)[-top_k]] = 0
    expected = np.where([i in brute_force_top_p(np.log(weights + 1e-300), top_p) for i in range(6)], weights, 0)
    expected /= expected.sum()
    draws = sample(np.tile(LOGITS, (10_000, 1)), np.random.default_rng(7), temperature, top_k, top_p)
    frequencies = np.bincount(draws, minlength=6) / 10_000
    assert set(np.flatnonzero(frequencies)) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / 10_000))


def test_a_token_that_was_ruled_out_is_never_drawn():
    lowest = SimpleNamespace(random=np.zeros)
    assert sample(np.array([-np.inf, -np.inf, 0, 0]), lowest, temperature=1) == 2


def test_a_seed_gives_the_same_draws_again():
    rows = np.tile(LOGITS, (50, 1))
    first, second, other = (sample(rows, np.random.default_rng(seed), temperature=1) for seed in (3, 3, 4))
    assert first.tolist() == second.tolist() != other.tolist()


SHAPES = array_shapes(min_dims=1, max_dims=2, max_side=20)
EXTREME = st.sampled_from([np.inf, -np.inf, 0.0, 3e38, -3e38, 1e-45])


@given(
    arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False) | EXTREME)
    | arrays(np.float32, SHAPES, elements=st.sampled_from([0.0, 1.0]))  # ties
    | arrays(np.float32, SHAPES, elements=EXTREME, fill=EXTREME)  # all equal, or all but a few
    | arrays(np.float32, SHAPES, elements=st.floats(-9, 9, width=32), fill=st.just(-np.inf)),  # one finite, or a few
    st.floats(0, 1e300, allow_subnormal=False) | st.sampled_from([0, 1e-300, 5e-324, 1e308]),
    st.integers(0, 25),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 1000),
)
@example(np.array([[-np.inf, -np.inf], [0, -np.inf]], np.float32), 1e300, 0, 0.9, 0)
@example(np.array([np.inf, 0, -np.inf], np.float32), 1e-300, 1, 1, 0)
@example(np.full(3, -np.inf, np.float32), 0.5, 2, 0.5, 0)
@example(np.full(3, np.inf, np.float32), 1, 0, 1, 0)
def test_any_logits_and_options_give_a_valid_id_without_a_warning(logits, temperature, top_k, top_p, seed):
    before = logits.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = sample(logits, np.random.default_rng(seed), temperature, top_k, top_p)
    assert np.array_equal(logits, before), "they are left alone"
    assert np.shape(ids) == logits.shape[:-1]
    assert np.all((ids >= 0) & (ids < logits.shape[-1]))
    chosen = np.take_along_axis(logits, np.asarray(ids)[..., None], axis=-1)
    possible = logits.max(axis=-1, keepdims=True) > -np.inf
    assert np.all((chosen > -np.inf) | ~possible), "an id that was ruled out"


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        sample(np.array([1, np.nan, 2], dtype=np.float32), np.random.default_rng(0))


def test_the_filters_keep_float32():
    for keep, value in ((apply_temperature, 0.3), (apply_temperature, 0), (apply_top_k, 2), (apply_top_p, 0.5)):
        assert keep(LOGITS, value).dtype == np.float32


@pytest.mark.parametrize(("options", "named"), [
    *(((value, 0, 1, None), "temperature") for value in (-0.1, float("nan"), float("inf"), "warm", True)),
    *(((1, value, 1, None), "top_k") for value in (-1, 1.5)), *(((1, 0, 1, value), "seed") for value in (-1, "x")),
    *(((1, 0, value, None), "top_p") for value in (0, 1.1, None)),
])  # fmt: skip
def test_invalid_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        check_options(*options)

"""A prompt in parts, each on a thread of its own, is the prompt in one piece."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prefill as module
from gpt2 import hidden_states, new_cache
from helpers import TINY
from prefill import n_blas_threads, prefill

N_VOCAB, N_CTX, N_HEAD = TINY["n_vocab"], TINY["n_ctx"], TINY["n_head"]


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(module, "n_blas_threads", lambda: 3)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)


def ids_of(*shape):
    return np.random.default_rng(sum(shape)).integers(0, N_VOCAB, shape)


@settings(max_examples=50)
@example(n_past=3, n_seq=2, batch=(3,), n_threads=4)  # more threads than positions
@given(st.integers(0, 12), st.integers(1, 20), st.sampled_from([(), (1,), (3,)]), st.integers(1, 4))
def test_it_is_the_last_hidden_state_and_fills_the_cache(tiny_params, n_past, n_seq, batch, n_threads):
    ids = ids_of(*batch, n_past + n_seq)
    expected, found = (new_cache(tiny_params, N_HEAD, N_CTX, *batch) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "n_blas_threads", lambda: n_threads)
        patch.setattr(module, "LEAST_ROWS", 1)
        for cache in (expected, found)[: 2 * bool(n_past)]:
            hidden_states(ids[..., :n_past], **tiny_params, n_head=N_HEAD, cache=cache)
        x = prefill(ids[..., n_past:], tiny_params, N_HEAD, found)
    states = hidden_states(ids[..., n_past:], **tiny_params, n_head=N_HEAD, cache=expected)
    np.testing.assert_allclose(x, states[..., -1, :], rtol=0, atol=2e-5 * np.ptp(states))
    np.testing.assert_allclose(found["kv"], expected["kv"], rtol=0, atol=2e-5 * np.ptp(expected["kv"]))
    assert found["n_past"] == expected["n_past"] == n_past + n_seq
    assert x.dtype == np.float32


def test_a_long_prompt_is_computed_by_several_threads_at_a_time(tiny_params, three_threads, monkeypatch):
    barrier, original, met = threading.Barrier(3, timeout=30), module.ffn, []

    def meets(x, *args, **kwargs):
        if len(met) < 3 and x.shape[-2] > 1:
            met.append(barrier.wait())
        return original(x, *args, **kwargs)

    monkeypatch.setattr(module, "ffn", meets)
    prefill(ids_of(30), tiny_params, N_HEAD, new_cache(tiny_params, N_HEAD, N_CTX))
    assert sorted(met) == [0, 1, 2]


def test_products_get_their_threads_back(tiny_params, monkeypatch):
    before = n_blas_threads()
    assert before >= 1
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    prefill(ids_of(30), tiny_params, N_HEAD, new_cache(tiny_params, N_HEAD, N_CTX))
    assert n_blas_threads() == before


def test_threads_that_prefill_at_once_leave_the_threads_of_products_as_they_were(tiny_params, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    before, ids, barrier = n_blas_threads(), ids_of(31), threading.Barrier(3)
    alone = prefill(ids, tiny_params, N_HEAD, new_cache(tiny_params, N_HEAD, N_CTX))

    def work(_):
        barrier.wait(timeout=30)
        return prefill(ids, tiny_params, N_HEAD, new_cache(tiny_params, N_HEAD, N_CTX))

    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            for x in pool.map(work, range(3)):
                np.testing.assert_allclose(x, alone, atol=1e-5 * np.ptp(alone))
            assert n_blas_threads() == before


def test_ctrl_c_ends_the_other_threads_with_the_layer_they_are_in(tiny_params, three_threads, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "mha", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prefill(ids_of(30), tiny_params, N_HEAD, new_cache(tiny_params, N_HEAD, N_CTX))
    assert len(calls) == 1


@pytest.mark.parametrize("failing_call", range(6))
def test_what_fails_in_one_part_is_raised_and_the_cache_stays_as_it_was(
    tiny_params, three_threads, monkeypatch, failing_call
):
    calls, original = iter(range(100)), module.mha

    def fails_once(*args, **kwargs):
        if next(calls) == failing_call:
            raise MemoryError("in one of the parts")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "mha", fails_once)
    cache = new_cache(tiny_params, N_HEAD, N_CTX)
    with pytest.raises(MemoryError, match="in one of the parts"):
        prefill(ids_of(30), tiny_params, N_HEAD, cache)
    assert cache["n_past"] == 0


def test_a_prompt_that_the_cache_has_no_room_for_is_refused(tiny_params):
    with pytest.raises(ValueError, match="room for 3"):
        prefill([1, 2, 3, 4], tiny_params, N_HEAD, new_cache(tiny_params, N_HEAD, 3))

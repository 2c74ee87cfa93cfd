"""Work on all cores: a prompt in parts, each on a thread of its own, is the prompt in one piece."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpt2
from engine import threads
from engine.threads import core_threads, deferred, in_parts, n_blas_threads, on_all_cores
from gpt2 import hidden_states, new_cache, prefill
from helpers.models import TINY, random_params

N_VOCAB, N_CTX, N_HEAD = TINY["n_vocab"], TINY["n_ctx"], TINY["n_head"]
DEEP = random_params(TINY | {"n_layer": 3})


def use_threads(patch, n_threads, least_rows=1):
    patch.setattr(threads, "n_blas_threads", lambda: n_threads)
    patch.setattr(threads, "LEAST_ROWS", least_rows)


@pytest.fixture
def three_threads(monkeypatch):
    use_threads(monkeypatch, 3)


def threads_of_products():
    """How many threads the libraries of matrix products use now."""
    return [library["num_threads"] for library in threads.blas().info()]


def ids_of(*shape):
    return np.random.default_rng(sum(shape)).integers(0, N_VOCAB, shape)


def fill(n_seq, params=DEEP):
    """The last hidden state of a prompt of n_seq tokens."""
    return prefill(ids_of(n_seq), params, N_HEAD, new_cache(params, N_HEAD, N_CTX))


@settings(max_examples=50)
@example(n_past=3, n_seq=2, batch=(3,), n_threads=4, n_layer=2)  # more threads than positions
@given(st.integers(0, 12), st.integers(1, 20), st.sampled_from([(), (1,), (3,)]), st.integers(1, 4), st.integers(1, 3))
def test_a_prompt_in_parts_has_the_last_hidden_state_and_fills_the_cache(n_past, n_seq, batch, n_threads, n_layer):
    params, ids = DEEP | {"blocks": DEEP["blocks"][:n_layer]}, ids_of(*batch, n_past + n_seq)
    expected, found = (new_cache(params, N_HEAD, N_CTX, *batch) for _ in range(2))
    for cache in (expected, found)[: 2 * bool(n_past)]:
        hidden_states(ids[..., :n_past], **params, n_head=N_HEAD, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch, n_threads)
        x = prefill(ids[..., n_past:], params, N_HEAD, found)
    states = hidden_states(ids[..., n_past:], **params, n_head=N_HEAD, cache=expected)
    np.testing.assert_allclose(x, states[..., -1, :], rtol=0, atol=2e-5 * np.ptp(states))
    np.testing.assert_allclose(found["kv"], expected["kv"], rtol=0, atol=2e-5 * np.ptp(expected["kv"]))
    assert found["n_past"] == expected["n_past"] == n_past + n_seq
    assert x.dtype == np.float32


def test_a_part_that_reads_too_early_waits_and_gets_what_all_earlier_ones_have_written(three_threads):
    def running_sum(x, kv_cache):
        if x[0] == 0:
            time.sleep(0.1)  # the first part is late
        kv_cache[0][..., -len(x) :, :] = x
        return np.cumsum(kv_cache[0][..., :, :], axis=0)[-len(x) :]

    x = np.arange(30.0)[:, None]
    assert in_parts(running_sum, x, np.full((1, 30, 1), 1e9)).tolist() == np.cumsum(x, axis=0).tolist()


@pytest.mark.parametrize(("n_rows", "n_threads", "n_parts"), [(29, 3, 1), (30, 3, 3), (20, 1, 1)])
def test_a_prompt_is_cut_only_if_each_part_is_long_enough(monkeypatch, n_rows, n_threads, n_parts):
    use_threads(monkeypatch, n_threads, least_rows=10)
    lengths, x = [], np.random.default_rng(0).normal(size=(n_rows, 4))
    found = in_parts(lambda x, kv: (lengths.append(len(x)), x)[1], x, np.zeros((1, n_rows, 4)))
    assert (len(lengths), found.tolist()) == (n_parts, x.tolist())


def test_a_long_prompt_is_computed_by_several_threads_at_a_time(tiny_params, three_threads, monkeypatch):
    barrier, original, met = threading.Barrier(3, timeout=30), gpt2.ffn, []

    def meets(x, *args, **kwargs):
        if x.shape[-2] > 1:  # in the first of two layers; of the last one there is but one position
            met.append(barrier.wait())
        return original(x, *args, **kwargs)

    monkeypatch.setattr(gpt2, "ffn", meets)
    fill(30, tiny_params)
    assert sorted(met) == [0, 1, 2]


def test_work_on_all_cores_keeps_its_order_and_limits_products_to_one_thread():
    before, items = threads_of_products(), np.array([0, 1e9, -1e9], np.float32)
    results = list(on_all_cores(lambda x: (np.exp(x), *threads_of_products()), items))
    assert results == [(x, *[1] * len(before)) for x in (1, np.inf, 0)], "and no overflow warns"
    assert threads_of_products() == before


def test_ctrl_c_leaves_out_the_work_that_has_not_begun():
    done = []

    def interrupted(i):
        if i == 0:
            raise KeyboardInterrupt
        time.sleep(0.02)
        done.append(i)

    with pytest.raises(KeyboardInterrupt):
        list(on_all_cores(interrupted, range(1000)))
    assert len(done) < 900


def test_one_signal_is_deferred_unless_it_is_ignored(capfd):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with deferred((signal.SIGINT, signal.SIGTERM), b"one moment") as received:
            for sent, expected in ((signal.SIGTERM, []), (signal.SIGINT, [signal.SIGINT])):
                signal.raise_signal(sent)
                assert received == expected
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        assert signal.signal(signal.SIGTERM, before) is signal.SIG_IGN
    assert (signal.getsignal(signal.SIGINT), capfd.readouterr().err) == (signal.default_int_handler, "one moment")


def test_threads_that_prefill_at_once_leave_the_threads_of_products_as_they_were(monkeypatch):
    monkeypatch.setattr(threads, "LEAST_ROWS", 1)
    before, barrier, alone = threads_of_products(), threading.Barrier(3), fill(31)
    assert n_blas_threads() == max(threads_of_products(), default=n_blas_threads())
    assert threads_of_products() == before
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            for _, x in pool.map(lambda _: (barrier.wait(timeout=30), fill(31)), range(3)):
                np.testing.assert_allclose(x, alone, atol=1e-5 * np.ptp(alone))
            assert threads_of_products() == before


def test_while_another_thread_limits_products_a_prompt_is_computed_in_one_part(three_threads, monkeypatch):
    monkeypatch.setattr(threads, "compute_parts", lambda *args: pytest.fail("it is cut"))
    with core_threads(), ThreadPoolExecutor(1) as pool:
        pool.submit(fill, 30).result(timeout=30)


def test_ctrl_c_ends_the_other_threads_at_their_next_read_of_the_cache(three_threads, monkeypatch):
    calls, original = [], gpt2.mha

    def interrupted(x, *args, kv_cache, **kwargs):
        calls.append(x)
        if len(kv_cache.earlier) == 1:
            raise KeyboardInterrupt
        assert kv_cache.stop.wait(30)
        return original(x, *args, kv_cache=kv_cache, **kwargs)

    monkeypatch.setattr(gpt2, "mha", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(30)
    assert len(calls) <= 3, "at most one of each thread"


@pytest.mark.parametrize("failing_call", range(7))
def test_what_fails_in_one_part_is_raised_and_the_cache_stays_as_it_was(three_threads, monkeypatch, failing_call):
    calls, original, cache = iter(range(100)), gpt2.mha, new_cache(DEEP, N_HEAD, N_CTX)

    def fails_once(*args, **kwargs):
        if next(calls) == failing_call:
            raise MemoryError("in one of the parts")
        return original(*args, **kwargs)

    monkeypatch.setattr(gpt2, "mha", fails_once)
    with pytest.raises(MemoryError, match="in one of the parts"):
        prefill(ids_of(30), DEEP, N_HEAD, cache)
    assert cache["n_past"] == 0

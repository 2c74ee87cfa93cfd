"""Work on all cores: a prompt split over threads gives the same numbers as in one piece; signals are deferred."""

import signal
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpt2
from engine import threads
from engine.threads import defer_signals, map_on_all_cores, n_blas_threads, one_thread_per_core, split_over_cores
from helpers.models import TINY, random_params

N_VOCAB, N_CTX, N_HEAD = TINY["n_vocab"], TINY["n_ctx"], TINY["n_head"]
DEEP = random_params(TINY | {"n_layer": 3})


def use_threads(patch, n_threads, least_rows=1):
    patch.setattr(threads, "n_blas_threads", lambda: n_threads)
    patch.setattr(threads, "MIN_ROWS", least_rows)


@pytest.fixture
def three_threads(monkeypatch):
    use_threads(monkeypatch, 3)


def blas_threads():
    return [library["num_threads"] for library in threads.blas().info()]


def ids_of(*shape):
    return np.random.default_rng(sum(shape)).integers(0, N_VOCAB, shape)


def prefill_tokens(n_seq, params=DEEP):
    return gpt2.prefill(ids_of(n_seq), params, N_HEAD, gpt2.new_cache(params, N_HEAD, N_CTX))


@settings(max_examples=50)
@example(n_past=3, n_seq=2, batch=(3,), n_threads=4, n_layer=2)  # more threads than positions
@given(st.integers(0, 12), st.integers(1, 20), st.sampled_from([(), (1,), (3,)]), st.integers(1, 4), st.integers(1, 3))
def test_a_prompt_in_parts_gives_the_same_state_and_cache(n_past, n_seq, batch, n_threads, n_layer):
    params, ids = DEEP | {"blocks": DEEP["blocks"][:n_layer]}, ids_of(*batch, n_past + n_seq)
    expected, found = (gpt2.new_cache(params, N_HEAD, N_CTX, *batch) for _ in range(2))
    for cache in (expected, found)[: 2 * bool(n_past)]:
        gpt2.hidden_states(ids[..., :n_past], **params, n_head=N_HEAD, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch, n_threads)
        x = gpt2.prefill(ids[..., n_past:], params, N_HEAD, found)
    states = gpt2.hidden_states(ids[..., n_past:], **params, n_head=N_HEAD, cache=expected)
    np.testing.assert_allclose(x, states[..., -1, :], rtol=0, atol=2e-5 * np.ptp(states))
    np.testing.assert_allclose(found["kv"], expected["kv"], rtol=0, atol=2e-5 * np.ptp(expected["kv"]))
    assert found["n_past"] == expected["n_past"] == n_past + n_seq
    assert x.dtype == np.float32


def test_a_part_waits_until_all_earlier_parts_have_written(three_threads):
    def running_sum(x, kv_cache):
        if x[0] == 0:
            time.sleep(0.1)  # the first part is late
        kv_cache[0][..., -len(x) :, :] = x
        return np.cumsum(kv_cache[0][..., :, :], axis=0)[-len(x) :]

    x = np.arange(30.0)[:, None]
    assert split_over_cores(running_sum, x, np.full((1, 30, 1), 1e9)).tolist() == np.cumsum(x, axis=0).tolist()


@pytest.mark.parametrize(("n_rows", "n_threads", "n_parts"), [(29, 3, 1), (30, 3, 3), (20, 1, 1)])
def test_a_prompt_is_split_only_if_each_part_is_long_enough(monkeypatch, n_rows, n_threads, n_parts):
    use_threads(monkeypatch, n_threads, least_rows=10)
    lengths, x = [], np.random.default_rng(0).normal(size=(n_rows, 4))
    found = split_over_cores(lambda x, kv: (lengths.append(len(x)), x)[1], x, np.zeros((1, n_rows, 4)))
    assert (len(lengths), found.tolist()) == (n_parts, x.tolist())


def test_a_long_prompt_is_computed_by_several_threads_at_a_time(tiny_params, three_threads, monkeypatch):
    barrier, original, met = threading.Barrier(3, timeout=30), gpt2.ffn, []

    def meets(x, *args, **kwargs):
        if x.shape[-2] > 1:  # in the first layer; the last one has only one position
            met.append(barrier.wait())
        return original(x, *args, **kwargs)

    monkeypatch.setattr(gpt2, "ffn", meets)
    prefill_tokens(30, tiny_params)
    assert sorted(met) == [0, 1, 2]


def test_results_keep_their_order_and_blas_uses_one_thread():
    before, items = blas_threads(), np.array([0, 1e9, -1e9], np.float32)
    results = list(map_on_all_cores(lambda x: (np.exp(x), *blas_threads()), items))
    assert results == [(x, *[1] * len(before)) for x in (1, np.inf, 0)], "and no overflow warns"
    assert blas_threads() == before


def test_ctrl_c_drops_work_that_has_not_started():
    done = []

    def interrupted(i):
        if i == 0:
            raise KeyboardInterrupt
        time.sleep(0.02)
        done.append(i)

    with pytest.raises(KeyboardInterrupt):
        list(map_on_all_cores(interrupted, range(1000)))
    assert len(done) < 900


def test_one_signal_is_deferred_unless_it_is_ignored(capfd):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with defer_signals((signal.SIGINT, signal.SIGTERM), b"one moment") as received:
            for sent, expected in ((signal.SIGTERM, []), (signal.SIGINT, [signal.SIGINT])):
                signal.raise_signal(sent)
                assert received == expected
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        assert signal.signal(signal.SIGTERM, before) is signal.SIG_IGN
    assert (signal.getsignal(signal.SIGINT), capfd.readouterr().err) == (signal.default_int_handler, "one moment")


def test_threads_that_prefill_at_once_restore_the_limit_of_blas(monkeypatch):
    monkeypatch.setattr(threads, "MIN_ROWS", 1)
    before, barrier, alone = blas_threads(), threading.Barrier(3), prefill_tokens(31)
    assert n_blas_threads() == max(blas_threads(), default=n_blas_threads())
    assert blas_threads() == before
    with ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            for _, x in pool.map(lambda _: (barrier.wait(timeout=30), prefill_tokens(31)), range(3)):
                np.testing.assert_allclose(x, alone, atol=1e-5 * np.ptp(alone))
            assert blas_threads() == before


def test_a_prompt_is_not_split_while_another_thread_limits_blas(three_threads, monkeypatch):
    monkeypatch.setattr(threads, "compute_parts", lambda *args: pytest.fail("it is split"))
    with one_thread_per_core(), ThreadPoolExecutor(1) as pool:
        pool.submit(prefill_tokens, 30).result(timeout=30)


def test_after_ctrl_c_other_threads_end_when_they_next_use_the_cache(three_threads, monkeypatch):
    calls, original = [], gpt2.mha

    def interrupted(x, *args, kv_cache, **kwargs):
        calls.append(x)
        if len(kv_cache.earlier) == 1:
            raise KeyboardInterrupt
        with pytest.raises(CancelledError):
            kv_cache.written.result(30)
        return original(x, *args, kv_cache=kv_cache, **kwargs)

    monkeypatch.setattr(gpt2, "mha", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prefill_tokens(30)
    assert len(calls) <= 3, "at most one for each thread"


@pytest.mark.parametrize("failing_call", range(7))
def test_an_error_in_one_part_is_raised_and_leaves_the_cache_as_it_was(three_threads, monkeypatch, failing_call):
    calls, original, cache = iter(range(100)), gpt2.mha, gpt2.new_cache(DEEP, N_HEAD, N_CTX)

    def fails_once(*args, **kwargs):
        if next(calls) == failing_call:
            raise MemoryError("in one of the parts")
        return original(*args, **kwargs)

    monkeypatch.setattr(gpt2, "mha", fails_once)
    with pytest.raises(MemoryError, match="in one of the parts"):
        gpt2.prefill(ids_of(30), DEEP, N_HEAD, cache)
    assert cache["n_past"] == 0

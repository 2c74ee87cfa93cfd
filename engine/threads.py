"""Use all cores.

BLAS, NumPy's library for matrix products, uses all cores inside a product. But half of a long prompt or a training step
is spent between products, so these functions give each thread a share of the work and limit BLAS to one thread.
"""

import contextlib
import functools
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed

import numpy as np
from numpy import ndarray as Array

MIN_ROWS = 220  # the fewest positions in a part of a prompt; for smaller parts, BLAS's own threads are faster
blas_limit = threading.RLock()  # held while BLAS is limited, because the limit is for the whole process


@functools.cache
def blas():
    """A controller of the libraries that compute NumPy's matrix products."""
    from threadpoolctl import ThreadpoolController  # imported late: short prompts do not need it

    return ThreadpoolController().select(user_api="blas")


@functools.cache
def n_blas_threads() -> int:
    """The number of threads of NumPy's matrix products: one per core, unless the environment sets another number."""
    with blas_limit:  # wait until no other thread limits them
        return max((library["num_threads"] for library in blas().info()), default=os.cpu_count() or 1)


@contextlib.contextmanager
def one_thread_per_core() -> Iterator[Executor]:
    """Limit BLAS to one thread, and yield a pool of as many threads as BLAS had, in which NumPy does not warn."""
    pool = ThreadPoolExecutor(n_blas_threads(), initializer=np.seterr, initargs=("ignore",))
    with blas_limit, blas().limit(limits=1):
        try:
            yield pool
        finally:  # after Ctrl-C, work that has not started is dropped
            pool.shutdown(cancel_futures=True)


def map_on_all_cores(function: Callable, items: Iterable, pool: Executor | None = None) -> Iterator:
    """Yield function(item) for each item, in order, from `pool` or a new pool. Takes only a few items in advance."""
    with contextlib.nullcontext(pool) if pool else one_thread_per_core() as pool:
        futures = (pool.submit(function, item) for item in items)
        waiting = deque(itertools.islice(futures, 2 * n_blas_threads()))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))


@contextlib.contextmanager
def defer_signals(numbers: Sequence[int], notice: bytes = b"") -> Iterator[list[int]]:
    """Yield a list that is empty until one of these signals comes, so that the block can finish a piece of work.

    The first signal prints `notice`, the second one raises KeyboardInterrupt. Ignored signals stay ignored. Only
    the main thread receives signals, so this does nothing in other threads.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        with contextlib.suppress(OSError):  # os.write, because the signal may have interrupted a print
            os.write(2, notice)

    is_main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handle) for n in numbers if is_main and signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SharedCache:
    """One layer's keys and values. A thread writes those of its part; reading waits until earlier parts are written."""

    def __init__(self, kv: Array, earlier: list[Future], written: Future):
        self.kv, self.earlier, self.written = kv, earlier, written

    def __setitem__(self, index: tuple, values: Array) -> None:
        self.kv[index] = values
        self.written.set_result(None)  # InvalidStateError if `written` is cancelled

    def __getitem__(self, index: tuple) -> Array:
        for written in self.earlier:
            written.result()  # waits; CancelledError if it is cancelled
        return self.kv[index]


def split_over_cores(function: Callable, x: Array, kv_cache: Array) -> Array:
    """function(x, kv_cache), computed for a long x in one part per core, and joined along the positions.

    x is [..., n_seq, n_embd]; `kv_cache` is [n_layer, ..., n_head, 2, n_past + n_seq, d]. For each part, the function
    gets its positions of x and each layer's cache up to them. It must write each layer's cache once, then read it.
    """
    n_rows = x.size // x.shape[-1]
    is_long = n_rows >= 2 * MIN_ROWS and n_rows >= MIN_ROWS * n_blas_threads() and blas().info()
    if not (is_long and blas_limit.acquire(blocking=False)):  # not acquired: another thread limits BLAS
        return function(x, kv_cache)
    try:
        return compute_parts(function, x, kv_cache)
    finally:
        blas_limit.release()


def compute_parts(function: Callable, x: Array, kv_cache: Array) -> Array:
    """`split_over_cores` for a long x. The attention of a part waits for the keys and values of the parts before it."""
    n_parts, n_seq, n_past = n_blas_threads(), x.shape[-2], kv_cache.shape[-2] - x.shape[-2]
    # If a position sees n_embd positions, its attention takes 0.4 times as long as its matrix products.
    costs = np.cumsum(1 + 0.4 * np.arange(n_past, n_past + n_seq) / x.shape[-1])
    cuts = np.unique([0, *np.searchsorted(costs, costs[-1] * np.arange(1, n_parts) / n_parts), n_seq])
    parts = [slice(start, end) for start, end in itertools.pairwise(cuts)]  # fewer than n_parts if x has few positions
    written: list[list[Future]] = [[Future() for _ in parts] for _ in kv_cache]  # [layer][part]

    def compute(i: int) -> Array:
        layers = kv_cache[..., : n_past + parts[i].stop, :]
        shared = [SharedCache(kv, done[:i], done[i]) for kv, done in zip(layers, written, strict=True)]
        return function(x[..., parts[i], :], shared)

    with one_thread_per_core() as pool:
        try:
            futures = [pool.submit(compute, i) for i in range(len(parts))]
            for future in as_completed(futures):
                future.result()  # raises the error of its part, if there is one
        finally:  # after an error or Ctrl-C, the other threads end when they next use the cache
            for write in itertools.chain.from_iterable(written):
                write.cancel()
    return np.concatenate([future.result() for future in futures], axis=-2)

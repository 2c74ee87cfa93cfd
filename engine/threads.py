"""Work on all cores.

BLAS, NumPy's library for matrix products, uses all cores inside a product, but half of a long prompt or a training step
lies between products. These functions give each thread a piece of the work, and limit BLAS to one thread meanwhile.
"""

import contextlib
import functools
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Executor, ThreadPoolExecutor, wait

import numpy as np
from numpy import ndarray as Array

LEAST_ROWS = 220  # positions in a part of a prompt; where parts would be smaller, BLAS's own threads are faster
blas_limit = threading.RLock()  # held while BLAS is limited, because the limit holds for the whole process


@functools.cache
def blas():
    """The libraries that make NumPy's matrix products."""
    from threadpoolctl import ThreadpoolController  # imported late: short prompts do without

    return ThreadpoolController().select(user_api="blas")


@functools.cache
def n_blas_threads() -> int:
    """The threads that NumPy's matrix products use: one a core, unless the environment says otherwise."""
    with blas_limit:  # another thread may have limited them
        return max((library["num_threads"] for library in blas().info()), default=os.cpu_count() or 1)


@contextlib.contextmanager
def core_threads() -> Iterator[Executor]:
    """Limit BLAS to one thread while the block runs; yield a pool with as many threads as BLAS had."""
    pool = ThreadPoolExecutor(n_blas_threads())
    with blas_limit, blas().limit(limits=1):
        try:
            yield pool
        finally:  # after Ctrl-C, what has not begun does not begin
            pool.shutdown(cancel_futures=True)


def on_all_cores(function: Callable, items: Iterable, pool: Executor | None = None) -> Iterator:
    """Yield function(item) for each of `items`, in order, computed in `pool` or in new `core_threads`.

    No more items are taken than keep all threads at work.
    """

    def quiet(item: object) -> object:
        with np.errstate(all="ignore"):  # of this thread: whoever takes the results checks that they are finite
            return function(item)

    with contextlib.nullcontext(pool) if pool else core_threads() as pool:
        begun = (pool.submit(quiet, item) for item in items)
        waiting = deque(itertools.islice(begun, 2 * n_blas_threads()))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(begun, 1))


@contextlib.contextmanager
def deferred(numbers: Sequence[int], notice: bytes = b"") -> Iterator[list[int]]:
    """Yield a list that is empty until one of these signals comes, so that a piece of work can be finished.

    The first one is answered with the `notice`, the second one raises KeyboardInterrupt. Signals that are ignored stay
    ignored; in other threads than the main one, to which no signal comes, nothing is changed.
    """
    received = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        with contextlib.suppress(OSError):  # not print: the signal may have come in the midst of one
            os.write(2, notice)

    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in numbers if is_main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SharedCache:
    """One layer's keys and values: a thread writes those of its positions, and reads when all before are written."""

    def __init__(self, kv: Array, earlier: list[threading.Event], written: threading.Event, stop: threading.Event):
        self.kv, self.earlier, self.written, self.stop = kv, earlier, written, stop

    def __setitem__(self, index: tuple, values: Array) -> None:
        self.kv[index] = values
        self.written.set()

    def __getitem__(self, index: tuple) -> Array:
        for written in self.earlier:
            written.wait()
        if self.stop.is_set():
            raise CancelledError
        return self.kv[index]


def in_parts(function: Callable, x: Array, kv_cache: Array) -> Array:
    """function(x, kv_cache), computed for a long x in as many parts as there are cores.

    x is [..., n_seq, n_embd]; `kv_cache` is [n_layer, ..., n_head, 2, n_past + n_seq, d]. The function is called with
    some positions of x and, for each layer, the cache up to these positions. Its results are joined along the
    positions. It must write to a layer's cache before it reads it.
    """
    n_rows = x.size // x.shape[-1]
    is_long = n_rows >= 2 * LEAST_ROWS and n_rows >= LEAST_ROWS * n_blas_threads() and blas().info()
    if not (is_long and blas_limit.acquire(blocking=False)):  # it fails if another thread limits BLAS
        return function(x, kv_cache)
    try:
        with core_threads() as pool:
            return compute_parts(function, x, kv_cache, pool)
    finally:
        blas_limit.release()


def compute_parts(function: Callable, x: Array, kv_cache: Array, pool: Executor) -> Array:
    """`in_parts` on the threads of `pool`: a part's attention waits for the keys and values of the parts before it."""
    n_parts, n_seq, n_past = n_blas_threads(), x.shape[-2], kv_cache.shape[-2] - x.shape[-2]
    # A position that sees as many as the model is wide spends 0.4 as much time on attention as on matrix products.
    costs = np.cumsum(1 + 0.4 * np.arange(n_past, n_past + n_seq) / x.shape[-1])
    cuts = np.unique([0, *np.searchsorted(costs, costs[-1] * np.arange(1, n_parts) / n_parts), n_seq])
    parts = [slice(start, end) for start, end in itertools.pairwise(cuts)]  # fewer than n_parts for a few positions
    written = [[threading.Event() for _ in parts] for _ in kv_cache]  # of each layer and part
    stop = threading.Event()

    def compute(i: int) -> Array:
        layers = kv_cache[..., : n_past + parts[i].stop, :]
        shared = [SharedCache(kv, done[:i], done[i], stop) for kv, done in zip(layers, written, strict=True)]
        return function(x[..., parts[i], :], shared)

    try:
        futures = [pool.submit(compute, i) for i in range(len(parts))]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # after an error or Ctrl-C, the other threads end with the layer that they are in
        stop.set()
        for event in (event for layer in written for event in layer):
            event.set()
    for future in done:
        future.result()  # raises what the part has raised
    return np.concatenate([future.result() for future in futures], axis=-2)

"""A prompt, computed for its last position only, and if it is long, on all cores.

NumPy uses several cores inside a matrix product and one between them, where a long prompt spends half of its time. So a
long prompt is cut into as many parts as there are cores. Each thread computes a part, its matrix products with one
thread, layer by layer behind the part before it, whose keys and values it needs.
"""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from gpt2 import check_ids, ffn, hidden_states, layer_norm, mha, split_heads

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

LEAST_ROWS = 220  # of a part: with fewer, as for 1,024 tokens on more than 4 cores, products of all threads are faster
one_at_a_time = threading.Lock()  # the limit of BLAS to one thread holds for the whole process


@functools.cache
def blas() -> "ThreadpoolController":
    """The libraries that make NumPy's matrix products."""
    from threadpoolctl import ThreadpoolController  # late: short prompts do without

    return ThreadpoolController().select(user_api="blas")


def n_blas_threads() -> int:
    """The threads that NumPy's matrix products use: one a core, unless the environment says otherwise."""
    return max((library["num_threads"] for library in blas().info()), default=os.cpu_count() or 1)


def prefill(inputs: Array, params: dict, n_head: int, cache: dict) -> Array:
    """`hidden_states` of the last position: token ids [..., n_seq] -> [..., n_embd]. Raises what that raises."""
    if np.shape(inputs)[-1:] == (1,):
        return hidden_states(inputs, **params, n_head=n_head, cache=cache)[..., 0, :]
    n_past, n_room = cache["n_past"], cache["kv"].shape[-2]
    ids = check_ids(inputs, params["wte"].shape[0], n_room - n_past)
    n_all = n_past + ids.shape[-1]
    x = params["wte"][ids] + params["wpe"][n_past:n_all]  # [..., n_seq] -> [..., n_seq, n_embd]
    kv_cache = cache["kv"][..., :n_all, :]
    if ids.size >= 2 * LEAST_ROWS and one_at_a_time.acquire(blocking=False):
        try:
            n_threads = n_blas_threads() if blas().info() else 1  # a BLAS that is not known cannot be limited
            n_parts = n_threads if ids.size >= LEAST_ROWS * n_threads else 1
            x = compute_parts(x, params, n_head, kv_cache, n_parts)
        finally:
            one_at_a_time.release()
    else:
        x = compute_part(x, params, n_head, kv_cache)
    cache["n_past"] = n_all
    return layer_norm(x, **params["ln_f"])[..., -1, :]


def compute_parts(x: Array, params: dict, n_head: int, kv_cache: Array, n_parts: int) -> Array:
    """The blocks, as `compute_part` has them, with a thread for each of n_parts."""
    n_seq, n_past = x.shape[-2], kv_cache.shape[-2] - x.shape[-2]
    # A position that sees as many as the model is wide spends 0.4 as much time on attention as on matrix products.
    costs = np.cumsum(1 + 0.4 * np.arange(n_past, n_past + n_seq) / x.shape[-1])
    cuts = np.unique([0, *np.searchsorted(costs, costs[-1] * np.arange(1, n_parts) / n_parts), n_seq])
    n_parts = len(cuts) - 1  # fewer if there are not so many positions
    if n_parts == 1:
        return compute_part(x, params, n_head, kv_cache)
    ready = [[threading.Event() for _ in params["blocks"]] for _ in range(n_parts)]
    stopped = threading.Event()

    def compute(i: int) -> Array:
        part, seen = x[..., cuts[i] : cuts[i + 1], :], kv_cache[..., : n_past + cuts[i + 1], :]
        try:
            return compute_part(part, params, n_head, seen, ready[i - 1] if i else None, ready[i], stopped)
        except BaseException:
            stopped.set()
            raise
        finally:  # whatever has happened, let no other wait for it
            for event in ready[i]:
                event.set()

    with blas().limit(limits=1), ThreadPoolExecutor(n_parts) as pool:
        try:
            return list(pool.map(compute, range(n_parts)))[-1]
        finally:  # after Ctrl-C: the threads end with the layer that they are in
            stopped.set()


def compute_part(
    x: Array, params: dict, n_head: int, kv_cache: Array,
    previous: list | None = None, ready: list | None = None, stopped: threading.Event | None = None,
) -> Array:  # fmt: skip
    """All blocks for x, the last positions of kv_cache: [..., n_seq, n_embd] -> of the last one, [..., 1, n_embd].

    `previous` and `ready` have an event for each layer, set when the keys and values of the part before, and of this
    one, are in kv_cache; once `stopped` is set, nothing matters any more.
    """
    for layer, block in enumerate(params["blocks"]):
        if previous:
            previous[layer].wait()
        if stopped and stopped.is_set():
            break
        kv = kv_cache[layer]
        if layer == len(params["blocks"]) - 1:  # nothing of it is needed but keys, values and the last position
            split_heads(layer_norm(x, **block["ln_1"]), block["attn"]["c_attn"], n_head, kv)
            x = x[..., -1:, :]
        x = x + mha(layer_norm(x, **block["ln_1"]), **block["attn"], n_head=n_head, kv_cache=kv)
        if ready:
            ready[layer].set()
        x = x + ffn(layer_norm(x, **block["ln_2"]), **block["mlp"])
    return x

"""The machine that bench.py measures on: its description, its limits, and the time and memory of a process."""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from timeit import repeat

import numpy as np
from numpy import ndarray as Array
from threadpoolctl import threadpool_info

from engine.threads import n_blas_threads

READ_SHAPE, PRODUCT_SIZE = (3072, 40_000), 2048  # 491 MB, most of which does not fit a processor's cache


def describe_machine(packages: Iterable[str]) -> dict:
    """The processor, the cores that this process may use, the threads of BLAS, and the versions of libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    model_name = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")
    processor = model_name[1] if model_name else platform.processor() or platform.machine()
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"Python": platform.python_version(), "NumPy": np.__version__}
    versions |= {str(p["internal_api"]): str(p["version"]) for p in threadpool_info() if p["user_api"] == "blas"}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return {"processor": processor, "n_cores": n_cores, "n_threads": n_blas_threads(), "versions": versions}


@functools.cache
def compiled_sum() -> Callable[[Array], float]:
    """A compiled function that sums a matrix, in as many threads as matrix products use."""
    import numba

    numba.set_num_threads(min(n_blas_threads(), numba.get_num_threads()))
    return numba.njit(parallel=True, fastmath=True, nogil=True)(lambda a: a.sum())


def read_bandwidth() -> float:
    """The best bytes/s of reading a large matrix: in a product from either side or, with Numba, in a sum."""
    a = np.ones(READ_SHAPE, np.float32)  # not zeros: their pages would all be the same memory
    v, u = (np.ones(n, np.float32) for n in a.shape)
    readers: list[Callable[[], object]] = [lambda: v @ a, lambda: a @ u]
    if importlib.util.find_spec("numba"):
        readers.append(functools.partial(compiled_sum(), a))
    return a.nbytes / min(min(repeat(reader, number=1, repeat=12)) for reader in readers)


def product_rate() -> float:
    """The best operations/s of a float32 matrix product."""
    a = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    product = np.empty_like(a)
    return 2 * len(a) ** 3 / min(repeat(lambda: np.matmul(a, a, out=product), number=1, repeat=3))


def token_limit(cost: dict[str, float]) -> float:
    """The highest possible tokens/s if a token costs these `bytes` and `operations`: the slower of the two decides."""
    rates = {"bytes": read_bandwidth, "operations": product_rate}
    return min(rates[name]() / amount for name, amount in cost.items())


def run_process(*arguments: str) -> tuple[float, float]:
    """Run Python with `arguments` in a new process: its seconds, and its peak resident memory in MB."""
    command = [sys.executable, str(Path(__file__).parent / "timer.py"), sys.executable, *arguments]
    timer = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if timer.returncode:
        raise OSError(f"{' '.join(arguments)[:80]} failed: {' '.join(timer.stderr.split())[-300:]}")
    seconds, peak = map(float, timer.stdout.split())
    return seconds, peak

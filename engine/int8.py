"""int8 weights: `params = quantize(params)` cuts their memory to a quarter, and the time per token to a third.

Each weight matrix becomes int8 with a float32 scale for each output, in an object that supports `x @ w`, `w.T`
and `w[ids]` as the array does. Biases, norms and positions stay float32. Numba compiles the products.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

# Threads that spin while they wait become many times slower as soon as another process needs their core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
try:
    from numba import float32, njit, prange
except ImportError as error:
    raise ImportError(f"int8 needs Numba: pip install -r requirements-fast.txt ({error})") from error

from engine.threads import defer_signals
from store import checkpoint
from store.files import derived_file_directories, locked, remove_leftovers
from store.models import INT8_WEIGHTS, RELEASED, load_params, weight_files
from store.params import check_tensors, count_params, flatten, map_leaves, param_shapes, tensor_name, tensors_of
from store.tensors import Lazy, map_tensors, save_tensors, write_tensors

MAX_ROWS = 48  # if x has more rows, it is faster to convert w to float32 and let BLAS multiply
BLOCK = 768  # rows of w that are converted at a time
PER_ROW = ("wte.weight", "lm_head.weight")  # quantized per row, which is a token; other matrices per column


def compiled(function: Callable) -> Callable:
    """Compile a function for all cores with Numba, which caches it on disk if it finds a directory to write to."""
    options: dict = {"parallel": True, "nogil": True, "fastmath": {"reassoc", "contract"}}  # so that it vectorizes sums
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no such directory, so every process compiles
        return njit(**options)(function)


@compiled
def multiply(x: Array, rows: Array, scale: Array, y: Array) -> None:
    """y[i, j] = scale[j] * (x[i] . rows[j]): float32 [n, n_in], int8 [n_out, n_in], float32 [n_out], [n, n_out].

    Reads eight rows at a time that are far apart in memory: they arrive at 38 GB/s, eight neighbouring rows at 17 GB/s.
    """
    n_out, n_in = rows.shape
    n = n_out // 8
    for j in prange(n):
        w0, w1, w2, w3, w4, w5, w6, w7 = j, j + n, j + 2 * n, j + 3 * n, j + 4 * n, j + 5 * n, j + 6 * n, j + 7 * n
        for i in range(x.shape[0]):
            y0 = y1 = y2 = y3 = y4 = y5 = y6 = y7 = float32(0)
            for k in range(n_in):
                x_k = x[i, k]
                y0 += x_k * float32(rows[w0, k])
                y1 += x_k * float32(rows[w1, k])
                y2 += x_k * float32(rows[w2, k])
                y3 += x_k * float32(rows[w3, k])
                y4 += x_k * float32(rows[w4, k])
                y5 += x_k * float32(rows[w5, k])
                y6 += x_k * float32(rows[w6, k])
                y7 += x_k * float32(rows[w7, k])
            y[i, w0], y[i, w1], y[i, w2], y[i, w3] = y0 * scale[w0], y1 * scale[w1], y2 * scale[w2], y3 * scale[w3]
            y[i, w4], y[i, w5], y[i, w6], y[i, w7] = y4 * scale[w4], y5 * scale[w5], y6 * scale[w6], y7 * scale[w7]
    for j in range(8 * n, n_out):
        for i in range(x.shape[0]):
            y0 = float32(0)
            for k in range(n_in):
                y0 += x[i, k] * float32(rows[j, k])
            y[i, j] = y0 * scale[j]


multiply_lock = threading.Lock()  # not all of Numba's thread pools can serve two threads
numba_pids: set[int] = set()  # processes that started Numba's threads: this one, or one that it was forked from


def multiply_locked(x: Array, rows: Array, scale: Array, y: Array) -> None:
    """`multiply`, one thread at a time. Ctrl-C waits while Numba compiles, because Numba would swallow it."""
    with multiply_lock, defer_signals([] if getattr(multiply, "signatures", True) else [signal.SIGINT]) as received:
        numba_pids.add(os.getpid())
        multiply(x, rows, scale, y)
    if received:
        raise KeyboardInterrupt


class Int8:
    """int8 rows [n_out, n_in], each with a scale, that act as a float32 array; if `transposed`, as [n_in, n_out]."""

    __array_ufunc__ = None  # makes NumPy call __rmatmul__ instead of building an array of objects
    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, rows: Array, scale: Array, transposed: bool = False) -> None:
        self.rows, self.scale, self.transposed = rows, scale, transposed
        self.shape = rows.shape[::-1] if transposed else rows.shape

    @property
    def T(self) -> "Int8":
        return Int8(self.rows, self.scale, not self.transposed)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> Array:
        w = self.rows * self.scale[:, None]
        return (w.T if self.transposed else w).astype(dtype or np.float32, copy=False)

    def __getitem__(self, ids: Array) -> Array:
        """The rows of a table, as float32: ids [...] -> [..., n_in]."""
        if self.transposed:
            return np.asarray(self)[ids]
        return self.rows[ids] * self.scale[ids][..., None]

    def __rmatmul__(self, x: Array) -> Array:
        """x @ w: [..., n_in] -> [..., n_out], float32."""
        if not self.transposed:
            return x @ np.asarray(self)
        if x.shape[-1] != self.shape[0]:
            raise ValueError(f"x has {x.shape[-1]} columns, and w {self.shape[0]} rows: they cannot be multiplied")
        rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
        y = np.empty((len(rows), self.shape[1]), np.float32)
        # After a fork, using Numba again would end the process if its threads are those of GNU's OpenMP.
        if len(rows) <= MAX_ROWS and numba_pids <= {os.getpid()}:
            multiply_locked(rows, self.rows, self.scale, y)
        else:
            for start in range(0, self.shape[1], BLOCK):
                block = slice(start, start + BLOCK)
                np.matmul(rows, self.rows[block].astype(np.float32).T, out=y[:, block])
            y *= self.scale
        return y.reshape(*x.shape[:-1], self.shape[1])


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """float32 [n_out, n_in] -> the nearest int8 [n_out, n_in], and scales [n_out]: a row's largest number / 127."""
    quantized, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK):  # the whole vocabulary at once would take 154 MB more
        block = slice(start, start + BLOCK)
        largest = np.abs(rows[block]).max(axis=1)
        if not np.isfinite(largest).all():
            raise ValueError("the weights have infinite or NaN values, which int8 cannot represent")
        scale[block] = np.maximum(largest / 127, np.finfo(np.float32).tiny)  # not 0, even for a row of zeros
        quantized[block] = np.rint(rows[block] / scale[block, None])
    quantized.flags.writeable = scale.flags.writeable = False
    return quantized, scale


def quantize(params: dict) -> dict:
    """`params` with an `Int8` in the place of each weight matrix."""
    return from_tensors(params, to_tensors(params))


def to_tensors(params: dict) -> dict[str, Array | Lazy]:
    """The tensors of `model.int8.safetensors`: the rows of each matrix, under Hugging Face's name, and `.scale`."""
    leaves = tensors_of(params)
    tensors: dict[str, Array | Lazy] = {}

    @lru_cache(maxsize=1)  # read in order, each matrix is quantized once, and only one at a time is in memory
    def quantized(name: str) -> tuple[Array, Array]:
        w = np.asarray(leaves[name])
        return quantize_rows(w if name in PER_ROW else w.T)

    for name, leaf in leaves.items():
        tensors[name] = leaf
        if len(leaf.shape) == 2 and name != "wpe.weight":
            shape = leaf.shape if name in PER_ROW else leaf.shape[::-1]
            tensors[name] = Lazy(shape, partial(lambda name: quantized(name)[0], name), dtype=np.dtype(np.int8))
            tensors[f"{name}.scale"] = Lazy(shape[:1], partial(lambda name: quantized(name)[1], name))
    return tensors


def from_tensors(params: dict, tensors: Mapping[str, Array | Lazy]) -> dict:
    """`quantize(params)`, made of its tensors."""

    def replace(path: tuple, leaf: Array | Lazy | float) -> Array | Lazy | float | Int8:
        name = tensor_name(path)
        if (scale := tensors.get(f"{name}.scale")) is not None:
            return Int8(np.asarray(tensors[name]), np.asarray(scale), transposed=name not in PER_ROW)
        return tensors.get(name, leaf)  # the eps of a norm is not a tensor

    return map_leaves(replace, params)


def map_int8(path: Path, params: dict) -> tuple[dict, dict[str, str]]:
    """`quantize(params)`, memory-mapped from a file, and its metadata; ValueError if the file does not fit `params`."""
    tensors, metadata = map_tensors(path)
    found = {name: (*tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}
    expected = {name: (*tensor.shape, tensor.dtype.name) for name, tensor in to_tensors(params).items()}
    check_tensors(path, found, expected, "hparams.json")
    return from_tensors(params, tensors), metadata


def fingerprint(files: Sequence[Path], params: dict) -> str:
    """A hash of the files' sizes and times and of a sample of each tensor. It misses other changes of the weights."""
    digest = hashlib.sha256(" ".join(f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files).encode())
    for leaf in flatten(params, tensor_name).values():
        source = getattr(leaf, "source", None)
        array = np.asarray(leaf if source is None else source).reshape(-1)
        for part in (array[:16], array[array.size // 2 :][:16], array[-16:]):
            digest.update(part.tobytes())
    return digest.hexdigest()


def map_quantized(directory: Path, params: dict) -> dict:
    """`quantize(params)`, memory-mapped from `model.int8.safetensors`, which is written first if need be."""
    homes, files = derived_file_directories(directory), weight_files(directory)  # the last home is written to
    source = fingerprint(files, params)

    def map_current_file() -> dict | None:
        for home in homes:
            with contextlib.suppress(ValueError, OSError):  # a damaged or unreadable file is rebuilt
                mapped, metadata = map_int8(home / INT8_WEIGHTS, params)
                if metadata.get("source") == source:
                    return mapped
        return None

    if mapped := map_current_file():
        return mapped
    try:
        with locked(homes[-1]):
            if not map_current_file():  # another process may have written it by now
                remove_leftovers(homes[-1] / INT8_WEIGHTS)
                made_of = map_tensors(files[-1])[1] if files[-1].suffix == ".safetensors" else {}
                save_tensors(homes[-1] / INT8_WEIGHTS, to_tensors(params), made_of | {"source": source})
    except OSError as error:
        print(f"{error}: each start makes the int8 weights again", file=sys.stderr)
    return map_current_file() or quantize(params)  # in memory, if the file could not be written


def load_quantized(name: str, directory: Path, hparams: dict[str, int]) -> dict:
    """`store.models.load_params` with int8 weights. Without disk space for float32 too, it makes only int8."""
    if weight_files(directory):
        return map_quantized(directory, load_params(name, directory, hparams))
    shapes, homes = param_shapes(hparams), derived_file_directories(directory)
    n_bytes = 4 * count_params(shapes)
    params = map_leaves(lambda path, shape: np.broadcast_to(np.float32(0), shape), shapes)  # takes no memory
    n_int8_bytes = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in to_tensors(params).values())
    if not any(checkpoint.is_current(home / INT8_WEIGHTS, directory) for home in homes):
        data = directory / checkpoint.CHECKPOINT_DATA
        n_bytes_to_download = n_bytes - (data.stat().st_size if data.is_file() else 0)
        if shutil.disk_usage(homes[-1]).free >= n_bytes_to_download + n_bytes + n_int8_bytes:
            return map_quantized(directory, load_params(name, directory, hparams))
        print(f"{directory}: only int8 weights are made, because the disk has no room for float32", file=sys.stderr)
    path = checkpoint.find_weights(directory, n_bytes, name in RELEASED, INT8_WEIGHTS, n_int8_bytes, "engine.int8")
    return map_int8(path, params)[0]


def convert_to_int8(target: Path) -> None:
    """Write the checkpoint in the current directory to `target` as int8. This is the work of a separate process."""
    params, metadata = checkpoint.read_checkpoint()
    write_tensors(target, to_tensors(params), metadata)


if __name__ == "__main__":
    checkpoint.child(convert_to_int8)

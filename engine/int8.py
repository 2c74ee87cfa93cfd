"""int8 weights, a quarter of the bytes: `params = quantize(params)`, and a token takes a third of the time.

Each weight matrix becomes int8 with a float32 scale for each output, behind an object that answers `x @ w`, `w.T` and
`w[ids]` as the array did. Biases, norms and positions stay float32. Numba compiles the products.
"""

import contextlib
import functools
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

# Threads that wait busily for long are many times slower as soon as another process wants their core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
try:
    from numba import float32, njit, prange
except ImportError as error:
    raise ImportError(f"int8 needs Numba: pip install -r requirements-fast.txt ({error})") from error

from engine.threads import deferred
from store import checkpoint
from store.files import homes_of, locked, sweep
from store.models import INT8_WEIGHTS, RELEASED, load_params, weight_files
from store.params import count_params, flatten, map_leaves, param_shapes, tensor_name
from store.tensors import Lazy, map_tensors, save_tensors, write_tensors

MOST_ROWS = 48  # for x with more rows, it is faster to widen w to float32 and let BLAS multiply
BLOCK = 768  # rows of w that are widened at a time
ANY_ORDER = {"reassoc", "contract"}  # lets the compiler add up the terms of a sum in any order, to vectorize it
TABLES = (("wte",), ("lm_head",))  # quantized per row, as a row stands for a token; other matrices per column


def compiled(function: Callable) -> Callable:
    """Numba's njit on all cores, which keeps what it has compiled on disk, if there is a directory to write to."""
    options = {"parallel": True, "nogil": True, "fastmath": ANY_ORDER}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is none, so every process compiles
        return njit(**options)(function)


@compiled
def multiply(x: Array, rows: Array, scale: Array, y: Array) -> None:
    """y[i, j] = scale[j] * (x[i] . rows[j]): float32 [n, n_in], int8 [n_out, n_in], float32 [n_out], [n, n_out].

    Eight rows at a time, far apart: as one stream of memory each they are read at 38 GB/s, eight neighbours at 17.
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


one_caller = threading.Lock()  # of `multiply`: not all of Numba's thread pools can serve two
callers: set[int] = set()  # the process that has started Numba's threads


def multiply_once(x: Array, rows: Array, scale: Array, y: Array) -> None:
    """`multiply`, for one thread at a time; Ctrl-C during its compilation, where Numba would lose it, waits."""
    with one_caller, deferred([] if getattr(multiply, "signatures", True) else [signal.SIGINT]) as received:
        callers.add(os.getpid())
        multiply(x, rows, scale, y)
    if received:
        raise KeyboardInterrupt


class Int8:
    """int8 rows [n_out, n_in] with a scale each that answer like a float32 array; `transposed`, of [n_in, n_out]."""

    __array_ufunc__ = None  # makes NumPy call __rmatmul__ instead of building an array of objects
    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, rows: Array, scale: Array, transposed: bool = False) -> None:
        self.rows, self.scale, self.transposed = rows, scale, transposed

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[::-1] if self.transposed else self.rows.shape

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
        # GNU's OpenMP, with which Numba's threads work, would end a process that was forked from one with such threads.
        if len(rows) <= MOST_ROWS and callers <= {os.getpid()}:
            multiply_once(rows, self.rows, self.scale, y)
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
            raise ValueError("the weights hold numbers that are infinite or NaN: int8 cannot")
        scale[block] = np.maximum(largest / 127, np.finfo(np.float32).tiny)  # of a row of zeros too
        quantized[block] = np.rint(rows[block] / scale[block, None])
    quantized.flags.writeable = scale.flags.writeable = False
    return quantized, scale


def is_quantized(path: tuple) -> bool:
    """Whether the parameter of this path is a matrix or a table."""
    return path in TABLES or path[-1] == "w"


def rows_of(path: tuple, leaf: Array | Lazy) -> Array:
    """The rows that have a scale each: of a table its own, of another matrix its columns."""
    return np.asarray(leaf) if path in TABLES else np.asarray(leaf).T


def quantize(params: dict) -> dict:
    """`params` with int8 in the place of each weight matrix and of the tables."""

    def convert(path: tuple, leaf: Array | Lazy) -> Array | Int8:
        return Int8(*quantize_rows(rows_of(path, leaf)), path not in TABLES) if is_quantized(path) else leaf

    return map_leaves(convert, params)


def to_tensors(params: dict) -> dict[str, Array | Lazy]:
    """The tensors of `model.int8.safetensors`: of a matrix its rows, by Hugging Face's name, and its `.scale`.

    They are made from `params` one matrix at a time, when they are written in this order.
    """
    leaves = flatten(params, tuple)

    @functools.lru_cache(maxsize=1)
    def quantized(path: tuple) -> tuple[Array, Array]:
        return quantize_rows(rows_of(path, leaves[path]))

    tensors = {}
    for path, leaf in leaves.items():
        name = tensor_name(path)
        if is_quantized(path):
            shape = leaf.shape if path in TABLES else leaf.shape[::-1]
            tensors[name] = Lazy(shape, lambda path=path: quantized(path)[0], dtype=np.dtype(np.int8))
            tensors[f"{name}.scale"] = Lazy(shape[:1], lambda path=path: quantized(path)[1])
        elif not isinstance(leaf, float):
            tensors[name] = leaf
    return tensors


def from_tensors(params: dict, tensors: dict[str, Array]) -> dict:
    """`quantize(params)` from its tensors; KeyError or ValueError if they are not what it would have."""

    def find(path: tuple, leaf: Array | Lazy | float) -> Array | Int8 | float:
        if isinstance(leaf, float):
            return leaf  # an eps
        name = tensor_name(path)
        found = tensors[name]
        if is_quantized(path):
            found = Int8(found, tensors[f"{name}.scale"], transposed=path not in TABLES)
            if (found.rows.dtype, found.scale.dtype, found.scale.shape) != (np.int8, np.float32, found.rows.shape[:1]):
                raise ValueError(f"{name} is not int8 with a scale for each row")
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} has another shape or type")
        return found

    return map_leaves(find, params)


def fingerprint(paths: list[Path], params: dict) -> str:
    """What tells these weights from others without reading them: size and time of their files, and a sample.

    The sample has some numbers from the beginning, the middle and the end of every tensor. Weights that differ in other
    places only, in files of the same size and time, are not told apart.
    """
    digest = hashlib.sha256(" ".join(f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths).encode())
    for leaf in flatten(params, tuple).values():
        array = np.asarray(leaf if getattr(leaf, "source", None) is None else leaf.source).reshape(-1)
        for part in (array[:16], array[array.size // 2 :][:16], array[-16:]):
            digest.update(part.tobytes())
    return digest.hexdigest()


def map_quantized(directory: Path, params: dict) -> dict:
    """`quantize(params)`, memory-mapped from `model.int8.safetensors`, which is made first if need be.

    It is in the model's directory, else in the user's cache; if neither can be written, the weights stay in memory.
    """
    homes, files = homes_of(directory), weight_files(directory)
    source = {"source": fingerprint(files, params)}

    def find() -> dict | None:
        for path in (home / INT8_WEIGHTS for home in homes):
            with contextlib.suppress(ValueError, KeyError, OSError):  # a damaged or unreadable file is made anew
                tensors, metadata = map_tensors(path)
                if source.items() <= metadata.items():
                    return from_tensors(params, tensors)
        return None

    if found := find():
        return found
    try:
        with locked(homes[-1]):
            if not (found := find()):  # by now another process may have made it
                path = homes[-1] / INT8_WEIGHTS
                sweep(path)
                made_of = map_tensors(files[-1])[1] if files[-1].suffix == ".safetensors" else {}
                save_tensors(path, to_tensors(params), made_of | source)
    except OSError as error:
        print(f"{error}: int8 weights are made at every start", file=sys.stderr)
    return found or find() or quantize(params)


def load_quantized(name: str, directory: Path, hparams: dict[str, int]) -> dict:
    """`store.models.load_params` with int8 weights.

    A checkpoint that was not converted becomes int8 without float32 weights if the disk has no room for both. Raises
    what `load_params` does.
    """
    shapes = param_shapes(hparams)
    if weight_files(directory):
        return map_quantized(directory, load_params(name, directory, hparams))
    params = map_leaves(lambda path, shape: Lazy(shape, lambda: None), shapes)
    n_bytes = 4 * count_params(shapes)
    n_quantized = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in to_tensors(params).values())
    data, home = directory / checkpoint.CHECKPOINT_DATA, homes_of(directory)[-1]
    n_missing = n_bytes - (data.stat().st_size if data.is_file() else 0)
    is_there = any(checkpoint.is_current(home / INT8_WEIGHTS, directory) for home in homes_of(directory))
    if not is_there and shutil.disk_usage(home).free >= n_missing + n_bytes + n_quantized:
        return map_quantized(directory, load_params(name, directory, hparams))
    if not is_there:
        print(f"{directory}: only int8 weights are made, as the disk has no room for float32 ones", file=sys.stderr)
    conversion = checkpoint.Conversion(INT8_WEIGHTS, n_quantized, "engine.int8")
    path = checkpoint.find_weights(directory, n_bytes, name in RELEASED, conversion)
    try:
        return from_tensors(params, map_tensors(path)[0])
    except KeyError as error:
        raise ValueError(f"{path} does not fit hparams.json: {error} is missing; get both again") from error


def convert(target: Path) -> None:
    """Write the checkpoint in the current directory as int8 weights to `target`: the work of a process of its own."""
    params, metadata = checkpoint.read_checkpoint()
    write_tensors(target, to_tensors(params), metadata)


if __name__ == "__main__":
    checkpoint.child(convert)

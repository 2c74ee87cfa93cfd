"""The safetensors file format: map tensors from a file without a copy, and write them so that they map well.

The metadata of a file that is written here have its own SHA-256, by which `verify` finds every bit that has changed.
"""

import contextlib
import hashlib
import json
import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from store.files import open_regular, replacing
from store.tables import reject_duplicate_keys

WEIGHTS = "model.safetensors"
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # NumPy has none: the field holds the upper half of a float32
DTYPES = {  # by safetensors' names
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16, "I64": "<i8", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
DTYPE_NAMES = {"<f4": "F32", "|i1": "I8"}  # of the types that are written here
FLOAT32 = np.dtype(np.float32)
HUGE_PAGE = 2**21  # bytes
LONGEST_HEADER = 2**25  # bytes; of the 10,000 layers that are allowed it takes 15 MB
DIGEST, NO_DIGEST = "sha256", "0" * 64  # the second stands in the place of the first while the file is hashed


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made each time it is needed, by `numpy.asarray`: so one after another fits into memory."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    source: np.ndarray | None = None  # the array that it is made of, if there is one
    dtype: np.dtype = FLOAT32

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.make()


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file, read-only on the file's own pages, and its metadata; ValueError, OSError."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            if pages[:23] == b"version https://git-lfs":
                raise FileNotFoundError(f"{path} is only git's note of the file: git lfs pull")
            if LONGEST_HEADER < int.from_bytes(pages[:8], "little") < len(pages):
                raise ValueError("its header is too long")
            with safe_open(path, framework="numpy"):
                pass  # it checks the header, and that the tensors fill the file exactly; reading with it would copy
        start = 8 + int.from_bytes(pages[:8], "little")
        header = json.loads(pages[8:start], object_pairs_hook=reject_duplicate_keys)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: view_tensor(pages, start, name, **tensor) for name, tensor in header.items()}
    except (SafetensorError, ValueError, TypeError) as error:  # TypeError: the library takes a list for an object
        reason = repr(str(error))[1:-1]  # in one line, whatever names the file has
        raise ValueError(f"{path} cannot be used ({reason}): delete it, and make or get it again") from error
    with contextlib.suppress(AttributeError, OSError):  # not all systems and kernels have huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return tensors, metadata


def view_tensor(
    pages: mmap.mmap, start: int, name: str, dtype: str, shape: list[int], data_offsets: list[int], **_: object
) -> np.ndarray:
    """One tensor of a safetensors file whose data begin at `start`; ValueError or TypeError if it cannot be used."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} has the type {dtype}, not one of {', '.join(DTYPES)}")
    if not name.isprintable():
        raise ValueError(f"{name} is no name of a tensor")
    array = np.frombuffer(pages, DTYPES[dtype], math.prod(shape), start + data_offsets[0]).reshape(shape)
    array = np.require(array, requirements="A")  # a copy, should a foreign file not be aligned to 4 bytes
    array.flags.writeable = False
    return array


def write_tensors(path: Path, tensors: dict[str, np.ndarray | Lazy], metadata: dict[str, str]) -> None:
    """Fill an empty file, such as `replacing` makes, with float32 and int8 tensors in the safetensors format.

    Unlike the library's, the data begin on a page and can be mapped as huge pages: a token then takes 7% less time.
    """
    others = {name: text for name, text in metadata.items() if name != DIGEST}
    header, n_bytes = {"__metadata__": {DIGEST: NO_DIGEST, **others}}, 0
    for name, tensor in tensors.items():
        offsets = [n_bytes, n_bytes := n_bytes + math.prod(tensor.shape) * tensor.dtype.itemsize]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype.str], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    head = len(text).to_bytes(8, "little") + text
    hashed = hashlib.sha256()
    # Not "wb": a file that was swept away must not come back. The thread hashes while this one writes.
    with open(path, "rb+", buffering=HUGE_PAGE) as file, ThreadPoolExecutor(1) as thread:
        for part in (head, *tensors.values()):
            if part is not head:
                part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            hashing = thread.submit(hashed.update, part)
            while len(part):
                n_room = HUGE_PAGE - file.tell() % HUGE_PAGE
                file.write(part[:n_room])
                part = part[n_room:]
            hashing.result()
        file.seek(head.index(NO_DIGEST.encode()))
        file.write(hashed.hexdigest().encode())


def save_tensors(path: Path, tensors: dict[str, np.ndarray | Lazy], metadata: dict[str, str]) -> None:
    """`write_tensors` to a file that appears whole or not at all; OSError, with its name, if that fails."""
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, tensors, metadata)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def verify(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`map_tensors` of a file whose every byte is as `write_tensors` has written it; else ValueError."""
    tensors, metadata = map_tensors(path)
    if len(written := metadata.get(DIGEST, "")) != len(NO_DIGEST):
        raise ValueError(f"{path} cannot be verified: it has no digest, as files that were written here have")
    hashed = hashlib.sha256()
    with open_regular(path) as file:
        n_header = file.read(8)
        header = file.read(int.from_bytes(n_header, "little"))
        hashed.update(n_header + header.replace(written.encode(), NO_DIGEST.encode(), 1))
        while chunk := file.read(HUGE_PAGE):
            hashed.update(chunk)
    if hashed.hexdigest() != written:
        problem = "its bytes are not those that were written"
        raise ValueError(f"{path} is damaged: {problem}; delete it, and make or get it again")
    return tensors, metadata

"""The safetensors format: map tensors from a file without a copy, and write files that map well."""

import contextlib
import json
import math
import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from store.files import digest, open_regular, replacing
from store.tables import reject_duplicate_keys

WEIGHTS = "model.safetensors"
BFLOAT16 = np.dtype([("bfloat16", "<u2")])  # NumPy has no bfloat16: the field holds the upper half of a float32
DTYPES: dict[str, np.dtype | str] = {  # NumPy's types by safetensors' names
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16, "I64": "<i8", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
DTYPE_NAMES = {"<f4": "F32", "|i1": "I8"}  # the types that are written here
FLOAT32 = np.dtype(np.float32)
HUGE_PAGE = 2**21  # bytes
MAX_HEADER_BYTES = 2**25  # 10,000 layers, the most that are allowed, take 15 MB
DIGEST, NO_DIGEST = "sha256", "0" * 64  # NO_DIGEST stands for the digest while the file is hashed


@dataclass(frozen=True)
class Lazy:
    """A tensor that `numpy.asarray` makes each time, so that a model can be converted one tensor at a time."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    source: np.ndarray | None = None  # the array that it is made from, if there is one
    dtype: np.dtype = FLOAT32

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.make()


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file, read-only and memory-mapped, and its metadata; or ValueError, OSError."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if pages[:23] == b"version https://git-lfs":
                raise FileNotFoundError(f"{path} has not been downloaded yet: git lfs pull")
            if MAX_HEADER_BYTES < int.from_bytes(pages[:8], "little") < len(pages):
                raise ValueError("its header is too long")
            with safe_open(path, framework="numpy"):
                pass  # this checks the header, and that the tensors fill the file exactly; reading would copy them
        start = 8 + int.from_bytes(pages[:8], "little")
        header = json.loads(pages[8:start], object_pairs_hook=reject_duplicate_keys)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {}
        for name, tensor in header.items():
            dtype, shape, (offset, _) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
            if dtype not in DTYPES:
                raise ValueError(f"{name} has the type {dtype}, not one of {', '.join(DTYPES)}")
            if not name.isprintable():
                raise ValueError(f"{name} is not a valid name of a tensor")
            array = np.frombuffer(pages, DTYPES[dtype], math.prod(shape), start + offset).reshape(shape)
            tensors[name] = np.require(array, requirements="A")  # a copy if it is not aligned, as in some foreign files
            tensors[name].flags.writeable = False
    except (SafetensorError, ValueError, TypeError) as error:  # TypeError: the library accepts a list as an object
        reason = repr(str(error))[1:-1]  # on one line, whatever names are in the file
        raise ValueError(f"{path} cannot be used ({reason}): delete it, and make or download it again") from error
    with contextlib.suppress(AttributeError, OSError):  # not every system and kernel has huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray | Lazy], metadata: dict[str, str]) -> None:
    """Write float32 and int8 tensors to the empty file `path`, and the SHA-256 of everything to its metadata."""
    others, n_bytes = {name: text for name, text in metadata.items() if name != DIGEST}, 0
    header: dict[str, dict] = {"__metadata__": {DIGEST: NO_DIGEST, **others}}
    for name, tensor in tensors.items():
        offsets = [n_bytes, n_bytes := n_bytes + math.prod(tensor.shape) * tensor.dtype.itemsize]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype.str], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)  # data that begin on a page can use huge pages: 7% less time per token
    head, hashed = len(text).to_bytes(8, "little") + text, sha256()
    # "rb+" and not "wb": if another process has removed the file as a leftover, it must not be created again.
    with open(path, "rb+", buffering=HUGE_PAGE) as file, ThreadPoolExecutor(1) as thread:
        for part in (np.frombuffer(head, np.uint8), *tensors.values()):
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            hashing = thread.submit(hashed.update, data.data)  # while this thread writes
            for piece in np.split(data, range(HUGE_PAGE - file.tell() % HUGE_PAGE, len(data), HUGE_PAGE)):
                file.write(piece.data)
            hashing.result()
        file.seek(head.index(NO_DIGEST.encode()))
        file.write(hashed.hexdigest().encode())


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray | Lazy], metadata: dict[str, str]) -> None:
    """`write_tensors` to a file that appears complete or not at all; OSError, which names it, if that fails."""
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, tensors, metadata)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def map_verified(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`map_tensors`, and ValueError if any bit has changed since `write_tensors` wrote the file."""
    tensors, metadata = map_tensors(path)
    if len(written := metadata.get(DIGEST, "")) != len(NO_DIGEST):
        raise ValueError(f"{path} cannot be verified: it has no SHA-256, because another program wrote it")
    if digest(path, blank=written.encode()).hex() != written:
        raise ValueError(f"{path} is damaged: its bytes are not those that were written; delete it, and get it again")
    return tensors, metadata

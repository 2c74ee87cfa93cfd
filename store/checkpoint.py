"""The released models: download missing files, and convert TensorFlow's checkpoint to `model.safetensors` once."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from store.files import MAX_TABLE_BYTES, derived_file_directories, digest, digests, locked, remove_leftovers, replacing
from store.params import check_tensors, checkpoint_name, flatten, map_leaves, param_shapes, tensors_of
from store.tables import read_hparams, read_merges, read_vocabulary
from store.tensors import WEIGHTS, Lazy, map_tensors, write_tensors

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # GPT2_BASE_URL in the environment names a mirror
CHECKPOINT_INDEX, CHECKPOINT_DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"  # the checksums; the tensors
CHECKPOINT_FILES = ("checkpoint", CHECKPOINT_INDEX, "model.ckpt.meta", CHECKPOINT_DATA)
READERS = {"encoder.json": read_vocabulary, "vocab.bpe": read_merges, "hparams.json": read_hparams}
RELEASED_TABLES = {  # length and SHA-256, the same for all four sizes
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
BUNDLED = 'The bundled model needs no network: python gpt2.py "ROMEO:" --model_size shakespeare'
DAMAGED = f"{CHECKPOINT_INDEX} or {CHECKPOINT_DATA} is damaged: get both again"  # a tensor does not match its checksum


def fetch(directory: Path, files: Sequence[str], n_data_bytes: int = 0, lock: Callable = locked) -> None:
    """Download the `files` that a released model lacks, and weights whose length is not `n_data_bytes`; or OSError."""

    def is_missing(path: Path) -> bool:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory, where a file belongs: remove it")
        return not path.is_file() or (path.name == CHECKPOINT_DATA and path.stat().st_size != n_data_bytes)

    missing = [path for path in map(directory.joinpath, files) if is_missing(path)]
    if not missing:
        return
    if is_offline():
        raise FileNotFoundError(f"{missing[0]} is missing or incomplete; this run is offline. {BUNDLED}")
    with lock(directory):
        from store.download import download  # imported late: it takes 0.1 s, and most runs have every file

        for path in filter(is_missing, missing):  # another process may have downloaded them by now
            n_bytes = n_data_bytes if path.name == CHECKPOINT_DATA else 0
            if n_bytes:
                print(f"{directory}: downloading {n_bytes / 1e6:,.0f} MB of weights ...", file=sys.stderr)
            try:
                download(f"{base_url()}/{directory.name}/{path.name}", path, n_bytes, find_problem)
            except OSError as error:
                hint = f" The length follows from {directory / 'hparams.json'}: if that is damaged, delete it."
                raise OSError(f"{error}.{hint if 'are expected' in str(error) else ''} {BUNDLED}") from error


def base_url() -> str:
    return (os.environ.get("GPT2_BASE_URL", "").strip() or BASE_URL).rstrip("/")


def is_offline() -> bool:
    return os.environ.get("GPT2_OFFLINE", "").lower() not in ("", "0", "false", "no", "off")


def find_problem(part: Path) -> str | None:
    """What is wrong with a complete download, which is still called `name.part`; None if nothing is."""
    name = part.stem
    n_bytes, sha256 = RELEASED_TABLES.get(name, (0, ""))
    # A mirror may have its own tables, but not others of the released length.
    if sha256 and (base_url() == BASE_URL or part.stat().st_size == n_bytes) and digest(part).hex() != sha256:
        return "its SHA-256 is not that of the released file"
    with contextlib.suppress(ValueError):
        if name in READERS:
            READERS[name](part)
        return None
    return f"it cannot be read as {name}"


def find_weights(
    directory: Path, n_bytes: int, released: bool, file: str = WEIGHTS, n_made: int = 0, module: str = __name__
) -> Path:
    """The path of `file`, which `module` makes from the checkpoint in `directory` if it is missing or out of date.

    The checkpoint's data have `n_bytes`, and `file` gets `n_made`, by default as many. If `directory` is read-only,
    `file` is in the user's cache. Raises ValueError for a damaged checkpoint, OSError, or ImportError (TensorFlow).
    """
    for home in derived_file_directories(directory):
        weights = home / file
        if is_current(weights, directory):
            return weights
    if not released:
        check_checkpoint(directory, n_bytes)
    if importlib.util.find_spec("tensorflow") is None:
        advice = f"pip install tensorflow, or copy {WEIGHTS} from a machine that has converted it"
        raise ImportError(f"TensorFlow is needed once, to convert the checkpoint in {directory}: {advice}")
    with locked(weights.parent):
        if is_current(weights, directory):  # another process may have made it by now
            return weights
        remove_leftovers(weights)
        parts = directory.glob(f"{CHECKPOINT_DATA}*")  # the data, or what an interrupted download has left of them
        n_missing = max(0, n_bytes - sum(path.stat().st_size for path in parts if path.is_file()))
        needed, free = n_missing + (n_made or n_bytes), shutil.disk_usage(weights.parent).free
        if free < needed:
            advice = "make room, or change --models_dir"
            raise OSError(f"{weights} needs {needed:,} bytes, but there are only {free:,} free: {advice}")
        convert_checkpoint(directory, weights, n_bytes, released, module)
    return weights


def is_current(weights: Path, directory: Path) -> bool:
    """Whether `weights` exist and fit the checkpoint in `directory`, if it has one; ValueError if that is unclear."""
    if weights.is_dir():
        raise IsADirectoryError(f"{weights} is a directory, where a file belongs: remove it")
    index = directory / CHECKPOINT_INDEX
    if not weights.is_file() or not index.is_file():  # without an index, weights in the cache may be of another model
        return weights.is_file() and weights.parent == directory
    made_from = map_tensors(weights)[1].get(CHECKPOINT_INDEX)
    if made_from is None and weights.stat().st_mtime < index.stat().st_mtime:
        raise ValueError(f"{weights} is older than {index} and may be from another checkpoint: delete one of the two")
    return made_from in (None, digest(index, max_bytes=MAX_TABLE_BYTES).hex())  # the index has all checksums


def check_checkpoint(directory: Path, n_bytes: int) -> None:
    """Raise OSError or ValueError unless the checkpoint in `directory` is readable and its data have `n_bytes`."""
    data = directory / CHECKPOINT_DATA
    for path in (data, directory / CHECKPOINT_INDEX):
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no weights, neither {WEIGHTS} nor {path.name}: get one of them")
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{path} cannot be read: Permission denied")
    if (size := data.stat().st_size) != n_bytes:
        raise ValueError(f"{data} has {size:,} bytes, where hparams.json implies {n_bytes:,}: get both files again")


def convert_checkpoint(directory: Path, weights: Path, n_bytes: int, released: bool, module: str) -> None:
    """Let `module` convert the checkpoint. A released one is downloaded first, and once more if it is damaged."""
    for can_retry in (released and not is_offline() and weights.parent == directory, False):
        if released:
            fetch(directory, CHECKPOINT_FILES, n_bytes, lock=contextlib.nullcontext)
        print(f"{directory}: converting the checkpoint to {weights} ...", file=sys.stderr)
        try:
            with replacing(weights) as temporary:
                run_child(module, directory, temporary, "converted")
            break
        except ValueError as error:
            if DAMAGED not in str(error) or not can_retry:
                raise
            print(f"{error}: they are removed and downloaded once more", file=sys.stderr)
            for file in (CHECKPOINT_INDEX, CHECKPOINT_DATA):
                (directory / file).unlink()
    print(f"{directory}: done; deleting checkpoint, model.ckpt.* would free {n_bytes / 1e6:,.0f} MB", file=sys.stderr)


def run_child(module: str, directory: Path, file: Path, purpose: str) -> None:
    """Run a module, which calls `child`, in a process that ends with this one; ValueError if it fails."""
    command = [sys.executable, "-m", module, *map(os.path.abspath, (directory, file)), purpose]
    read_end, write_end = os.pipe()  # when this process ends, write_end closes; the child notices that, and ends
    with open(read_end, "rb") as pipe, open(write_end, "wb"):
        done = subprocess.run(command, stdin=pipe, cwd=Path(__file__).parents[1], capture_output=True, errors="replace")
    if done.returncode:
        reason = done.stdout.strip() or f"status {done.returncode}, {done.stderr.strip()[-200:]}"
        raise ValueError(f"{directory}: the checkpoint could not be {purpose}: {reason}")


def child(work: Callable[[Path], None]) -> None:
    """Do the `work` of a process that `run_child` started. Prints the reason if it fails."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    directory, file = map(Path, sys.argv[1:3])
    os.chdir(directory)  # TensorFlow would take [ and * in a path for a pattern
    try:
        work(file)
    except Exception as error:  # TensorFlow raises many kinds
        is_damaged = type(error).__name__ in ("OpError", "DataLossError")  # from TensorFlow's reader
        print(" ".join(str(error).split()) + f"; {DAMAGED}" * is_damaged)  # standard error has TensorFlow's log
        sys.exit(1)


def read_checkpoint() -> tuple[dict, dict[str, str]]:
    """The parameters, all `Lazy`, of the checkpoint in the current directory; the metadata for a file made of them."""
    from tensorflow.compat.v1.train import NewCheckpointReader

    metadata = {"format": "pt", **digests(Path(), (CHECKPOINT_INDEX, *READERS))}
    reader = NewCheckpointReader(Path(CHECKPOINT_INDEX).stem)
    found, shapes = reader.get_variable_to_shape_map(), param_shapes(read_hparams(Path("hparams.json")))
    # c_attn, c_fc and c_proj are stored as convolutions of width 1: [1, n_in, n_out]
    squeezed = {name: shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for name, shape in found.items()}
    check_tensors(Path(CHECKPOINT_INDEX), squeezed, flatten(shapes, checkpoint_name), "hparams.json")

    def read(name: str, shape: tuple) -> np.ndarray:
        tensor = reader.get_tensor(name)  # TensorFlow compares its checksum
        if tensor.dtype != np.float32:
            raise ValueError(f"{name} has the type {tensor.dtype}, not float32")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are infinite or NaN")
        return tensor.reshape(shape)

    return map_leaves(lambda path, shape: Lazy(shape, lambda: read(checkpoint_name(path), shape)), shapes), metadata


def convert(target: Path) -> None:
    """Write the checkpoint in the current directory to `target`. This is the work of a separate process."""
    params, metadata = read_checkpoint()
    write_tensors(target, tensors_of(params), metadata)


def compare(weights: Path) -> None:
    """Raise ValueError unless `weights` equal those of the checkpoint in the current directory."""
    found = map_tensors(weights)[0]
    for name, tensor in tensors_of(read_checkpoint()[0]).items():
        if not np.array_equal(np.asarray(tensor), found[name]):  # array_equal would hide errors that asarray raises
            raise ValueError(f"{weights}: {name} is not that of the checkpoint")


if __name__ == "__main__":
    child(compare if sys.argv[3] == "compared" else convert)

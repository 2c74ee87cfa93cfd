"""The released models: download what a directory lacks, and convert its checkpoint to `model.safetensors`.

A checkpoint is TensorFlow's: `model.ckpt.data-00000-of-00001` has the tensors, `model.ckpt.index` their names, places
and checksums. It is converted, one tensor after another, in a process of its own: python -m store.checkpoint DIRECTORY
TARGET, or to int8 weights python -m engine.int8 DIRECTORY TARGET.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from store.files import MOST_BYTES, digest, digests, homes_of, locked, replacing, sweep
from store.params import check_tensors, checkpoint_name, flatten, map_leaves, param_shapes, tensors_of
from store.tables import MOST_BYTES_OF_SETTINGS, read_hparams, read_merges, read_vocabulary
from store.tensors import WEIGHTS, Lazy, map_tensors, write_tensors

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"  # GPT2_BASE_URL in the environment names a mirror
CHECKPOINT_INDEX, CHECKPOINT_DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
CHECKPOINT_FILES = ("checkpoint", CHECKPOINT_INDEX, "model.ckpt.meta", CHECKPOINT_DATA)
READERS = {"encoder.json": read_vocabulary, "vocab.bpe": read_merges, "hparams.json": read_hparams}
TABLES = {  # of all four sizes: length and SHA-256
    "encoder.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "vocab.bpe": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
BUNDLED = 'The bundled model needs no network: python gpt2.py "ROMEO:" --model_size shakespeare'
DAMAGED = 3  # the exit status of a conversion that found checksums wrong


class Conversion(NamedTuple):
    """What a checkpoint is converted to: the name and length of the file, and the module whose process makes it."""

    file: str
    n_bytes: int
    module: str = "store.checkpoint"


class DamagedCheckpointError(ValueError):
    """The bytes of a checkpoint are not those that were written: downloading it again may help."""


def fetch(directory: Path, files: Sequence[str], n_data_bytes: int | None = None, n_made: int = 0) -> None:
    """Download those of `files` that a released model's directory lacks, and weights of a wrong length; or OSError.

    `n_made` is the length of what will be made of the weights, which must have room, too.
    """

    def is_missing(file: str) -> bool:
        path = directory / file
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory, where a file belongs: remove it")
        return not path.is_file() or (file == CHECKPOINT_DATA and path.stat().st_size != n_data_bytes)

    missing = [file for file in files if is_missing(file)]
    if missing and is_offline():
        raise FileNotFoundError(f"{directory / missing[0]} is not there whole, and this run is offline. {BUNDLED}")
    if missing:
        with locked(directory):
            for file in filter(is_missing, files):  # by now another process may have fetched them
                fetch_file(directory, file, n_data_bytes, n_made)


def fetch_file(directory: Path, file: str, n_data_bytes: int | None, n_made: int) -> None:
    """Download one file of a released model, for the process that has the lock."""
    from store.download import download, part_of, size  # imported late: it takes 0.1 s, and most runs have every file

    path, url = directory / file, f"{base_url()}/{directory.name}/{file}"
    n_bytes = n_data_bytes if file == CHECKPOINT_DATA else None
    most = MOST_BYTES_OF_SETTINGS if file == "hparams.json" else MOST_BYTES
    if n_bytes:
        check_space(directory, n_bytes + n_made - size(part_of(path)), "the weights and their conversion")
        print(f"{directory}: downloading {n_bytes / 1e6:,.0f} MB of weights ...", file=sys.stderr)
    try:
        download(url, path, n_bytes, lambda part: check_file(file, part), most)
    except OSError as error:
        hint = f" The length follows from {directory / 'hparams.json'}: if that is damaged, delete it."
        raise OSError(f"{error}.{hint if 'are expected' in str(error) else ''} {BUNDLED}") from error


def base_url() -> str:
    return (os.environ.get("GPT2_BASE_URL", "").strip() or BASE_URL).rstrip("/")


def is_offline() -> bool:
    return os.environ.get("GPT2_OFFLINE", "").lower() not in ("", "0", "false", "no", "off")


def check_file(name: str, path: Path) -> None:
    """Raise ValueError unless the file at `path` can be a released model's `name`."""
    n_bytes, sha256 = TABLES.get(name, (None, None))
    # A mirror may have tables of its own, but not others of the same length.
    is_released = base_url() == BASE_URL or path.stat().st_size == n_bytes
    if sha256 and is_released and digest(path, "sha256").hex() != sha256:
        raise ValueError("its SHA-256 is not that of the released one")
    try:
        if name in READERS:
            READERS[name](path)
    except ValueError as error:
        raise ValueError(f"it is no {name} that can be read") from error


def check_space(directory: Path, n_bytes: int, purpose: str) -> None:
    if (free := shutil.disk_usage(directory).free) < n_bytes:
        advice = "make room, or give --models_dir on another one"
        raise OSError(f"{directory}: {purpose} need {n_bytes:,} bytes, and this disk has {free:,} free; {advice}")


def find_weights(directory: Path, n_bytes: int, released: bool, conversion: Conversion | None = None) -> Path:
    """The path of the converted checkpoint, made if it is not there or was made of another one than `directory` has.

    A released model's checkpoint, of `n_bytes`, is downloaded. If `directory` cannot be written, the file goes to the
    user's cache. Raises ValueError for a damaged checkpoint, OSError, ImportError without TensorFlow.
    """
    conversion = conversion or Conversion(WEIGHTS, n_bytes)
    for home in homes_of(directory):
        weights = home / conversion.file
        if is_current(weights, directory):
            return weights
    if not released:
        check_checkpoint(directory, n_bytes)
    check_tensorflow(directory)
    if released:
        fetch(directory, CHECKPOINT_FILES, n_bytes, conversion.n_bytes)
    with locked(weights.parent):
        if is_current(weights, directory):  # by now another process may have made it
            return weights
        try:
            convert_checkpoint(directory, weights, n_bytes, conversion)
        except DamagedCheckpointError as error:
            if not released or is_offline() or weights.parent != directory:
                raise
            print(f"{error}: they are removed, and downloaded once more", file=sys.stderr)
            for file in (CHECKPOINT_INDEX, CHECKPOINT_DATA):
                (directory / file).unlink()
                fetch_file(directory, file, n_bytes, conversion.n_bytes)
            convert_checkpoint(directory, weights, n_bytes, conversion)
    return weights


def check_tensorflow(directory: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        install = f"pip install tensorflow, or copy {WEIGHTS} from where it was converted"
        raise ImportError(f"TensorFlow is needed once, to convert the checkpoint in {directory}: {install}")


def is_current(weights: Path, directory: Path) -> bool:
    """Whether `weights` are there, and are made of the checkpoint in `directory` if it still has one.

    Raises ValueError if they do not say of which checkpoint they are made, and are older than that one.
    """
    index = directory / CHECKPOINT_INDEX
    if not weights.is_file():
        return False
    if not index.is_file():
        return weights.parent == directory  # in the cache they may be those of an earlier directory of this name
    made_of = map_tensors(weights)[1].get(CHECKPOINT_INDEX)
    if made_of is None and weights.stat().st_mtime < index.stat().st_mtime:
        raise ValueError(f"{weights} is older than {index} and may be of another checkpoint: delete one of the two")
    return made_of in (None, identify(index))


def identify(index: Path) -> str:
    """What tells one checkpoint from another: the index has the checksums of all tensors."""
    return digest(index, most=MOST_BYTES).hex()


def check_checkpoint(directory: Path, n_bytes: int) -> None:
    """Raise OSError or ValueError unless the checkpoint in `directory` is there and its data are `n_bytes` long."""
    data = directory / CHECKPOINT_DATA
    for path in (data, directory / CHECKPOINT_INDEX):
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no weights, neither {WEIGHTS} nor {path.name}: get one of them")
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{path} cannot be read: Permission denied")
    if data.stat().st_size != n_bytes:
        sizes = f"{data.stat().st_size:,} bytes, where hparams.json implies {n_bytes:,}"
        raise ValueError(f"{data} is damaged, or of another model: it has {sizes}; get it again")


def convert_checkpoint(directory: Path, weights: Path, n_bytes: int, conversion: Conversion) -> None:
    """Write the checkpoint in `directory` to `weights`, with a note of which one it was."""
    check_checkpoint(directory, n_bytes)
    if weights.is_dir():
        raise IsADirectoryError(f"{weights} is a directory, where a file belongs: remove it")
    sweep(weights)
    check_space(weights.parent, conversion.n_bytes, f"the weights, converted to {conversion.file},")
    print(f"{directory}: converting the checkpoint to {weights} ...", file=sys.stderr)
    with replacing(weights) as temporary:
        run_child(conversion.module, directory, temporary, "converted")
    freed = sum(path.stat().st_size for path in map(directory.joinpath, CHECKPOINT_FILES) if path.is_file())
    print(f"{directory}: done; deleting checkpoint, model.ckpt.* would free {freed / 1e6:,.0f} MB", file=sys.stderr)


def run_child(module: str, directory: Path, file: Path, purpose: str) -> None:
    """Run `module`, which calls `child`, in a process that ends when this one does; ValueError if it fails."""
    command = [sys.executable, "-m", module, *map(os.path.abspath, (directory, file))]
    ours, theirs = (os.fdopen(fd, mode) for fd, mode in zip(reversed(os.pipe()), ("wb", "rb"), strict=True))
    with ours, theirs:  # the child waits for the end of its standard input, which comes with that of this process
        options = {"capture_output": True, "text": True, "errors": "replace", "stdin": theirs}
        done = subprocess.run(command, **options, cwd=Path(__file__).parents[1])
    if done.returncode:
        reason = done.stdout.strip() or f"status {done.returncode}, {done.stderr.strip()[-200:]}"
        kind = DamagedCheckpointError if done.returncode == DAMAGED else ValueError
        raise kind(f"{directory}: the checkpoint could not be {purpose}: {reason}")


def child(work: Callable[[Path], None]) -> None:
    """Do the `work` of a process of `run_child`, with the paths in its arguments; it prints why it fails."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    directory, file = map(Path, sys.argv[1:])
    os.chdir(directory)  # TensorFlow would take [ and * in a path for a pattern
    try:
        work(file)
    except Exception as error:  # TensorFlow has many kinds
        is_damaged = type(error).__name__ in ("OpError", "DataLossError")  # from TensorFlow's reader
        hint = f"; {CHECKPOINT_INDEX} or {CHECKPOINT_DATA} is damaged: get both again" if is_damaged else ""
        print(" ".join(str(error).split()) + hint)  # not to standard error, where TensorFlow's log is
        sys.exit(DAMAGED if is_damaged else 1)


def read_checkpoint() -> tuple[dict, dict[str, str]]:
    """The parameters, each `Lazy`, of the checkpoint in the current directory; the metadata of what is made of it."""
    from tensorflow.compat.v1.train import NewCheckpointReader

    index = Path(CHECKPOINT_INDEX)
    metadata = {"format": "pt", **digests(Path(), (CHECKPOINT_INDEX, *READERS))}
    reader = NewCheckpointReader(index.stem)
    shapes = param_shapes(read_hparams(Path("hparams.json")))
    found, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    # There c_attn, c_fc and c_proj are convolutions of width 1: [1, n_in, n_out].
    squeezed = {name: shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for name, shape in found.items()}
    check_tensors(index, squeezed, flatten(shapes, checkpoint_name), "hparams.json")

    def read(name: str, shape: tuple) -> np.ndarray:
        tensor = reader.get_tensor(name)  # TensorFlow compares its checksum
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are infinite or NaN")
        return tensor.reshape(shape)

    def find(path: tuple, shape: tuple) -> Lazy:
        name = checkpoint_name(path)
        if types[name].as_numpy_dtype != np.float32:
            raise ValueError(f"{name} has the type {types[name].name}, not float32")
        return Lazy(shape, lambda: read(name, shape))

    return map_leaves(find, shapes), metadata


def convert(target: Path) -> None:
    """Write the checkpoint in the current directory to `target`: the work of a process of its own."""
    params, metadata = read_checkpoint()
    write_tensors(target, tensors_of(params), metadata)


if __name__ == "__main__":
    child(convert)

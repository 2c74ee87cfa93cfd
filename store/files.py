"""Files are written where the user may write, by one process at a time, and are visible only when complete."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`. When the block ends it takes that name; if the block raises, it is removed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, once its bytes are on the disk: a crash must not leave the name without them."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sweep(path: Path) -> None:
    """Remove what killed processes left of `replacing(path)`. No other process may be writing `path` now."""
    for temporary in path.parent.glob(f"{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a model directory, made if it is missing; wait while another process has the lock. OSError if that fails."""
    from filelock import FileLock, Timeout  # imported late: a run that finds all it needs does not lock

    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: remove it")
    lock = FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print(f"{directory}: waiting for another process that downloads or converts it ...", file=sys.stderr)
            held = lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{directory} cannot be written ({reason}): a file of the model is to be made there") from error
    with held:
        yield


def homes_of(directory: Path) -> list[Path]:
    """Where files made from a model may be: in its directory and, if that is read-only, in the user's cache."""
    if os.access(directory, os.W_OK) or not directory.exists():
        return [directory]
    from platformdirs import user_cache_path

    name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    try:
        cache = user_cache_path("gpt2-numpy", appauthor=False)
    except RuntimeError:  # this user has no home directory
        return [directory]
    return [directory, cache / name] if cache.is_absolute() else [directory]


def digest(path: Path, algorithm: str) -> bytes:
    """The hash of a file, which may be larger than the memory."""
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(2**16):
            hashed.update(chunk)
    return hashed.digest()

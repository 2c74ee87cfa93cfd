"""Writing files so that nothing half-done is ever visible, by one process at a time, where it may write."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`: it takes that name, complete, when the block ends, or is removed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # of any new file; some libraries write theirs for its owner alone
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, once its bytes are on the disk: the name must not be there before them."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sweep(path: Path) -> None:
    """Remove what processes that were killed have left of `replacing(path)`; no other may be at it now."""
    for temporary in path.parent.glob(f"{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Have a model directory, made if need be, for this process alone; wait while another one has it.

    The system takes the lock from a process that ends, however it ends. OSError if `directory` cannot be written.
    """
    from filelock import FileLock, Timeout  # late: a run that finds all it needs does not lock

    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: remove it")
    lock = FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{directory}: waiting for another process that downloads or converts it ...", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{directory} cannot be written ({reason}): a file of the model is to be made there") from error
    try:
        yield
    finally:
        lock.release()


def homes_of(directory: Path) -> list[Path]:
    """Where files that are made of a model may be: in its directory, or if that is read-only in the user's cache."""
    if os.access(directory, os.W_OK) or not directory.exists():
        return [directory]
    from platformdirs import user_cache_path

    name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    try:
        cache = user_cache_path("gpt2-numpy", appauthor=False)
    except RuntimeError:  # this user has no home directory
        return [directory]
    return [directory, cache / name] if cache.is_absolute() else [directory]

"""Read only regular files. Write files and directories that appear complete or not at all, even after a power cut."""

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # without it, opening a pipe waits for its other end
MAX_TABLE_BYTES = 2**25  # the largest byte-level BPE vocabularies, with 250,000 tokens, take half of that
LOCK, HOLDER = ".lock", ".lock.holder"  # in a directory that is being written; HOLDER names the process that writes


@contextlib.contextmanager
def open_regular(path: Path, max_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading. OSError, which names the file, if it is a pipe, a device or longer than `max_bytes`."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is not a file")
            if max_bytes is not None and status.st_size > max_bytes:
                raise OSError(f"it has {status.st_size:,} bytes, and at most {max_bytes:,} are allowed")
            yield file
    except OSError as error:
        if str(error).startswith(f"{path} "):
            raise
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise OSError(f"{path} cannot be read: not enough memory") from error


def no_follow(name: str, flags: int) -> int:
    """An `opener` that fails on a symbolic link, for file names that others can guess."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def temporary_of(path: Path, token: str = "") -> Path:
    """A hidden name beside `path` that nobody can guess. It is short, so `path` may have the longest possible name."""
    prefix = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{prefix}-{token or os.urandom(8).hex()}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left. No other process may be writing `path` now."""
    for temporary in path.parent.glob(temporary_of(path, "*").name):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`. It is renamed to `path` when the block ends, and removed if the block raises."""
    temporary, mode = temporary_of(path), 0o600 if path.exists() else 0o666
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))  # O_EXCL does not follow links
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete file to `path` when its bytes are on the disk. It gets the permissions of the old file."""
    sync(temporary)
    if path.is_file():
        shutil.copymode(path, temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, and wait until their names are on the disk."""
    for missing in [place for place in (path, *path.parents) if not place.is_dir()][::-1]:
        missing.mkdir(exist_ok=True)
        sync(missing.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def replacing_directory(directory: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new directory. It takes the place of `directory` when the block ends, and is removed if the block raises.

    It also gets the other files of `directory`, except those named in `replaced`.
    """

    def ignore(place: str, names: list[str]) -> set[str]:
        return shutil.ignore_patterns(".*.tmp", *(replaced if Path(place) == directory else ()))(place, names)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # not every file system has hard links
            shutil.copy2(source, target)

    directory = Path(os.path.realpath(directory))
    new = temporary_of(directory)
    try:
        make_directory(new)
        yield new
        if directory.is_dir():
            shutil.copytree(directory, new, symlinks=True, ignore=ignore, copy_function=link, dirs_exist_ok=True)
        for place, _, _ in os.walk(new, topdown=False):
            sync(Path(place))
        swap_directories(new, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after the swap, this is the old directory


def swap_directories(new: Path, old: Path) -> None:
    """Swap the names of two directories in one step if possible. If `old` does not exist, rename `new` to it."""
    with contextlib.suppress(TypeError, AttributeError):  # Windows, and C libraries without these functions
        libc = ctypes.CDLL(None)
        swap = libc.renameatx_np if sys.platform == "darwin" else libc.renameat2
        if swap(0, os.fsencode(new), 0, os.fsencode(old), 2) == 0:  # RENAME_SWAP, or on Linux RENAME_EXCHANGE
            return
    if old.is_dir():  # this file system cannot swap directories: move the files, the weights last
        for path in sorted(filter(Path.is_file, new.iterdir()), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, old / path.name)
        sync(old)
    else:
        os.rename(new, old)


@contextlib.contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Lock a directory while this process writes to it. A missing one is created, and removed if it stays empty.

    If another process has the lock, wait for it. `wait=False` is for a training, which takes hours: it does not wait,
    and nobody waits for it. Instead, an OSError names the process that has the lock.
    """
    from filelock import FileLock, Timeout  # imported late: a run that finds all its files needs no lock

    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: remove it")
    holder, timeout, is_new, is_locked = directory / HOLDER, 0, False, False
    try:
        while not is_locked:
            lock, is_new = FileLock(directory / LOCK), is_new or not directory.is_dir()
            make_directory(directory)
            try:
                lock.acquire(timeout)
                is_locked = (directory / LOCK).exists()  # not if the process that had the lock removed the directory
            except FileNotFoundError:  # the directory was removed: create it again
                continue
            except Timeout:
                who = holder.read_text("utf-8", "replace") if holder.is_file() else "another process"
                if not wait or holder.is_file():
                    raise BlockingIOError(f"{who} is writing it") from None
                print(f"{directory}: waiting for {who}, which is writing it ...", file=sys.stderr)
                timeout = -1
    except OSError as error:
        raise OSError(f"{directory} cannot be written ({error.strerror or error}): model files belong there") from error
    try:
        if not wait:
            write_text(holder, f"process {os.getpid()} ({os.path.basename(sys.argv[0])})")
        yield
    finally:
        holder.unlink(missing_ok=True)
        if is_new and list(directory.glob("*")) == [directory / LOCK]:
            shutil.rmtree(directory, ignore_errors=True)  # it stays if another process has just locked it again
        lock.release()


def derived_file_directories(directory: Path) -> list[Path]:
    """Where files made from a model may be: in its directory and, if that is read-only, also in the user's cache."""
    if os.access(directory, os.W_OK) or not directory.exists():
        return [directory]
    from platformdirs import user_cache_path

    name = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    with contextlib.suppress(RuntimeError):  # without a home directory, it raises or returns a relative path
        if (cache := user_cache_path("gpt2-numpy", appauthor=False)).is_absolute():
            return [directory, cache / name]
    return [directory]


def digest(path: Path, algorithm: str = "sha256", max_bytes: int | None = None, blank: bytes = b"") -> bytes:
    """The hash of a file of any size, as if "0"s stood in the place of the first `blank` in its first megabyte."""
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with open_regular(path, max_bytes) as file:
        hashed.update(file.read(2**20).replace(blank, b"0" * len(blank), 1))
        while chunk := file.read(2**20):
            hashed.update(chunk)
    return hashed.digest()


def digests(directory: Path, files: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each of `files`, which are small, that exists in `directory`."""
    paths = {name: directory / name for name in files}
    return {name: digest(path, max_bytes=MAX_TABLE_BYTES).hex() for name, path in paths.items() if path.is_file()}

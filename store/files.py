"""Files are read if they are files, written where the user may write, and visible only when they are complete.

What a write leaves after a power cut is the old or the new: bytes are on the disk before a name points to them.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # without it, opening a pipe waits for its other end
MOST_BYTES = 2**25  # of a table: the largest vocabularies of byte-level BPE, of 250,000 tokens, take half of that
LOCK, HOLDER = ".lock", ".lock.holder"  # in a directory that is being written; the second says by whom


@contextlib.contextmanager
def open_regular(path: Path, most: int | None = None) -> Iterator[BinaryIO]:
    """Open a file to read it. OSError, with its name, if it is a pipe or a device, or longer than `most` bytes.

    Errors while it is read get its name, too.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} cannot be read: it is not a file")
            if most is not None and status.st_size > most:
                raise OSError(f"{path} cannot be read: it has {status.st_size:,} bytes, and may have at most {most:,}")
            yield file
    except OSError as error:
        if error.errno is None and str(path) in str(error):
            raise
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise OSError(f"{path} cannot be read: not enough memory") from error


def no_follow(name: str, flags: int) -> int:
    """An `opener` for files with a name that others can guess: a symbolic link in their place is an error."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def prefix_of(path: Path) -> str:
    """How the temporary names of `path` begin. They are short, so that `path` can have the longest name."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"


def temporary_of(path: Path) -> Path:
    """A hidden name beside `path` that nobody can guess."""
    return path.with_name(f"{prefix_of(path)}{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`. When the block ends it takes that name; if the block raises, it is removed.

    It then has the permissions of the file that it replaces.
    """
    temporary, mode = temporary_of(path), 0o600 if path.exists() else 0o666
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))  # O_EXCL follows no link
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, once its bytes are on the disk: a crash must not leave the name without them."""
    sync(temporary)
    if path.is_file():
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    is_directory = path.is_dir()
    if is_directory and os.name == "nt":
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and those that it is in, where they are missing, and wait until their names are on the disk."""
    for missing in [place for place in (path, *path.parents) if not place.is_dir()][::-1]:
        missing.mkdir(exist_ok=True)
        sync(missing.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def replacing_directory(directory: Path, made: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new directory beside `directory`. When the block ends it takes that name, with all its files at once.

    `made` names the files of `directory` that go with the old one; all others are kept. If the block raises, or the
    process is killed, `directory` is what it was.
    """
    directory = Path(os.path.realpath(directory))
    new = temporary_of(directory)
    try:
        make_directory(directory.parent)
        new.mkdir()
        yield new
        if directory.is_dir():
            keep_others(directory, new, made)
        for place, _, _ in os.walk(new, topdown=False):
            sync(Path(place))
        exchange(new, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # the old one, if there was one


def keep_others(old: Path, new: Path, made: Collection[str]) -> None:
    """Give all that is in the directory `old`, but `made` and what killed processes left, a second name in `new`."""

    def ignore(place: str, names: list[str]) -> set[str]:
        left = {name for name in names if name.startswith(".") and name.endswith(".tmp")}
        return left.union(made) if Path(place) == old else left

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # not all file systems have links
            shutil.copy2(source, target)

    shutil.copytree(old, new, symlinks=True, ignore=ignore, copy_function=link, dirs_exist_ok=True)


def exchange(new: Path, old: Path) -> None:
    """Swap the names of two directories in one step; if `old` is not there, only give its name to `new`."""
    if not old.is_dir():
        os.rename(new, old)
        return
    try:
        libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(new), os.fsencode(old))
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
        code = ctypes.get_errno() if failed else 0
    except (TypeError, AttributeError):  # Windows, and C libraries without that function
        code = errno.ENOSYS
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # neither has every file system: then file by file
        for path in sorted(new.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            if path.is_file() and not ((old / path.name).exists() and (old / path.name).samefile(path)):
                os.replace(path, old / path.name)
        sync(old)
    elif code:
        raise OSError(code, os.strerror(code), str(old))


def sweep(path: Path) -> None:
    """Remove what killed processes left of `replacing(path)`. No other process may be writing `path` now."""
    for temporary in path.parent.glob(f"{prefix_of(path)}*.tmp"):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Lock a model directory, which is made if it is missing, for the process that writes it; OSError if that fails.

    If another process has the lock, wait until it is free. Without `wait`, which is for a training that holds the lock
    for hours, do not wait, and let no other process wait either: OSError says which process writes the directory.
    """
    from filelock import FileLock, Timeout  # imported late: a run that finds all it needs does not lock

    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory: remove it")
    lock, holder, is_new = FileLock(directory / LOCK), directory / HOLDER, not directory.is_dir()
    try:
        make_directory(directory)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text(encoding="utf-8", errors="replace") if holder.is_file() else "another process"
            if not wait or holder.is_file():
                raise BlockingIOError(0, f"{who} is writing it") from None
            print(f"{directory}: waiting for {who}, which is writing it ...", file=sys.stderr)
            held = lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{directory} cannot be written ({reason}): a file of the model is to be made there") from error
    with held:
        try:
            if not wait:
                write_text(holder, f"process {os.getpid()} ({os.path.basename(sys.argv[0])})")
            yield
        finally:
            holder.unlink(missing_ok=True)
            if is_new and not wait and os.listdir(directory) == [LOCK]:  # nothing came of it
                shutil.rmtree(directory)


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


def digest(path: Path, algorithm: str = "sha256", most: int | None = None) -> bytes:
    """The hash of a file of at most `most` bytes, which may be larger than the memory."""
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with open_regular(path, most) as file:
        while chunk := file.read(2**20):
            hashed.update(chunk)
    return hashed.digest()


def digests(directory: Path, files: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of those of `files`, small ones, that are in `directory`, by their names."""
    return {file: digest(directory / file, most=MOST_BYTES).hex() for file in files if (directory / file).is_file()}

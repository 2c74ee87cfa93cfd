"""Kills and power cuts: what each would leave of a directory, at every moment of a piece of work."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from store import files

LOST = b"bytes that were not synced"


def look(place: Path | int) -> bytes | dict[str, int]:
    """The bytes of a file, or the names in a directory with the numbers of their files; a descriptor will do."""
    if os.path.isdir(place):
        with os.scandir(place) as entries:
            return {entry.name: entry.inode() for entry in entries}
    with open(os.dup(place) if isinstance(place, int) else place, "rb") as file:
        return os.pread(file.fileno(), 2**30, 0)


def power_cuts(root: Path, path: Path, work: Callable, exchange: bool) -> list[list[dict[str, bytes] | None]]:
    """For each moment of `work`, and for the end, the bytes of the files in `path`, by name, that may be left of it.

    A file has its bytes when it was synced. Of each directory in `root` the names may be those when it was synced last
    or those of now, whatever becomes of other directories. Without `exchange` two directories cannot change places.
    """
    synced, moments = {place.stat().st_ino: look(place) for place in (root, *root.rglob("*"))}, []

    def find(state: dict[int, bytes | dict]) -> dict[str, bytes] | None:
        number = root.stat().st_ino
        for part in path.relative_to(root).parts:
            number = state.get(number, {}).get(part)
        names = state.get(number, {}).items()
        return number and {name: state.get(i, LOST) for name, i in names if not name.startswith(".")}

    def note() -> None:
        now = {place.stat().st_ino: look(place) for place in (root, *root.rglob("*"))}
        directories = [i for i in now.keys() | synced if isinstance(now.get(i, synced.get(i)), dict)]
        found = [find(now)]  # after a kill
        for sources in itertools.product((now, synced), repeat=len(directories)):
            names = {i: source.get(i) for i, source in zip(directories, sources, strict=True)}
            found.append(find(synced | {i: at if isinstance(at, dict) else {} for i, at in names.items()}))
        moments.append([left for n, left in enumerate(found) if left not in found[:n]])

    def noting(function: Callable) -> Callable:
        return lambda *args, **options: (note(), function(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: synced.update({os.fstat(fd).st_ino: look(fd)}))
        for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, noting(getattr(os, name)))
        patch.setattr(files, "exchange", noting(files.exchange))
        if not exchange:
            patch.setattr(files.ctypes, "CDLL", lambda *args, **options: None)
        work()
        note()
    return moments

"""What a directory could contain after a kill or a power cut, at every moment of an operation."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from store import files

LOST = b"bytes that were not synced"


def read_tree(root: Path) -> dict[int, bytes | dict[str, int]]:
    """By inode: the bytes of each file, and the names in each directory with their inodes."""
    tree = {place: place.stat().st_ino for place in (root, *root.rglob("*"))}
    names = {i: {place.name: tree[place] for place in tree if place.parent == path} for path, i in tree.items()}
    return {i: names[i] if path.is_dir() else path.read_bytes() for path, i in tree.items()}


def power_cuts(root: Path, path: Path, operation: Callable, can_swap: bool) -> list[list[dict[str, bytes] | None]]:
    """For each moment of `operation`, and for its end: the possible files of `path`, with their bytes.

    A file has the bytes that were synced. Each directory in `root` has either the names that were synced last or those
    of now, independently of the others. Without `can_swap`, the file system cannot swap two directories.
    """
    synced, moments = read_tree(root), []

    def visible_files(tree: dict[int, bytes | dict]) -> dict[str, bytes] | None:
        inode = root.stat().st_ino
        for part in path.relative_to(root).parts:
            inode = tree.get(inode, {}).get(part)
        names = tree.get(inode, {}).items()
        return inode and {name: tree.get(i, LOST) for name, i in names if not name.startswith(".")}

    def record_moment() -> None:
        now = read_tree(root)
        directories = [i for i in now.keys() | synced if isinstance(now.get(i, synced.get(i)), dict)]
        possible = [visible_files(now)]  # after a kill
        for trees in itertools.product((now, synced), repeat=len(directories)):
            names = {i: tree.get(i) for i, tree in zip(directories, trees, strict=True)}
            possible.append(visible_files(synced | {i: n if isinstance(n, dict) else {} for i, n in names.items()}))
        moments.append([found for n, found in enumerate(possible) if found not in possible[:n]])

    def recorded(function: Callable) -> Callable:
        return lambda *args, **options: (record_moment(), function(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: synced.update({(i := os.fstat(fd).st_ino): read_tree(root)[i]}))
        for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, recorded(getattr(os, name)))
        patch.setattr(files, "swap_directories", recorded(files.swap_directories))
        if not can_swap:
            patch.setattr(files.ctypes, "CDLL", lambda *args, **options: None)
        operation()
        record_moment()
    return moments

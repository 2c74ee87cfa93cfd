"""Files appear complete or not at all, and a directory is locked while it is written."""

import contextlib
import io
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from export import main as export
from helpers.disk import power_cuts
from helpers.models import TINY, write_model
from store import files
from store.files import locked, replacing, replacing_directory, temporary_of, write_text
from store.models import SMALL_FILES
from store.tensors import WEIGHTS
from train import start_training
from utils import load_encoder_hparams_and_params, save_model


def test_a_file_that_is_replaced_is_whole_or_untouched(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_only_the_leftovers_of_killed_processes_are_removed(tmp_path):
    others = [tmp_path / name for name in ("a", "a.1.tmp", ".a.tmp", "a.part", temporary_of(tmp_path / "b"))]
    for path in (*others, temporary_of(tmp_path / "a")):
        path.touch()
    (temporary_of(tmp_path / "a") / "more").mkdir(parents=True)
    files.remove_leftovers(tmp_path / "a")
    assert set(tmp_path.iterdir()) == set(others)


@pytest.mark.parametrize("name", ["n" * 250, "é" * 125])
def test_names_may_be_as_long_as_a_file_system_allows(tmp_path, name):
    for path in (tmp_path / "directory" / name, tmp_path / name / "file"):
        with replacing_directory(path.parent) as new:
            write_text(new / path.name, "text")
        assert path.read_text() == "text"


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
@pytest.mark.parametrize("mode", [0o600, 0o604, 0o664])
def test_a_replaced_file_keeps_the_permissions(tmp_path, mode):
    for name in ("new", "old"):
        (tmp_path / name).touch()
    (tmp_path / "old").chmod(mode)
    for name in ("new", "old"):
        with replacing(tmp_path / name) as temporary:
            assert not temporary.stat().st_mode & 0o077, "nobody else can read it before it is complete"
    write_text(tmp_path / "newer", "text")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == mode
    assert (tmp_path / "newer").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("name", ["", ".lock", ".lock.holder"])
def test_no_link_is_followed(tmp_path, monkeypatch, name):
    assert temporary_of(tmp_path / "file") != temporary_of(tmp_path / "file")
    monkeypatch.setattr(os, "urandom", lambda n: b"guessed")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name if name else temporary_of(tmp_path / "file")).symlink_to(tmp_path / "victim")
    for writing in (replacing(tmp_path / "file"), locked(tmp_path, wait=False)):
        with contextlib.suppress(OSError), writing as temporary:
            if temporary:
                temporary.write_text("not mine")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize(("wait", "existing"), [(True, ""), (False, ""), (True, "."), (True, "file")])
def test_a_lock_leaves_no_directory_that_is_new_and_empty(tmp_path, wait, existing):
    directory = tmp_path / "model"
    if existing == ".":
        directory.mkdir()
    with contextlib.suppress(ConnectionError), locked(directory, wait):
        (directory / existing).touch()
        raise ConnectionError
    assert directory.exists() == bool(existing)


def test_a_process_that_waits_for_a_lock_creates_the_directory_again(tmp_path):
    def lock_and_write():
        with locked(tmp_path / "model"):
            write_text(tmp_path / "model" / "file", "text")

    with contextlib.redirect_stderr(io.StringIO()) as errors, ThreadPoolExecutor() as pool, locked(tmp_path / "model"):
        waiting, deadline = pool.submit(lock_and_write), time.monotonic() + 60
        while "waiting for another process" not in errors.getvalue():
            assert time.monotonic() < deadline
    assert (waiting.result(), (tmp_path / "model" / "file").read_text()) == (None, "text")


def write_model_to(directory, source):
    save_model(directory, *load_encoder_hparams_and_params(str(source)))


def contents(directory):
    """The bytes of the visible files by name, or None if the directory does not exist."""
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*")} if directory.is_dir() else None


@pytest.mark.skipif(os.name != "posix", reason="Windows syncs no directories")
@pytest.mark.parametrize("can_swap", [True, False])
@pytest.mark.parametrize(("write", "existing"), [
    (lambda directory, source: write_text(directory / "vocab.bpe", "new"), "a model"),
    *((write_model_to, existing) for existing in ("a model", "a directory", "nothing")),
    *((lambda out, source: export(str(source), str(out)), existing) for existing in ("a directory", "nothing")),
    (lambda directory, source: start_training(directory, __file__, {"n_vocab": 270, "n_embd": 8}), "a model"),
])  # fmt: skip
def test_a_kill_or_a_power_cut_leaves_the_old_or_the_new(tmp_path, tiny_model, write, existing, can_swap):
    directory = tmp_path / "models" / "mine"
    if existing != "nothing":
        directory.mkdir(parents=True)
    if existing == "a model":
        write_model_to(directory, write_model(tmp_path / "source", TINY | {"n_embd": 8}))
        (directory / "README.md").write_text("mine")
    before = contents(directory)
    *moments, last = power_cuts(tmp_path, directory, lambda: write(directory, tiny_model), can_swap)
    after = contents(directory)
    assert last == [after] != [before]
    assert (before or {}).get("README.md") == after.get("README.md")
    assert len(moments) > 3
    for found in (found for moment in moments for found in moment if found not in (before, after)):
        assert not can_swap, "it has old and new files"
        assert all(found[name] in ((before or {}).get(name), after.get(name)) for name in found)
        if existing == "a model" and found[WEIGHTS] != before[WEIGHTS]:
            assert all(found[name] == after[name] for name in SMALL_FILES), "or --verify finds the old ones"


@pytest.mark.parametrize("find_cache", [Path.expanduser, lambda path: path])  # Path.expanduser raises RuntimeError
def test_a_user_without_a_home_directory_has_no_cache(tmp_path, monkeypatch, find_cache):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **options: find_cache(Path("~nobody at all/.cache")))
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert files.derived_file_directories(tmp_path) == [tmp_path]

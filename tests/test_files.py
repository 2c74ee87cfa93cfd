"""Files are whole or untouched, and are made where the user may write."""

import contextlib
import os
import stat
from pathlib import Path

import pytest

from export import main as export
from helpers.disk import power_cuts
from helpers.models import TINY, write_model
from store.files import homes_of, locked, replacing, replacing_directory, sweep, temporary_of, write_text
from store.models import TABLES
from store.tensors import WEIGHTS
from train import start_training
from utils import load_encoder_hparams_and_params, save_model


def test_a_file_that_is_replaced_is_whole_or_untouched(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_is_swept_up_and_nothing_else(tmp_path):
    others = [tmp_path / name for name in ("a", "a.1.tmp", ".a.tmp", "a.part", temporary_of(tmp_path / "b"))]
    for path in (*others, temporary_of(tmp_path / "a")):
        path.touch()
    (temporary_of(tmp_path / "a") / "more").mkdir(parents=True)
    sweep(tmp_path / "a")
    assert set(tmp_path.iterdir()) == set(others)


@pytest.mark.parametrize("name", ["n" * 250, "é" * 125])
def test_names_may_be_as_long_as_a_file_system_allows(tmp_path, name):
    for path in (tmp_path / "directory" / name, tmp_path / name / "file"):
        with replacing_directory(path.parent) as new:
            write_text(new / path.name, "text")
        assert path.read_text() == "text"


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
@pytest.mark.parametrize("mode", [0o600, 0o604, 0o664])
def test_a_file_keeps_the_permissions_of_the_one_that_it_replaces(tmp_path, mode):
    for name in ("new", "old"):
        (tmp_path / name).touch()
    (tmp_path / "old").chmod(mode)
    for name in ("new", "old"):
        with replacing(tmp_path / name) as temporary:
            assert not temporary.stat().st_mode & 0o077, "nobody else reads it before that"
    write_text(tmp_path / "newer", "text")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == mode
    assert (tmp_path / "newer").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("name", ["", ".lock", ".lock.holder"])
def test_no_link_is_followed_to_what_it_points_to(tmp_path, monkeypatch, name):
    assert temporary_of(tmp_path / "file") != temporary_of(tmp_path / "file")
    monkeypatch.setattr("secrets.token_hex", lambda n: "guessed")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name if name else temporary_of(tmp_path / "file")).symlink_to(tmp_path / "victim")
    for writing in (replacing(tmp_path / "file"), locked(tmp_path, wait=False)):
        with contextlib.suppress(OSError), writing as temporary:
            if temporary:
                temporary.write_text("not mine")
    assert (tmp_path / "victim").read_text() == "mine"


def write_model_to(directory, source):
    save_model(directory, *load_encoder_hparams_and_params(str(source)))


def contents(directory):
    """The bytes of its files by their names, but of hidden ones; None if it is not there."""
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*")} if directory.is_dir() else None


@pytest.mark.skipif(os.name != "posix", reason="Windows syncs no directories")
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(("write", "there"), [
    (lambda directory, source: write_text(directory / "vocab.bpe", "new"), "a model"),
    *((write_model_to, there) for there in ("a model", "a directory", "nothing")),
    *((lambda out, source: export(str(source), str(out)), there) for there in ("a directory", "nothing")),
    (lambda directory, source: start_training(directory, __file__, {"n_vocab": 270, "n_embd": 8}), "a model"),
])  # fmt: skip
def test_a_kill_or_a_power_cut_leaves_the_old_or_the_new(tmp_path, tiny_model, write, there, exchange):
    directory = tmp_path / "models" / "mine"
    if there != "nothing":
        directory.mkdir(parents=True)
    if there == "a model":
        write_model_to(directory, write_model(tmp_path / "source", TINY | {"n_embd": 8}))
        (directory / "README.md").write_text("mine")
    before = contents(directory)
    *moments, last = power_cuts(tmp_path, directory, lambda: write(directory, tiny_model), exchange)
    after = contents(directory)
    assert last == [after] != [before]
    assert (before or {}).get("README.md") == after.get("README.md")
    assert len(moments) > 3
    for found in (found for moment in moments for found in moment if found not in (before, after)):
        assert not exchange, "files of both"
        assert all(found[name] in ((before or {}).get(name), after.get(name)) for name in found)
        if there == "a model" and found[WEIGHTS] != before[WEIGHTS]:
            assert all(found[name] == after[name] for name in TABLES), "or --verify tells"


@pytest.mark.parametrize("find", [Path.expanduser, lambda path: path])  # the first raises RuntimeError
def test_a_user_without_a_home_directory_has_no_cache(tmp_path, monkeypatch, find):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **options: find(Path("~nobody of this name/.cache")))
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert homes_of(tmp_path) == [tmp_path]

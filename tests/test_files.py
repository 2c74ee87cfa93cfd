"""Files are whole or untouched, and are made where the user may write."""

import os
from pathlib import Path

import pytest

from store.files import homes_of, replacing, sweep


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
    for name in ("a", "a.1.tmp", "a.1.tmp.2.tmp", "a.tmp", "b.1.tmp", "a.part"):
        (tmp_path / name).touch()
    sweep(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.tmp", "b.1.tmp", "a.part"}


def no_home(*arguments, **options):
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("find_cache", [no_home, lambda *arguments, **options: Path("~/.cache/gpt2-numpy")])
def test_a_user_without_a_home_directory_has_no_cache(tmp_path, monkeypatch, find_cache):
    monkeypatch.setattr("platformdirs.user_cache_path", find_cache)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert homes_of(tmp_path) == [tmp_path]

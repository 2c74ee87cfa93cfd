"""A file that a user names: checked before the work, and in the end whole or as it was."""

import os

import pytest

from show.output import check_out, writing


@pytest.mark.parametrize("out", ["", ".", "..", "directory", "pipe", "new/", "none/.."])
def test_a_name_that_cannot_be_a_file_is_refused(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"out must be the name of a file, not {out!r}"):
        check_out(out)


def test_new_and_old_files_are_accepted_but_not_in_a_missing_directory(tmp_path):
    (tmp_path / "old").touch()
    for name in ("old", "new"):
        check_out(str(tmp_path / name))
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("loop", "Too many levels"), ("x" * 300, "File name too long"), ("old/x", "Not a directory")):
        with pytest.raises(OSError, match=f"{reason}.*{name}"):
            check_out(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"none/new could not be written: there is no directory .*none"):
        check_out(str(tmp_path / "none" / "new"))


def test_the_target_of_a_symbolic_link_is_replaced_and_the_link_stays(tmp_path, capsys):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with writing(str(tmp_path / "link")) as temporary:
        temporary.write_text("new")
        assert (tmp_path / "real").read_text() == "old"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert capsys.readouterr().out == f"wrote {tmp_path / 'link'}\n"


@pytest.mark.parametrize("name", ["out", "x" * 300])
def test_an_error_names_the_file_and_leaves_nothing(tmp_path, capsys, name):
    out = str(tmp_path / name)
    with pytest.raises(OSError, match=f"^{out} could not be written: (No space left|File name too long)"), writing(out):
        raise OSError(28, "No space left")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []

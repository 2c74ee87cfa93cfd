"""Files are whole or untouched."""

import pytest

from files import replacing, sweep


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

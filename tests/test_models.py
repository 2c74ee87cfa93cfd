"""A model is found by its name, and only in the places that the name says."""

import os
from pathlib import Path

import pytest

from helpers.models import TINY, write_model
from store.models import find_model
from utils import load_encoder_hparams_and_params


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """Where models are searched: in the current directory, beside the code, in the user's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.models.PROJECT", tmp_path / "code")
    monkeypatch.setattr("platformdirs.user_data_path", lambda *_, **options: tmp_path / "data")
    return [tmp_path / "models", tmp_path / "code" / "models", tmp_path / "data" / "models"]


@pytest.fixture
def fetched(monkeypatch):
    """The directories that released models would have been downloaded to."""
    found = []
    monkeypatch.setattr("store.checkpoint.fetch", lambda directory, files: found.append(directory.resolve()))
    return found


def make(directory, file="hparams.json"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / file).touch()
    return directory


@pytest.mark.parametrize("name", ["mine", "124M"])
def test_the_first_place_that_has_more_than_hidden_files_of_a_model_is_taken(homes, fetched, name):
    for home in homes:
        make(home / name, ".lock")
    for home in reversed(homes):
        make(home / name)
        assert find_model(name).resolve() == home / name
    assert find_model(name, "data/models").resolve() == homes[2] / name
    (homes[0] / name / "hparams.json").unlink()
    assert find_model(name, "models") == homes[1] / name, "beside the code"


def test_a_path_leads_to_its_own_directory_only(homes):
    for directory in (Path("mine"), homes[0] / "mine"):
        make(directory)
    assert find_model("./mine") == Path("mine")
    assert find_model(str(homes[0] / "mine")) == homes[0] / "mine"
    (homes[0] / "mine" / "hparams.json").unlink()
    assert find_model("mine") == Path("mine")


@pytest.mark.parametrize(("exists", "user_data", "read_only"), [
    ("code/models", None, 2), ("code", None, 2), ("code/models", lambda: Path("~nobody here").expanduser(), 1),
    ("code", lambda: Path("relative"), 1),
])  # fmt: skip
def test_released_models_are_downloaded_beside_the_code_or_to_the_users_data_if_the_code_is_read_only(
    homes, fetched, tmp_path, monkeypatch, exists, user_data, read_only
):
    (tmp_path / exists).mkdir(parents=True)
    if user_data:  # it raises RuntimeError, or returns a path that is not absolute
        monkeypatch.setattr("platformdirs.user_data_path", lambda *_, **options: user_data())
    for expected in (homes[1], homes[read_only]):
        find_model("124M")
        find_model("124M", "models")
        assert fetched[-2:] == [expected / "124M", homes[0] / "124M"]
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / exists)


@pytest.mark.parametrize("name", ["125M", "", "../nothing", "a\0b", "124M/", "/nowhere"])
def test_an_unknown_model_is_refused_with_a_list_of_the_known(homes, tmp_path, name):
    for directory in (homes[0] / "mine", homes[1] / "bundled", homes[2] / "124M"):
        make(directory)
    make(homes[0] / "failed", ".lock")
    make(homes[0], "a file")
    complaint = rf"124M, 355M, 774M, 1558M; models in models, {homes[1]}, {homes[2]}: 124M, bundled, mine; or give"
    with pytest.raises(FileNotFoundError, match=complaint):
        find_model(name)
    assert {path.name for path in tmp_path.iterdir()} == {"code", "data", "models"}, "and nothing is made"


@pytest.mark.parametrize("name", ["../124M", "124M/../124M", "124M\0", "models/124M", "./124M"])
def test_a_name_never_leads_a_download_out_of_models_dir(homes, mirror, tmp_path, monkeypatch, name):
    monkeypatch.setattr("store.huggingface.fetch_model", lambda name: find_model("nothing"))
    for models_dir in ("models", None):
        with pytest.raises(FileNotFoundError, match="there is no model"):
            load_encoder_hparams_and_params(name, models_dir)
    assert mirror.requests == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_downloaded_into_a_directory_that_was_named_by_path(mirror, tmp_path):
    (tmp_path / "124M").mkdir()
    with pytest.raises(FileNotFoundError, match=r"encoder\.json is missing"):
        load_encoder_hparams_and_params(str(tmp_path / "124M"))
    assert mirror.requests == []


def test_a_vocabulary_may_be_padded_but_not_be_too_small(tmp_path):
    directory = write_model(tmp_path / "padded", TINY | {"n_vocab": 320}, n_tokens=300)
    encoder, _, params = load_encoder_hparams_and_params(str(directory))
    assert (len(encoder.encoder), len(params["wte"])) == (300, 320)
    directory = write_model(tmp_path / "small", TINY | {"n_vocab": 280}, n_tokens=300)
    with pytest.raises(ValueError, match=r"300 tokens, but n_vocab .* is 280"):
        load_encoder_hparams_and_params(str(directory))

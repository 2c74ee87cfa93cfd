"""A model is found by its name, and only in the place that the name says."""

import pytest

from helpers.models import TINY, write_model
from store.models import find_model
from utils import load_encoder_hparams_and_params


def test_a_name_is_looked_up_in_models_dir_then_beside_the_code_then_as_a_path(tmp_path, monkeypatch):
    beside = tmp_path / "code"
    monkeypatch.setattr("store.models.PROJECT", beside)
    monkeypatch.chdir(tmp_path)
    for directory in (tmp_path / "mine", beside / "models" / "mine", tmp_path / "models" / "mine"):
        directory.mkdir(parents=True)
        assert find_model("mine").resolve() == directory, "found before the ones that were there"
    assert find_model("./mine").resolve() == tmp_path / "mine"
    assert find_model(str(beside / "models" / "mine")) == beside / "models" / "mine"
    (beside / "models" / "124M").mkdir()
    assert find_model("124M") == beside / "models" / "124M"


@pytest.mark.parametrize("name", ["125M", "", "../nothing", "a\0b", "124M/", "/nowhere"])
def test_an_unknown_model_is_refused_with_a_list_of_the_known(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.models.PROJECT", tmp_path / "code")
    for directory in ("models/mine", "code/models/bundled"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "models" / "a file").touch()
    with pytest.raises(FileNotFoundError, match=r"124M, 355M, 774M, 1558M.* models in models: bundled, mine;"):
        find_model(name)
    assert {path.name for path in tmp_path.iterdir()} == {"code", "models"}, "and nothing is made"


@pytest.mark.parametrize("name", ["../124M", "124M/../124M", "124M\0", "models/124M", "./124M"])
def test_a_name_never_leads_a_download_out_of_models_dir(mirror, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("store.hub.fetch_model", lambda name: find_model("nothing"))
    with pytest.raises(FileNotFoundError, match="there is no model"):
        load_encoder_hparams_and_params(name, "models")
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

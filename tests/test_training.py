"""What a training saves so that it can be resumed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from store.tensors import save_tensors
from store.training import VECTORS, Settings, Training, load_state, save_state


@pytest.fixture
def training():
    vectors = {name: np.random.RandomState(i).standard_normal(50).astype(np.float32) for i, name in enumerate(VECTORS)}
    settings = Settings(n_embd=16, dropout=0.25, max_steps=None, minutes=1.5, init_from="124M")
    rows = [[0, None, 5.0, 1e-5, None], [5, 4.9, 4.8, 2e-5, 123.4]]
    return Training(settings, "digest", vectors, 7, 1.25, 5, 4.8, rows=rows, losses=[4.9, 0.1 + 0.2])


@pytest.mark.parametrize("best_loss", [4.8, math.inf])  # infinite until the first evaluation
def test_what_is_saved_is_what_is_loaded(training, tmp_path, best_loss):
    training = replace(training, best_loss=best_loss)
    save_state(tmp_path / "state", training)
    assert training.saved_step == 7
    loaded = vars(load_state(tmp_path / "state"))
    vectors, expected = loaded.pop("vectors"), vars(training).copy()
    for name, vector in expected.pop("vectors").items():
        np.testing.assert_array_equal(vectors[name], vector)
        assert vectors[name].flags.writeable, "a training goes on with them, in place"
    assert loaded == expected


def test_a_state_that_is_not_there_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: .*state is missing"):
        load_state(tmp_path / "state")


WHOLE = '{"text": "digest", "settings": {}, "step": 7}'


@pytest.mark.parametrize(
    ("names", "metadata"),
    [
        (VECTORS[:2], {"record": WHOLE}), (VECTORS, {}), (VECTORS, {"record": WHOLE[:-1]}), (VECTORS, {"record": "[]"}),
        (VECTORS, {"record": WHOLE.replace("text", "txt")}), (VECTORS, {"record": WHOLE.replace("settings", "flags")}),
        (VECTORS, {"record": WHOLE.replace("{}", '{"width": 3}')}), (VECTORS, {"record": '{"more": 1, ' + WHOLE[1:]}),
    ],
)  # fmt: skip
def test_a_state_that_lacks_something_or_has_too_much_is_refused(tmp_path, names, metadata):
    vectors = {name: np.zeros(3, np.float32) for name in VECTORS}
    save_tensors(tmp_path / "state", vectors, {"record": WHOLE})
    assert load_state(tmp_path / "state").saved_step == 7, "this one is good, and was saved after that step"
    save_tensors(tmp_path / "state", {name: vectors[name] for name in names}, metadata)
    with pytest.raises(ValueError, match=r"state is damaged .*: train anew, with --overwrite"):
        load_state(tmp_path / "state")


def test_a_state_that_is_cut_short_is_refused(training, tmp_path):
    save_state(tmp_path / "state", training)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-1])
    with pytest.raises(ValueError, match="state is damaged"):
        load_state(tmp_path / "state")

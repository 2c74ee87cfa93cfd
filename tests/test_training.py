"""What a training saves so that it can be resumed."""

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from helpers.models import flip_bit
from store.params import count_params, param_shapes
from store.tensors import map_tensors, save_tensors
from store.training import VECTORS, Settings, Training, load_state, save_state
from train import choose_settings


@pytest.fixture
def training():
    shape = {"n_vocab": 5, "n_ctx": 3, "n_embd": 2, "n_head": 1, "n_layer": 1}
    settings = Settings(**shape, dropout=0.25, max_steps=None, minutes=1.5, init_from="124M")
    n_params = count_params(param_shapes(settings.hparams))
    vectors = {name: np.float32(np.random.RandomState(i).standard_normal(n_params)) for i, name in enumerate(VECTORS)}
    rows = [[0, None, 5.0, 1e-5, None], [5, 4.9, 4.8, 2e-5, 123.4]]
    return Training(settings, "digest", vectors, 7, 1.25, 5, 4.8, tables={"a": "b"}, rows=rows, losses=[4.9, 0.3])


@pytest.mark.parametrize("best_loss", [4.8, math.inf])  # infinite until the first evaluation
def test_a_saved_training_loads_unchanged(training, tmp_path, best_loss):
    training = replace(training, best_loss=best_loss)
    save_state(tmp_path / "state", training)
    assert training.saved_step == 7
    loaded = vars(load_state(tmp_path / "state"))
    vectors, expected = loaded.pop("vectors"), vars(training).copy()
    for name, vector in expected.pop("vectors").items():
        np.testing.assert_array_equal(vectors[name], vector)
        assert vectors[name].flags.writeable, "training changes them in place"
    assert loaded == expected


def save_changed(path, training, change, vectors=None):
    """Save a state whose record is changed: in place by `change`, or to what it returns."""
    save_state(path, training)
    record = json.loads(map_tensors(path)[1]["record"])
    record = change(record) or record
    text = record if isinstance(record, str) else json.dumps(record)
    save_tensors(path, vectors or training.vectors, {"record": text})


def assert_refused(path, complaint):
    """One line says that the state is damaged, or has settings that no training can have."""
    with pytest.raises(ValueError, match=complaint) as raised:
        choose_settings({}, load_state(path).settings)
    assert len(str(raised.value).splitlines()) == 1


NAMES = ("text", "step", "seconds", "best_step", "best_loss", "saved_step", "tables", "rows", "losses", "settings")
INVALID = {"null": None, "text": "x", "list": [[1, "a"]], "object": {"x": [None]}, "bool": True, "NaN": math.nan,
           "-1": -1, "deep": json.loads("[" * 80 + "]" * 80)}  # fmt: skip
GOOD = {*product(("text", "encoder", "init_from"), ("text", "null")), ("max_steps", "null"), ("minutes", "null"),
        ("saved_step", "-1")} - {("text", "null")}  # fmt: skip


@pytest.mark.parametrize("kind", INVALID)
@pytest.mark.parametrize("name", [*NAMES, *vars(Settings())])
def test_an_error_names_an_invalid_value_in_a_record(training, tmp_path, name, kind):
    if (name, kind) not in GOOD:
        new = {name: INVALID[kind]}
        save_changed(tmp_path / "state", training, lambda r: (r if name in NAMES else r["settings"]).update(new))
        assert_refused(tmp_path / "state", rf"state is damaged \(.*{name}.*\): train again|^{name} must be")


@pytest.mark.parametrize("change", [
    *(lambda record, name=name: record.pop(name) and None for name in NAMES),
    *(lambda record, text=text: text for text in (" ", "[]", "null", '"a"', "{", "[" * 100_000, '{"a":' * 100_000)),
    lambda record: record.update(more=1), lambda record: record["settings"].update(width=3),
    lambda record: record["settings"].update(n_vocab=6), lambda record: record["settings"].pop("seed") and None,
    lambda record: record.update(seconds=10**400), lambda record: record.update(best_step=8),
])  # fmt: skip
def test_a_record_with_missing_or_unknown_entries_is_refused(training, tmp_path, change):
    save_changed(tmp_path / "state", training, change)
    assert_refused(tmp_path / "state", r"state is damaged \(.*\): train again, with --overwrite")


@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: v[:, None], lambda v: v.astype(np.int8), None])
@pytest.mark.parametrize("name", VECTORS)
def test_an_error_names_a_vector_that_is_missing_or_does_not_fit(training, tmp_path, name, change):
    vectors = {other: v for other, v in training.vectors.items() if other != name}
    vectors |= {name: change(training.vectors[name])} if change else {}
    save_changed(tmp_path / "state", training, lambda record: None, vectors)
    assert_refused(tmp_path / "state", rf"state is damaged \(.*\b{name}\b")


def test_a_state_with_one_changed_bit_is_refused(training, tmp_path):
    save_state(tmp_path / "state", training)
    data = (tmp_path / "state").read_bytes()
    for i in (*range(0, 12_000, 97), *range(8 * 4096, 8 * len(data), 97)):
        (tmp_path / "state").write_bytes(flip_bit(data, i))
        assert_refused(tmp_path / "state", "state is damaged")
    (tmp_path / "state").write_bytes(data[:-1])
    assert_refused(tmp_path / "state", "state is damaged")

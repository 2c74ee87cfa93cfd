"""Hyperparameters and the tables of a tokenizer are read if they make sense; else an error names the problem."""

import json

import pytest

from encoder import read_encoder
from helpers.models import TINY, tiny_tables, write_tables
from store.tables import read_hparams


@pytest.mark.parametrize(("name", "value"), [
    ("n_layer", "0"), ("n_ctx", "-1"), ("n_layer", "1e3"), ("n_embd", '"48"'), ("n_head", "null"), ("n_head", "5"),
    ("n_head", "true"), ("n_layer", "1000000000"), ("n_vocab", "NaN"), ("n_vocab", "1" + "0" * 5000),
    *(("n_inner", value) for value in ('"x"', "null", "-1", "0", "4.0", "1" + "0" * 9)), *((name, "") for name in TINY),
])  # fmt: skip
def test_impossible_hyperparameters_are_refused(tmp_path, name, value):
    text = json.dumps(TINY | {name: "value"}).replace('"value"', value)
    path = tmp_path / "hparams.json"
    path.write_text(text if value else json.dumps({key: TINY[key] for key in TINY if key != name}))
    complaint = name if value else f"{name} must be a whole number from 1 to .*, and is missing; delete it"
    with pytest.raises(ValueError, match=rf"hparams\.json is damaged: .*({complaint}|4300 digits)"):
        read_hparams(path)


def test_duplicate_keys_are_refused(tmp_path):
    path = tmp_path / "hparams.json"
    for text in ('{"n_vocab": 7, ' + json.dumps(TINY)[1:], json.dumps(TINY)[:-1] + ', "more": {"a": 1, "a": 2}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"hparams\.json is damaged: .*a key occurs twice"):
            read_hparams(path)


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda lines: [*lines, "aa zz9"], r"the merges name '\w+', which is not in the vocabulary"),
    (lambda lines: [*lines, lines[1]], r"vocab\.bpe is damaged: it has a merge twice"),
    (lambda lines: lines[:-1], r"no merge makes '.*', which is in the vocabulary"),
    (lambda lines: [*lines, " "], r"vocab\.bpe is damaged: '' is not a merge of two tokens"),
    (lambda lines: [*lines, "a b c"], r"vocab\.bpe is damaged: 'a b c' is not a merge"),
])  # fmt: skip
def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path, change, complaint):
    write_tables(tmp_path)
    lines = (tmp_path / "vocab.bpe").read_text(encoding="utf-8").rstrip("\n").split("\n")
    (tmp_path / "vocab.bpe").write_text("\n".join(change(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        read_encoder(tmp_path)


def test_windows_line_ends_are_read(tmp_path):
    write_tables(tmp_path)
    merges = (tmp_path / "vocab.bpe").read_bytes()
    (tmp_path / "vocab.bpe").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert list(read_encoder(tmp_path).bpe_ranks) == tiny_tables(300)[1]


def test_a_vocabulary_may_have_special_tokens_that_no_merge_makes(tmp_path):
    write_tables(tmp_path)
    vocabulary = json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8"))
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary | {"<the end>": 300}), encoding="utf-8")
    encoder = read_encoder(tmp_path)
    assert encoder.decode([*encoder.encode("a"), 300]) == "a<the end>"
    for token, shown in (("word", "word"), ("<\ud800>", r"<\\ud800>")):
        (tmp_path / "encoder.json").write_text(json.dumps(vocabulary | {token: 300}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"no merge makes '{shown}'"):
            read_encoder(tmp_path)

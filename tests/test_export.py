"""An export loads back bit by bit, appears as a whole or not at all, and replaces nothing."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from export import main as export
from helpers import huggingface_models as hf
from helpers.models import BUNDLED, TINY, assert_same_params, write_model
from helpers.processes import run
from store.params import tensors_of

CONFIGS = {
    "plain": {}, "everything": hf.EVERYTHING, "not scaled": {"scale_attn_weights": False},
    "no end": {"eos_token_id": None, "bos_token_id": 7},
}  # fmt: skip


@pytest.fixture(params=["ours", "special in encoder.json", *CONFIGS])
def exported(request, tmp_path, tiny_model):
    """The directory of a model, and the directory of its export."""
    source = tiny_model if request.param == "ours" else tmp_path / "source"
    if request.param == "special in encoder.json":
        write_model(source, TINY | {"n_vocab": 301}, n_tokens=300)
        vocabulary = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
        hf.write_json(source / "encoder.json", vocabulary | {"<the end>": 300})
    elif request.param != "ours":
        tokenizer = hf.tokenizer_json(hf.ADDED if request.param == "everything" else ())
        hf.write(source, CONFIGS[request.param], tokenizer=tokenizer)
    export(str(source), str(tmp_path / "new" / "out"))
    return source, tmp_path / "new" / "out"


def test_an_export_loads_back_bit_by_bit(exported):
    (encoder, hparams, params), (found_encoder, found_hparams, found) = map(hf.load, exported)
    assert hparams == found_hparams
    assert_same_params(found, params)
    for name in ("encoder", "bpe_ranks", "added_tokens", "eot_id", "bos_id"):
        assert getattr(found_encoder, name) == getattr(encoder, name)
    for text in (*hf.TEXTS, *(text for text, _ in hf.SEGMENTS)):
        for allow_special in (False, True):
            assert found_encoder.encode(text, allow_special) == encoder.encode(text, allow_special)
    assert [path.name for path in exported[1].parent.iterdir()] == ["out"]


def test_an_export_has_what_transformers_needs(exported):
    source, out = exported
    files = ["config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    tensors, params = load_file(out / "model.safetensors"), hf.load(source)[2]
    assert tensors.keys() == hf.prefixed(tensors_of(params)).keys()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert config["tie_word_embeddings"] == ("lm_head" not in params)
    assert config["layer_norm_epsilon"] == params["ln_f"].get("eps", 1e-5)
    ids = [entry["id"] for entry in json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]]
    assert ids == sorted(ids)
    assert b'"format": "pt"' in (out / "model.safetensors").read_bytes()[:4096], "transformers needs it"


def snapshot(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("make", [
    lambda out: out.write_text("mine"), lambda out: (out / "mine").mkdir(parents=True),
    lambda out: out.symlink_to("directory"), lambda out: out.symlink_to("nowhere"),
])  # fmt: skip
def test_an_export_never_replaces_files(tmp_path, tiny_model, make):
    (tmp_path / "directory").mkdir()
    make(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="is not a new or empty directory: choose another name"):
        export(str(tiny_model), str(tmp_path / "out"))
    assert snapshot(tmp_path) == before


def test_an_export_to_an_empty_directory_or_a_relative_path(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    for out in ("out", "a/b/"):
        export(str(tiny_model), out)
        assert_same_params(hf.load(tmp_path / out)[2], hf.load(tiny_model)[2])


@pytest.mark.parametrize("exists", [False, True])
def test_an_export_that_fails_leaves_nothing_behind(tmp_path, tiny_model, monkeypatch, exists):
    monkeypatch.setattr("export.save_tensors", lambda path, *_: (path.write_bytes(b"a part"), path.mkdir()))
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="out cannot be written: File exists"):
        export(str(tiny_model), str(tmp_path / "out"))
    assert snapshot(tmp_path) == ({tmp_path / "out": None} if exists else {})


@pytest.mark.parametrize(("out", "complaint"), [("out", "no model"), ("", "new"), ("file/x", "cannot be written")])
def test_an_export_without_a_model_or_a_directory_writes_nothing(tmp_path, monkeypatch, out, complaint):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises((OSError, ValueError), match=complaint):
        export("nothing" if out == "out" else "shakespeare", out)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_command_line_exports(tmp_path):
    shown = run("export.py", "shakespeare", str(tmp_path / "out"))
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')" in shown.stdout.decode()
    assert_same_params(hf.load(tmp_path / "out")[2], hf.load(BUNDLED)[2])

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import utils
from gpt2 import gpt2
from helpers import TINY, as_any_user, assert_same_params, run, write_model, write_tables
from utils import (
    BLOCK,
    count_bytes,
    find_model,
    flatten,
    load_encoder_hparams_and_params,
    map_tensors,
    param_shapes,
    save_tensors,
    tensor_name,
)

# Hyperparameters


@pytest.mark.parametrize(
    ("n_embd", "n_head", "n_layer", "n_params"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 16, 24, 354_823_168),
        (1280, 20, 36, 774_030_080),
        (1600, 25, 48, 1_557_611_200),
    ],
)
def test_the_released_models_have_the_published_number_of_parameters(n_embd, n_head, n_layer, n_params):
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    assert count_bytes(param_shapes(hparams)) == 4 * n_params


# Mapping


def test_mapped_weights_are_read_only_float32_on_the_files_pages(tiny_model, tiny_params):
    _, hparams, params = load_encoder_hparams_and_params(str(tiny_model))
    assert_same_params(params, tiny_params)
    for array in flatten(params, tensor_name).values():
        assert array.dtype == np.float32
        assert not array.flags.owndata
        assert array.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        params["wte"][0] = 0
    assert gpt2([1, 2], **params, n_head=hparams["n_head"]).shape == (2, 300)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("h.1.ln_2.bias"), "h.1.ln_2.bias is missing"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "extra is not part"),
        (
            lambda t: t.update({"wpe.weight": t["wpe.weight"][1:].copy()}),
            r"wpe.weight has the shape \[31, 48\], not \[32, 48\]",
        ),
        (lambda t: t.update({"ln_f.bias": t["ln_f.bias"].astype(np.float64)}), "ln_f.bias has the type float64"),
        (lambda t: t.clear(), "and 25 more such"),
    ],
)
def test_tensors_that_do_not_fit_the_hyperparameters_are_named(tmp_path, tiny_params, change, complaint):
    directory = write_model(tmp_path / "bad", TINY, tiny_params)
    tensors = flatten(tiny_params, tensor_name)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=complaint):
        load_encoder_hparams_and_params(str(directory))


def cut_at_a_line(path):
    """A table of merges that ends early, but well."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\n", 0, len(data) * 2 // 3) + 1] if path.name == "vocab.bpe" else data[:-9])


def cut(path):
    os.truncate(path, path.stat().st_size - 4)


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(bytes(range(256)) * 20)


def nested(path):
    path.write_text("[" * 100_000, encoding="utf-8")


def wrong_json(path):
    path.write_text("[1, 2]", encoding="utf-8")


def missing(path):
    path.unlink()


def too_long(path):
    with open(path, "ab") as file:
        file.write(b"too much")


def directory_instead(path):
    path.unlink()
    path.mkdir()


def dangling_link(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


STATES = [cut, cut_at_a_line, empty, garbage, nested, wrong_json, missing, too_long]
STATES += [directory_instead, dangling_link, link_to_itself]
STATES += [pipe] if hasattr(os, "mkfifo") else []


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("file", ["encoder.json", "vocab.bpe", "hparams.json", "model.safetensors"])
def test_a_file_in_any_other_state_is_refused_by_name(tmp_path, file, state):
    directory = write_model(tmp_path / "bad")
    state(directory / file)
    with pytest.raises((ValueError, OSError)) as raised:
        load_encoder_hparams_and_params(str(directory))
    assert file in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "Errno" not in str(raised.value)


@pytest.mark.parametrize("file", ["encoder.json", "vocab.bpe", "hparams.json", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_named(permissions, tmp_path, file):
    directory = write_model(tmp_path / "bad")
    (directory / file).chmod(0)
    result = run("gpt2.py", "x", f"--model_size={directory}", preexec_fn=as_any_user)
    (line,) = result.stderr.decode().splitlines()
    assert (result.returncode, result.stdout) == (1, b"")
    assert f"{file} cannot be read: Permission denied" in line


def header_of(tensors, length=None):
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def tensor(start, end, shape=None, dtype="F32", **more):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    } | more


LIES = {
    "overlapping": header_of({"a": tensor(0, 16), "b": tensor(8, 32)}),
    "overlapping, from the start": header_of({"a": tensor(0, 16), "b": tensor(0, 32)}),
    "a gap": header_of({"a": tensor(0, 16), "b": tensor(20, 32)}),
    "out of range": header_of({"a": tensor(0, 64)}),
    "far out of range": header_of({"a": tensor(0, 2**62)}),
    "before the start": header_of({"a": tensor(-4, 32)}),
    "too few bytes for the shape": header_of({"a": tensor(0, 32, [16])}),
    "a shape that overflows": header_of({"a": tensor(0, 32, [2**32, 2**32])}),
    "a negative shape": header_of({"a": tensor(0, 32, [-8])}),
    "a fractional shape": header_of({"a": tensor(0, 32, [8.5])}),
    "an infinite shape": header_of({"a": tensor(0, 32, [1e400])}),
    "an absurd length": header_of({"a": tensor(0, 32)}, length=2**63),
    "a length beyond the file": header_of({"a": tensor(0, 32)}, length=2**20),
    "no length": header_of({"a": tensor(0, 32)}, length=0),
    "too many bytes for the type": header_of({"a": tensor(0, 32, dtype="F16")}),
    "another type": header_of({"a": tensor(0, 32, [32], dtype="F8_E4M3")}),
    "an unknown type": header_of({"a": tensor(0, 32, dtype="pickle")}),
    "a name twice": header_of(json.dumps({"a": tensor(0, 32), "b": tensor(0, 32)}).replace('"b"', '"a"').encode()),
    "nested": header_of(b'{"a":' + b"[" * 100_000),
    "not UTF-8": header_of(b"\xff\xfe"),
    "not an object": header_of([1, 2]),
    "no shape": header_of({"a": {"dtype": "F32"}}),
    "a list for an object": header_of({"a": ["F32", [8], [0, 32]]}),
    "an object for a type": header_of({"a": tensor(0, 32, dtype={"F32": None})}),
    "a name that clears the screen": header_of({"\x1b[2J": tensor(0, 32)}),
    "a name of two lines": header_of({"a\nb": tensor(0, 32, [16], dtype="F16")}),
    "an empty shape beyond NumPy's": header_of({"a": tensor(0, 32), "b": tensor(32, 32, [0, 2**62])}),
    "more dimensions than NumPy's": header_of({"a": tensor(0, 32, [8] + [1] * 64)}),
    "metadata of a wrong type": header_of({"a": tensor(0, 32), "__metadata__": {"format": 1}}),
    "metadata that are none": header_of({"a": tensor(0, 32), "__metadata__": "pt"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie] + bytes(32))
    with pytest.raises(ValueError, match="cannot be used") as raised:
        map_tensors(path)
    assert str(path) in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_note_of_git_lfs_is_not_taken_for_a_damaged_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n")
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read: it is only git's note .*: git lfs pull"):
        map_tensors(path)


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_mapped_arrays_are_read_only_also_where_they_had_to_be_copied(tmp_path, offset):
    path = tmp_path / "model.safetensors"
    header = header_of({"a": tensor(0, 8)})
    path.write_bytes(header_of(header[8:] + b" " * offset) + np.array([1, 2], "<f4").tobytes())
    array = map_tensors(path)[0]["a"]
    assert array.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_no_metadata_are_the_same_as_none(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_of({"a": tensor(0, 32), "__metadata__": None}) + bytes(32))
    assert map_tensors(path)[1] == {}


def test_what_a_header_says_besides_is_ignored(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_of({"a": tensor(0, 32, more="than is asked for")}) + bytes(32))
    assert map_tensors(path)[0]["a"].tolist() == [0] * 8


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 0},
        {"n_ctx": -1},
        {"n_vocab": 300.5},
        {"n_embd": "48"},
        {"n_head": None},
        {"n_head": 5},
        {"n_head": True},
        {"n_layer": 10**9},
        {"n_layer": 1e3},
        {"n_ctx": 10**30},
        {"n_embd": 10**100},
        {"n_vocab": float("nan")},
        {"n_vocab": float("inf")},
        {"n_vocab": [300]},
    ],
    ids=str,
)
def test_hyperparameters_of_no_gpt2_are_refused(tmp_path, change):
    directory = write_model(tmp_path / "bad")
    (directory / "hparams.json").write_text(json.dumps(TINY | change), encoding="utf-8")
    with pytest.raises(ValueError, match=next(iter(change))):
        load_encoder_hparams_and_params(str(directory))


@pytest.mark.parametrize("name", TINY)
def test_each_hyperparameter_must_be_there(tmp_path, name):
    directory = write_model(tmp_path / "bad")
    (directory / "hparams.json").write_text(json.dumps({key: TINY[key] for key in TINY if key != name}))
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 to .*, and is missing; delete it"):
        load_encoder_hparams_and_params(str(directory))


def test_a_number_of_more_digits_than_python_reads_is_refused(tmp_path):
    directory = write_model(tmp_path / "bad")
    (directory / "hparams.json").write_text('{"n_vocab": 1' + "0" * 5000 + "}")
    with pytest.raises(ValueError, match=r"hparams.json is damaged"):
        load_encoder_hparams_and_params(str(directory))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: [*lines, "aa zz9"], r"the merges name '\w+', which is not in the vocabulary"),
        (lambda lines: [*lines, lines[1]], r"vocab\.bpe is damaged: it has a merge twice"),
        (lambda lines: lines[:-1], r"no merge makes '.*', which is in the vocabulary"),
        (lambda lines: [*lines, " "], r"vocab\.bpe is damaged: '' is not a merge of two tokens"),
        (lambda lines: [*lines, "a b c"], r"vocab\.bpe is damaged: 'a b c' is not a merge"),
    ],
)
def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path, change, complaint):
    directory = write_model(tmp_path / "bad")
    path = directory / "vocab.bpe"
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    path.write_text("\n".join(change(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        load_encoder_hparams_and_params(str(directory))


def test_a_vocabulary_may_be_padded_but_not_be_too_small(tmp_path):
    directory = write_model(tmp_path / "padded", TINY | {"n_vocab": 320}, n_tokens=300)
    encoder, _, params = load_encoder_hparams_and_params(str(directory))
    assert (len(encoder.encoder), len(params["wte"])) == (300, 320)
    directory = write_model(tmp_path / "small", TINY | {"n_vocab": 280}, n_tokens=300)
    with pytest.raises(ValueError, match=r"300 tokens, but n_vocab .* is 280"):
        load_encoder_hparams_and_params(str(directory))


def test_a_written_file_is_what_the_library_reads_and_begins_its_data_on_a_page(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(1000, 700)).astype(np.float32),  # more than a block
        "b": rng.integers(-128, 128, 5).astype(np.int8),
        "c": np.float32(3).reshape(()),
        "transposed": rng.normal(size=(3, 4)).astype(np.float32).T,
        "empty": np.zeros((0, 3), np.float32),
        "é": rng.normal(size=BLOCK).astype(np.float32),
    }
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, {"made by": "a test"})
    found = load_file(path)
    mapped, metadata = map_tensors(path)
    assert metadata == {"made by": "a test"}
    assert found.keys() == mapped.keys() == tensors.keys()
    for name, array in tensors.items():
        for other in (found[name], mapped[name]):
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(other, array)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 4096 == 4096 - 8
    assert list(tmp_path.iterdir()) == [path]


def test_special_tokens_that_no_merge_makes_are_part_of_a_vocabulary(tmp_path):
    directory = write_model(tmp_path / "special", TINY | {"n_vocab": 301}, n_tokens=300)
    vocabulary = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    (directory / "encoder.json").write_text(json.dumps(vocabulary | {"<the end>": 300}), encoding="utf-8")
    encoder = load_encoder_hparams_and_params(str(directory))[0]
    assert encoder.decode([*encoder.encode("a"), 300]) == "a<the end>"
    for token, shown in (("word", "word"), ("<\ud800>", r"<\\ud800>")):
        (directory / "encoder.json").write_text(json.dumps(vocabulary | {token: 300}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"no merge makes '{shown}'"):
            load_encoder_hparams_and_params(str(directory))


def test_files_are_read_as_utf8_whatever_the_locale(tiny_model):
    code = "import sys, utils; print(len(utils.load_encoder_hparams_and_params(sys.argv[1])[0].encoder))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tiny_model)]
    done = subprocess.run(command, env=env, cwd=Path(utils.__file__).parent, capture_output=True, check=True)
    assert done.stdout == b"300\n"


def test_lines_of_a_table_written_on_windows_are_read_too(tmp_path):
    write_tables(tmp_path)
    expected = utils.read_encoder(tmp_path).bpe_ranks
    merges = (tmp_path / "vocab.bpe").read_bytes()
    (tmp_path / "vocab.bpe").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert utils.read_encoder(tmp_path).bpe_ranks == expected


# Finding


def test_a_name_is_looked_up_in_models_dir_then_beside_the_code_then_as_a_path(tmp_path, monkeypatch):
    beside = tmp_path / "code"
    monkeypatch.setattr(utils, "CODE", beside)
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
    monkeypatch.setattr(utils, "CODE", tmp_path / "code")
    for directory in ("models/mine", "code/models/bundled"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "models" / "a file").touch()
    with pytest.raises(FileNotFoundError, match=r"124M, 355M, 774M, 1558M.* models in models: bundled, mine;"):
        find_model(name)
    assert {path.name for path in tmp_path.iterdir()} == {"code", "models"}, "and nothing is made"

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import utils
from gpt2 import gpt2
from helpers import TINY, run, write_checkpoint, write_model, write_tables
from utils import (
    BLOCK,
    CHECKPOINT_DATA,
    CHECKPOINT_FILES,
    convert_checkpoint,
    count_bytes,
    find_model,
    flatten,
    load_encoder_hparams_and_params,
    map_tensors,
    param_shapes,
    replacing,
    save_tensors,
    tensor_name,
)

ALL_FILES = {"checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001", "model.ckpt.index"}
ALL_FILES |= {"model.ckpt.meta", "vocab.bpe"}


def assert_same(params, expected):
    found, expected = flatten(params, tensor_name), flatten(expected, tensor_name)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


# The whole path of a released model


def test_a_released_model_is_downloaded_converted_and_mapped(mirror, tmp_path, tiny_params, capfd):
    encoder, hparams, params = load_encoder_hparams_and_params("124M", str(tmp_path / "models"))
    directory = tmp_path / "models" / "124M"
    assert hparams == TINY
    assert encoder.decode(encoder.encode("héllo")) == "héllo"
    assert_same(params, tiny_params)
    assert sorted(mirror.requests) == sorted(f"/124M/{file}" for file in ALL_FILES)
    assert {path.name for path in directory.iterdir()} == ALL_FILES | {"model.safetensors", "model.source.json"}
    assert "model.ckpt.index" in json.loads((directory / "model.source.json").read_text())
    assert capfd.readouterr().err.count("would free") == 1, "how much space deleting the checkpoint frees"

    for file in CHECKPOINT_FILES:
        (directory / file).unlink()
    again = load_encoder_hparams_and_params("124M", str(tmp_path / "models"))[2]
    assert_same(again, params)
    assert len(mirror.requests) == len(ALL_FILES), "checkpoint files are not missed where converted weights are there"


def test_the_converted_file_has_hugging_faces_names_and_shapes(mirror, tmp_path):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    shapes = {name: array.shape for name, array in load_file(tmp_path / "124M" / "model.safetensors").items()}
    assert shapes["wte.weight"] == (300, 48)
    assert shapes["h.1.attn.c_attn.weight"] == (48, 144)
    assert shapes["h.0.mlp.c_proj.bias"] == (48,)
    assert shapes["ln_f.weight"] == (48,)
    assert len(shapes) == 2 + 12 * TINY["n_layer"] + 2


def test_only_what_is_missing_is_downloaded(mirror, tmp_path):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    for file in ("vocab.bpe", "model.safetensors", "model.ckpt.index"):
        (tmp_path / "124M" / file).unlink()
    mirror.requests.clear()
    load_encoder_hparams_and_params("124M", str(tmp_path))
    assert sorted(mirror.requests) == ["/124M/model.ckpt.index", "/124M/vocab.bpe"]


def test_weights_that_were_cut_short_are_downloaded_again(mirror, tmp_path, tiny_params):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    (tmp_path / "124M" / "model.safetensors").unlink()
    os.truncate(tmp_path / "124M" / CHECKPOINT_DATA, 1000)
    assert_same(load_encoder_hparams_and_params("124M", str(tmp_path))[2], tiny_params)


def test_tensorflow_is_not_imported_by_the_program(mirror, tmp_path):
    code = """if True:
        import sys, utils
        utils.load_encoder_hparams_and_params("124M", sys.argv[1])
        assert "tensorflow" not in sys.modules, "while converting"
        if "--converted" in sys.argv:
            late = {"tensorflow", "requests", "tqdm", "fire", "download", "safetensors.numpy"}
            assert not late & set(sys.modules), late & set(sys.modules)
    """
    for flags in ([], ["--converted"]):
        command = [sys.executable, "-c", code, str(tmp_path), *flags]
        subprocess.run(command, check=True, cwd=Path(utils.__file__).parent)


# Converting


def test_without_tensorflow_one_line_says_what_to_install(released, monkeypatch):
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorflow"):
        convert_checkpoint(released / "124M")
    assert not (released / "124M" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (
            "model/wpe",
            lambda a: np.where(np.arange(48) == 7, np.float32(np.nan), a),
            "model/wpe holds numbers that are infinite",
        ),
        ("model/h1/mlp/c_fc/b", lambda a: a + np.float32(np.inf), "model/h1/mlp/c_fc/b holds numbers"),
        ("model/h0/attn/c_attn/w", lambda a: a.swapaxes(1, 2), r"model/h0/attn/c_attn/w has the shape \[144, 48\]"),
        ("model/ln_f/g", lambda a: a.view(np.int32), "model/ln_f/g has the type int32"),
    ],
)
def test_a_bad_tensor_in_a_checkpoint_is_named(tmp_path, tiny_tensors, name, change, complaint):
    directory = write_checkpoint(tmp_path / "bad", tiny_tensors | {name: change(tiny_tensors[name])})
    with pytest.raises(ValueError, match=complaint):
        convert_checkpoint(directory)
    assert not list(directory.glob("*safetensors*"))


def test_missing_and_surplus_tensors_in_a_checkpoint_are_named(tmp_path, tiny_tensors):
    tensors = dict(tiny_tensors)
    tensors["model/other"] = tensors.pop("model/ln_f/b")
    directory = write_checkpoint(tmp_path / "bad", tensors)
    with pytest.raises(ValueError, match=r"model/ln_f/b is missing; model/other is not part"):
        convert_checkpoint(directory)


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "bad")
    data = bytearray((directory / CHECKPOINT_DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / CHECKPOINT_DATA).write_bytes(data)
    with pytest.raises(ValueError, match=r"could not be converted.*[Cc]hecksum"):
        convert_checkpoint(directory)


def test_a_checkpoint_of_the_wrong_length_is_refused_before_tensorflow_starts(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "cut")
    os.truncate(directory / CHECKPOINT_DATA, 1000)
    with pytest.raises(ValueError, match=r"1,000 bytes, where hparams.json implies 290,304"):
        load_encoder_hparams_and_params(str(directory))


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
    assert_same(params, tiny_params)
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
        (lambda t: t.update({"ln_f.bias": t["ln_f.bias"].astype(np.float16)}), "ln_f.bias has the type F16"),
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


@pytest.mark.parametrize("damage", [cut, cut_at_a_line, empty, garbage, nested, wrong_json, missing])
@pytest.mark.parametrize("file", ["encoder.json", "vocab.bpe", "hparams.json", "model.safetensors"])
def test_a_damaged_file_is_refused_by_name(tmp_path, file, damage):
    directory = write_model(tmp_path / "bad")
    damage(directory / file)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_encoder_hparams_and_params(str(directory))
    assert file in str(raised.value)
    assert "\n" not in str(raised.value)


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
    ],
    ids=str,
)
def test_hyperparameters_of_no_gpt2_are_refused(tmp_path, change):
    directory = write_model(tmp_path / "bad")
    (directory / "hparams.json").write_text(json.dumps(TINY | change), encoding="utf-8")
    with pytest.raises(ValueError, match=next(iter(change))):
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
    (directory / "encoder.json").write_text(json.dumps(vocabulary | {"word": 300}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no merge makes 'word'"):
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


@pytest.mark.parametrize("name", ["125M", "", "../nothing", "a/b", "a\0b", "124M/", "/nowhere"])
def test_an_unknown_model_is_refused_with_a_list_of_the_known(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "CODE", tmp_path / "code")
    for directory in ("models/mine", "code/models/bundled"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "models" / "a file").touch()
    with pytest.raises(FileNotFoundError, match=r"124M, 355M, 774M, 1558M.* models in models: bundled, mine;"):
        find_model(name)
    assert {path.name for path in tmp_path.iterdir()} == {"code", "models"}, "and nothing is made"


def test_nothing_is_downloaded_into_a_directory_that_was_named_by_path(mirror, tmp_path):
    (tmp_path / "124M").mkdir()
    with pytest.raises(FileNotFoundError, match=r"encoder\.json is missing"):
        load_encoder_hparams_and_params(str(tmp_path / "124M"))
    assert mirror.requests == []


# Writing


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


@pytest.mark.skipif(os.name != "posix", reason="the permissions of files are POSIX")
def test_converted_weights_can_be_read_by_those_who_can_read_new_files(mirror, tmp_path):
    load_encoder_hparams_and_params("124M", str(tmp_path))
    (tmp_path / "new").touch()
    mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    for path in (tmp_path / "124M").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode, path.name


# From the command line


def test_the_command_line_generates_from_a_checkpoint_that_it_downloads_converts_and_maps(
    mirror, tmp_path, tiny_params
):
    from gpt2 import generate

    arguments = ("Hello there", "--n_tokens_to_generate", "8")
    first = run("gpt2.py", *arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    encoder, hparams, _ = load_encoder_hparams_and_params("124M", str(tmp_path / "models"))
    ids = generate(encoder.encode("Hello there"), tiny_params, hparams["n_head"], 8)
    assert first.stdout.decode() == encoder.decode(ids) + "\n"
    n_requests = len(mirror.requests)
    second = run("gpt2.py", *arguments, cwd=tmp_path)
    assert (second.stdout, second.stderr) == (first.stdout, b"")
    assert len(mirror.requests) == n_requests


def test_a_failed_conversion_is_one_line_and_status_1(tmp_path, released):
    directory = shutil.copytree(released / "124M", tmp_path / "bad")
    (directory / "model.ckpt.index").write_bytes(b"garbage")
    result = run("gpt2.py", "x", "--model_size", str(directory))
    assert result.returncode == 1
    assert result.stdout == b""
    *progress, error = result.stderr.decode().splitlines()
    assert error.startswith("gpt2.py: ")
    assert "could not be converted" in error
    assert len(progress) == 1

"""Directories as transformers writes them: read, downloaded from a stand-in of the hub, and exported."""

import json
import math
import mmap
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import huggingface
from encoder import END_OF_TEXT
from gpt2 import generate, gpt2
from helpers import BUNDLED, TINY, assert_same_params, random_params, run, serving, tiny_tables, write_model
from hub_server import Hub, make_handler
from lens import attribution, trace
from test_gpt2 import TOLERANCE, assert_close
from utils import flatten, load_encoder_hparams_and_params, read_encoder, tensor_name, tensors_of

CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_positions": 32, "n_embd": 48,
    "n_head": 4, "n_layer": 3, "bos_token_id": 299, "eos_token_id": 299,
}  # fmt: skip
EVERYTHING = {
    "layer_norm_epsilon": 0.1, "n_inner": 80, "tie_word_embeddings": False, "vocab_size": 320,
    "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "n_inner": {"n_inner": 80},
    "eps": {"layer_norm_epsilon": 0.1},
    "small eps": {"layer_norm_epsilon": 1e-3},
    "no eps": {"layer_norm_epsilon": 0.0},
    "not tied": {"tie_word_embeddings": False},
    "not scaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scaled by layer only": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "reordered": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "another name for gelu": {"activation_function": "gelu_pytorch_tanh"},
    "padded": {"vocab_size": 320},
    "everything": EVERYTHING,
}
IDS = np.random.default_rng(1).integers(0, 300, 20).tolist()
TEXTS = ["def encode(self, text):", "  1 + 1 = 2\n\n日本語 ", "<|endoftext|>a <|endoftext|>", ""]


def tensors_for(config, seed=0):
    """Random weights for a config.json, by the names without a prefix."""
    names = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_inner": "n_inner"}
    hparams = {name: config.get(names.get(name, name)) for name in (*TINY, "n_inner")}
    tensors = flatten(random_params({k: v for k, v in hparams.items() if v is not None}, seed), tensor_name)
    tensors["wte.weight"][300:] *= 0.1  # padding that greedy text does not come upon
    if config.get("tie_word_embeddings") is False:
        tensors["lm_head.weight"] = random_params({**TINY, "n_vocab": config["vocab_size"]}, seed + 1)["wte"]
        tensors["lm_head.weight"][300:] *= 0.1
    return tensors


def prefixed(tensors):
    return {name if name.startswith("lm_head") else f"transformer.{name}": array for name, array in tensors.items()}


def added(i, content, **flags):
    """An added token as tokenizer.json has it, special unless `flags` say otherwise."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags
    return {"id": i, "content": content, **flags}


def tokenizer_json(entries=(), pairs=False, **model):
    vocabulary, merges = tiny_tables()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added(299, END_OF_TEXT), *entries],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": [list(pair) if pairs else " ".join(pair) for pair in merges], **model,
        },
    }  # fmt: skip


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_tables(directory):
    """The older layout of a tokenizer: vocab.json and merges.txt."""
    vocabulary, merges = tiny_tables()
    write_json(directory / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def write_huggingface(directory, config=None, tensors=None, tokenizer=None):
    """A directory in the layout of transformers; of CONFIG, with `config` instead where it says otherwise."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | (config or {})
    write_json(directory / "config.json", config)
    write_json(directory / "tokenizer.json", tokenizer or tokenizer_json())
    save_file(prefixed(tensors_for(config)) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def write_shards(directory, tensors, n=2, suffix="safetensors", stem="model", save=save_file):
    """The weights as `n` files and an index instead of one file."""
    for path in directory.glob("model.safetensors"):
        path.unlink()
    names, places = list(tensors), {}
    for i in range(n):
        file = f"{stem}-{i + 1:05}-of-{n:05}.{suffix}"
        save({name: tensors[name] for name in names[i::n]}, directory / file)
        places |= dict.fromkeys(names[i::n], file)
    index = directory / f"{stem}.{suffix}.index.json"
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": places})
    return index


def load(directory):
    return load_encoder_hparams_and_params(str(directory))


def same_params(params, expected):
    assert_same_params(tensors_of(params), tensors_of(expected))
    norms = [[norm.get("eps") for norm in (p["ln_f"], *(b["ln_1"] for b in p["blocks"]))] for p in (params, expected)]
    assert norms[0] == norms[1]


def reference_logits(ids, tensors, config):
    """GPT-2 in float64, as modeling_gpt2.py has it, of the tensors and the config.json as they are in the files."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    n, n_head, eps = len(ids), config["n_head"], config.get("layer_norm_epsilon", 1e-5)

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["wte.weight"][ids] + t["wpe.weight"][:n]
    for i in range(config["n_layer"]):
        qkv = np.split(dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        q, k, v = (part.reshape(n, n_head, -1).swapaxes(0, 1) for part in qkv)
        scores = q @ k.swapaxes(1, 2)
        if config.get("scale_attn_weights", True):
            scores = scores / math.sqrt(q.shape[-1])
        if config.get("scale_attn_by_inverse_layer_idx", False):
            scores = scores / (i + 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * np.tri(n)
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + dense((weights @ v).swapaxes(0, 1).reshape(n, -1), f"h.{i}.attn.c_proj")
        a = dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        a = a / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + dense(a, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t.get("lm_head.weight", t["wte.weight"]).T


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The path of a directory of transformers'; for reading only."""
    return write_huggingface(tmp_path_factory.mktemp("hf") / "plain")


@pytest.fixture(scope="module")
def plain_tensors():
    return tensors_for(CONFIG)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The path of a directory with all that config.json can ask for, and added tokens; for reading only."""
    tokenizer = tokenizer_json(ADDED)
    return write_huggingface(tmp_path_factory.mktemp("hf") / "everything", EVERYTHING, tokenizer=tokenizer)


# The weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_that_the_config_asks_for(tmp_path, variant):
    config = CONFIG | VARIANTS[variant]
    tensors = tensors_for(config)
    _, hparams, params = load(write_huggingface(tmp_path / "model", config, prefixed(tensors)))
    expected = reference_logits(IDS, tensors, config)
    assert_close(gpt2(IDS, **params, n_head=hparams["n_head"]), expected)
    if variant not in ("plain", "small eps", "no eps", "padded", "another name for gelu"):
        plain = reference_logits(IDS, tensors_for(CONFIG), CONFIG)
        assert np.abs(expected[:, :300] - plain).max() > 100 * TOLERANCE * np.ptp(plain), "the variant matters"


def test_an_epsilon_of_its_own_is_in_each_norm_and_the_usual_one_is_not(everything, plain):
    for directory, eps in ((plain, None), (everything, 0.1)):
        params = load(directory)[2]
        norms = [params["ln_f"], *(block[ln] for block in params["blocks"] for ln in ("ln_1", "ln_2"))]
        assert [norm.get("eps") for norm in norms] == [eps] * 7


def test_float32_is_mapped_and_read_only(plain, plain_tensors):
    params = load(plain)[2]
    assert_same_params(tensors_of(params), plain_tensors)
    pages = set()
    for array in tensors_of(params).values():
        assert (array.dtype, array.flags.owndata, array.flags.writeable) == (np.float32, False, False)
        while isinstance(array, np.ndarray):
            array = array.base
        pages.add(id(array.obj if isinstance(array, memoryview) else array))
        assert isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)
    assert len(pages) == 1


def test_a_scale_is_folded_into_the_queries_alone(tmp_path, plain_tensors):
    params = load(write_huggingface(tmp_path / "model", {"scale_attn_weights": False}))[2]
    for name, array in tensors_of(params).items():
        expected = plain_tensors[name]
        assert not array.flags.writeable
        if ".c_attn." in name:
            np.testing.assert_array_equal(array[..., 48:], expected[..., 48:])
            np.testing.assert_allclose(array[..., :48], expected[..., :48] * math.sqrt(12), rtol=1e-6)
        else:
            np.testing.assert_array_equal(array, expected)
            assert not array.flags.owndata


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float32])
def test_names_with_or_without_prefix_and_the_masks_buffers_make_no_difference(
    tmp_path, plain_tensors, prefix, n_shards, dtype
):
    tensors = dict(plain_tensors)
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = np.tri(32).astype(dtype).reshape(1, 1, 32, 32)
        tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4).astype(np.float32)
    tensors = prefixed(tensors) if prefix else tensors
    directory = write_huggingface(tmp_path / "model", tensors=tensors)
    if n_shards > 1:
        write_shards(directory, tensors, n_shards)
    assert_same_params(tensors_of(load(directory)[2]), plain_tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_an_lm_head_that_is_wte_is_left_out_and_another_is_taken_whatever_the_config_says(
    tmp_path, plain_tensors, tied
):
    wte = plain_tensors["wte.weight"]
    for head in (wte.copy(), np.concatenate([wte[:-1], wte[-1:] + 1])):
        tensors = plain_tensors | {"lm_head.weight": head}
        params = load(write_huggingface(tmp_path / "model", {"tie_word_embeddings": tied}, tensors))[2]
        assert ("lm_head" in params) == (head[-1, 0] != wte[-1, 0])
        np.testing.assert_array_equal(params.get("lm_head", params["wte"]), head)


def test_an_untied_model_without_its_lm_head_is_refused(tmp_path, plain_tensors):
    directory = write_huggingface(tmp_path / "model", {"tie_word_embeddings": False}, plain_tensors)
    with pytest.raises(ValueError, match=r"tie_word_embeddings = false, but lm_head\.weight is missing"):
        load(directory)


def save_bfloat16(tensors, path):
    """A safetensors file with the upper halves of float32; NumPy, and so the library with it, has no such type."""
    header, data = {}, b""
    for name, array in tensors.items():
        halves = (np.ascontiguousarray(array).view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(halves)]
        }  # fmt: skip
        data += halves
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_bfloat16_is_widened_bit_by_bit(tmp_path, plain_tensors):
    special = [0x0001, 0x807F, 0x0080, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0x7F7F]  # subnormal, 0, infinite, NaN, largest
    tensors = {name: array.copy() for name, array in plain_tensors.items()}
    tensors["wpe.weight"][0, :8] = (np.array(special, "<u4") << 16).view("<f4")
    tensors["lm_head.weight"] = tensors["wte.weight"]
    directory = write_huggingface(tmp_path / "model")
    save_bfloat16(prefixed(tensors), directory / "model.safetensors")
    params = load(directory)[2]
    assert "lm_head" not in params
    for name, array in tensors_of(params).items():
        expected = tensors[name].view("<u4") & 0xFFFF0000
        assert (array.dtype, array.flags.writeable, array.flags.c_contiguous) == (np.float32, False, True)
        np.testing.assert_array_equal(array.view("<u4"), expected)


def test_float16_is_widened_exactly(tmp_path, plain_tensors):
    tensors = {name: array.astype(np.float16) for name, array in plain_tensors.items()}
    tensors["wpe.weight"][0, :5] = [2**-24, -(2**-15), -0.0, np.inf, 65504]
    params = load(write_huggingface(tmp_path / "model", tensors=tensors))[2]
    for name, array in tensors_of(params).items():
        assert (array.dtype, array.flags.writeable) == (np.float32, False)
        np.testing.assert_array_equal(array.astype(np.float64), tensors[name].astype(np.float64))
    assert math.copysign(1, params["wpe"][0, 2]) == -1


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.int8, np.uint8, np.bool_])
def test_tensors_of_other_types_are_refused_by_name(tmp_path, plain_tensors, dtype):
    tensors = plain_tensors | {"h.1.ln_2.bias": plain_tensors["h.1.ln_2.bias"].astype(dtype)}
    with pytest.raises(ValueError, match=r"h\.1\.ln_2\.bias has the type"):
        load(write_huggingface(tmp_path / "model", tensors=tensors))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), r"h\.1\.ln_2\.bias is missing"),
        (
            lambda t: t.update({"h.9.ln_1.weight": np.ones(48, np.float32)}),
            "h.9.ln_1.weight is not part of",
        ),
        (lambda t: t.update({"h.0.ln_1.bias": np.zeros(48, np.float32)}), r"h\.0\.ln_1\.bias is there twice"),
        (lambda t: t.update({"lm_head.weight": np.zeros((299, 48), np.float32)}), r"lm_head\.weight has the shape"),
        (
            lambda t: t.update({"h.3.attn.bias": np.zeros(1, np.float32), "h.0.attn.biased": np.ones(1, np.float32)}),
            "biased is not",
        ),
        (lambda t: t.pop("transformer.wte.weight"), r"wte\.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path, plain_tensors, change, complaint):
    tensors = prefixed(plain_tensors)
    change(tensors)
    with pytest.raises(ValueError, match=complaint):
        load(write_huggingface(tmp_path / "model", tensors=tensors))


def test_the_head_of_a_classifier_is_left_out_and_said(tmp_path, capsys, plain, plain_tensors):
    write_huggingface(tmp_path, {}, plain_tensors | {"score.weight": np.zeros((2, 48), np.float32)})
    assert_same_params(load(tmp_path)[2], load(plain)[2])
    assert "not used, as no part of a GPT-2: score.weight" in capsys.readouterr().err


def test_a_directory_without_weights_says_which_files_it_could_have(tmp_path):
    directory = write_huggingface(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin is there"):
        load(directory)


def test_with_hparams_json_a_directory_is_one_of_ours(tmp_path, tiny_params):
    directory = write_model(tmp_path / "model", TINY, tiny_params)
    write_json(directory / "config.json", {"model_type": "not looked at"})
    assert_same_params(load(directory)[2], tiny_params)


# Several files


def test_one_file_is_taken_before_several_and_safetensors_before_pytorchs(tmp_path, plain_tensors):
    directory = write_huggingface(tmp_path / "model", tensors=plain_tensors)
    (directory / "pytorch_model.bin").write_bytes(b"not looked at")
    index = write_shards(tmp_path, plain_tensors)
    shutil.copy(index, directory / index.name)
    assert_same_params(tensors_of(load(directory)[2]), plain_tensors)
    write_shards(directory, plain_tensors)
    assert_same_params(tensors_of(load(directory)[2]), plain_tensors)


def test_a_missing_part_is_named(tmp_path, plain_tensors):
    directory = write_huggingface(tmp_path / "model")
    write_shards(directory, plain_tensors)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(directory)


def test_a_tensor_in_two_parts_is_refused(tmp_path, plain_tensors):
    directory = write_huggingface(tmp_path / "model")
    write_shards(directory, plain_tensors)
    second = directory / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"transformer.wte.weight": plain_tensors["wte.weight"]}, second)
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: wte\.weight is there twice"):
        load(directory)


@pytest.mark.parametrize(
    "places",
    [
        None, [], {}, "model.safetensors", 1, {"wte.weight": 1}, {"wte.weight": None}, {"wte.weight": ""},
        {"wte.weight": ".."}, {"wte.weight": "../x.safetensors"}, {"wte.weight": "/x.safetensors"},
        {"wte.weight": "a/x.safetensors"}, {"wte.weight": "..\\x"}, {"wte.weight": "x\n"}, {"wte.weight": ["x"]},
        {"wte.weight": "*"},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_names_no_files_of_its_directory_is_refused(tmp_path, plain_tensors, places):
    directory = write_huggingface(tmp_path / "model")
    save_file(plain_tensors, tmp_path / "x.safetensors")
    index = write_shards(directory, plain_tensors)
    write_json(index, {"weight_map": places})
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged: weight_map"):
        load(directory)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"], ids=str)
def test_an_index_that_is_no_json_is_refused(tmp_path, plain_tensors, content):
    directory = write_huggingface(tmp_path / "model")
    write_shards(directory, plain_tensors).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        load(directory)


# PyTorch's files


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def with_bin(tmp_path):
    """A directory that has pytorch_model.bin, still empty, and no other weights."""
    directory = write_huggingface(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").touch()
    return directory


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("n_shards", [1, 2])
def test_pytorchs_files_are_read_old_and_new_whole_and_in_parts(
    torch, with_bin, plain_tensors, dtype, zipped, n_shards
):
    tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in prefixed(plain_tensors).items()}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)

    def save(part, path):
        torch.save(part, path, _use_new_zipfile_serialization=zipped)

    save(tensors, with_bin / "pytorch_model.bin")
    if n_shards > 1:
        (with_bin / "pytorch_model.bin").unlink()
        write_shards(with_bin, tensors, n_shards, "bin", "pytorch_model", save)
    params = load(with_bin)[2]
    expected = {name.removeprefix("transformer."): array.float().numpy() for name, array in tensors.items()}
    del expected["h.0.attn.bias"]
    assert_same_params(tensors_of(params), expected)
    assert {(a.dtype.str, a.flags.writeable) for a in tensors_of(params).values()} == {("<f4", False)}


@pytest.mark.reference
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_new_file_of_pytorchs_is_mapped(torch, with_bin, plain_tensors):
    path = with_bin / "pytorch_model.bin"
    torch.save({name: torch.tensor(array) for name, array in plain_tensors.items()}, path)
    params = load(with_bin)[2]
    assert str(path) in Path("/proc/self/maps").read_text()
    assert_same_params(tensors_of(params), plain_tensors)


class Evil:
    """What creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.reference
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(torch, with_bin, tmp_path, form):
    path, evil = with_bin / "pytorch_model.bin", {"wte.weight": Evil(tmp_path / "made")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is damaged, or holds other things than tensors"
    ) as raised:
        load(with_bin)
    assert not (tmp_path / "made").exists()
    assert "\n" not in str(raised.value)
    if form == "zip":
        torch.load(path, weights_only=False)
        assert (tmp_path / "made").exists(), "it would have"


@pytest.mark.reference
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), b"x" * 1000, b"\x80\x02]q\x00."], ids=len)
def test_a_damaged_file_of_pytorchs_is_refused(torch, with_bin, content):
    (with_bin / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged") as raised:
        load(with_bin)
    assert "\n" not in str(raised.value)


@pytest.mark.reference
@pytest.mark.parametrize("name", [5, None, ("a",), "a\nb"], ids=repr)
def test_a_file_of_pytorchs_with_other_things_than_names_is_refused(torch, with_bin, name):
    torch.save({name: torch.zeros(2)}, with_bin / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or .* is no name of a tensor"):
        load(with_bin)


@pytest.mark.reference
@pytest.mark.parametrize("value", [3, [1.0], {"a": 1}, "text", None], ids=str)
def test_a_file_of_pytorchs_with_other_things_than_tensors_is_refused(torch, with_bin, value):
    torch.save({"wte.weight": value}, with_bin / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or holds other things"):
        load(with_bin)


def test_without_pytorch_one_line_says_how_to_convert(with_bin, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install torch; or python huggingface\.py export .*model OUT") as raised:
        load(with_bin)
    assert "\n" not in str(raised.value)
    write_huggingface(with_bin)
    load(with_bin)  # of safetensors it is not needed


def test_a_pytorch_whose_reading_is_not_safe_is_not_used(with_bin, monkeypatch):
    class Torch:
        __version__ = "2.5.1+cpu"

    monkeypatch.setitem(sys.modules, "torch", Torch)
    with pytest.raises(ImportError, match=r"PyTorch 2\.5\.1\+cpu: pip install --upgrade torch"):
        load(with_bin)


# config.json


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("model_type", None),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("add_cross_attention", True),
        ("add_cross_attention", 0),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name_and_value(tmp_path, name, value):
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        load(write_huggingface(tmp_path / "model", {name: value}))
    assert f"{name} is {json.dumps(value)}" in str(raised.value)


def test_what_does_not_change_the_model_is_accepted(tmp_path, plain_tensors):
    config = {
        "pruned_heads": {}, "quantization_config": None, "add_cross_attention": False, "resid_pdrop": 0.5,
        "reorder_and_upcast_attn": True, "use_cache": False, "n_inner": 192, "scale_attn_weights": True,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_pytorch_tanh", "summary_activation": "relu",
    }  # fmt: skip
    _, hparams, params = load(write_huggingface(tmp_path / "model", config))
    assert hparams == TINY | {"n_layer": 3}
    assert_same_params(params, load(write_huggingface(tmp_path / "plain"))[2])


def test_what_config_json_leaves_out_is_as_in_gpt2config(tmp_path):
    write_json(tmp_path / "config.json", {})
    config = huggingface.read_config(tmp_path / "config.json")
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None}
    rest = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    ends = {"tie_word_embeddings": True, "bos_token_id": 50256, "eos_token_id": 50256}
    assert config == sizes | rest | ends


def test_other_names_of_the_sizes_are_known(tmp_path, plain_tensors):
    names = {
        "n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
    }  # fmt: skip
    directory = write_huggingface(tmp_path / "model")
    write_json(directory / "config.json", {names.get(name, name): value for name, value in CONFIG.items()})
    _, hparams, params = load(directory)
    assert hparams == TINY | {"n_layer": 3}
    assert_same_params(tensors_of(params), plain_tensors)


SIZES = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
WRONG = [(name, value) for name in SIZES for value in ("48", -1, 0, True, 1.5, None, [48], 10**30, float("nan"))]
WRONG += [("n_inner", value) for value in ("96", -1, 0, True, 1.5, [96], 10**9)]
WRONG += [("layer_norm_epsilon", value) for value in ("1e-5", -1, True, None, float("nan"), float("inf"), [1e-5])]
FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
WRONG += [(name, value) for name in FLAGS for value in ("true", 1, 0, None, [])]
WRONG += [("n_head", 5)]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_values_of_no_gpt2_are_refused_by_name(tmp_path, name, value):
    write_json(tmp_path / "config.json", CONFIG | {name: value})
    with pytest.raises(ValueError, match=rf"config\.json.* {name} ") as raised:
        huggingface.read_config(tmp_path / "config.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000], ids=lambda c: str(c[:4]))
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path, file, content):
    directory = write_huggingface(tmp_path / "model")
    (directory / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        load(directory)


# What ends and begins a text


@pytest.mark.parametrize(
    ("config", "generation", "eot_id", "bos_id"),
    [
        ({}, None, 299, 299),
        ({"eos_token_id": 5, "bos_token_id": 7}, None, 5, 7),
        ({"eos_token_id": [5]}, None, 5, 299),
        ({"eos_token_id": 5}, {"eos_token_id": 9}, 9, 299),
        ({"eos_token_id": 5}, {"bos_token_id": 9}, None, 9),
        ({"eos_token_id": 5}, {}, None, 299),
        ({"eos_token_id": 5}, {"eos_token_id": [9]}, 9, 299),
        ({"eos_token_id": 0, "bos_token_id": 0}, None, 0, 0),
        ({"eos_token_id": 300}, None, None, 299),
        ({"eos_token_id": 50256, "bos_token_id": 50256}, None, None, 299),
        ({"eos_token_id": 5, "bos_token_id": 50256}, None, 5, 5),
        ({"eos_token_id": -1}, None, None, 299),
        ({"eos_token_id": None, "bos_token_id": None}, None, None, 299),
        ({"eos_token_id": 5}, {"eos_token_id": None}, None, 299),
    ],
)
def test_the_ids_that_end_and_begin_a_text(tmp_path, config, generation, eot_id, bos_id):
    directory = write_huggingface(tmp_path / "model", config)
    if generation is not None:
        write_json(directory / "generation_config.json", generation)
    encoder = load(directory)[0]
    assert (encoder.eot_id, encoder.bos_id) == (eot_id, bos_id)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("name", "value", "is_plain"),
    [
        ("repetition_penalty", 1.5, False),
        ("repetition_penalty", 1.0, True),
        ("no_repeat_ngram_size", 3, False),
        ("num_beams", 4, False),
        ("suppress_tokens", [1], False),
        ("bad_words_ids", None, True),
        ("temperature", 0.7, True),
    ],
)
def test_what_generation_does_elsewhere_and_not_here_is_said(tmp_path, capsys, file, name, value, is_plain):
    write_huggingface(tmp_path, {name: value} if file == "config.json" else {})
    if file != "config.json":
        write_json(tmp_path / file, {name: value})
    load(tmp_path)
    said = capsys.readouterr().err
    assert said == "" if is_plain else f"{name} = {json.dumps(value)}" in said


@pytest.mark.parametrize("value", [[5, 6], [], "299", 1.5, True, {}, [True], ["5"]], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ends_that_are_not_one_token_are_refused(tmp_path, file, value):
    directory = write_huggingface(tmp_path / "model")
    write_json(directory / file, (CONFIG if file == "config.json" else {}) | {"eos_token_id": value})
    with pytest.raises(ValueError, match=r"eos_token_id is .*: only one token's id is supported"):
        load(directory)


def test_an_empty_prompt_starts_from_the_token_that_begins_a_text(tmp_path):
    directory = write_huggingface(tmp_path / "model", {"bos_token_id": 7, "eos_token_id": None})
    encoder, hparams, params = load(directory)
    shown = run("gpt2.py", "", f"--model_size={directory}", "--n_tokens_to_generate=4")
    expected = encoder.decode(generate([7], params, hparams["n_head"], 4))
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert shown.stdout == f"{expected}\n".encode()


# The tokenizer


@pytest.mark.parametrize("layout", ["strings", "pairs", "tables", "tables and tokenizer.json"])
def test_every_layout_of_a_tokenizer_gives_the_same_ids(tmp_path, tiny_encoder, layout):
    directory = write_huggingface(tmp_path / "model", tokenizer=tokenizer_json(pairs=layout == "pairs"))
    if "tables" in layout:
        write_tables(directory)
    if layout == "tables":
        (directory / "tokenizer.json").unlink()
    encoder = read_encoder(directory)
    for text in TEXTS:
        for allow_special in (False, True):
            ids = encoder.encode(text, allow_special)
            assert ids == tiny_encoder.encode(text, allow_special)
            assert encoder.decode(ids) == text


def change_at(value, path, change):
    """`value` with another one at the dotted `path`."""
    name, _, rest = path.partition(".")
    return value | {name: change_at(value[name], rest, change) if rest else change}


TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
WITH_BOS = TEMPLATE | {"single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, *TEMPLATE["single"]]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer.add_prefix_space", True),
        ("pre_tokenizer.use_regex", False),
        ("pre_tokenizer.type", "Whitespace"),
        ("pre_tokenizer", None),
        ("pre_tokenizer", [1]),
        ("decoder.type", "WordPiece"),
        ("decoder", None),
        ("model.type", "WordPiece"),
        ("model.type", "Unigram"),
        ("model.dropout", 0.1),
        ("model.continuing_subword_prefix", "##"),
        ("model.end_of_word_suffix", "</w>"),
        ("model.byte_fallback", True),
        ("model.ignore_merges", True),
    ],
)
def test_a_tokenizer_that_works_otherwise_is_refused_by_name_and_value(tmp_path, path, value):
    write_huggingface(tmp_path, tokenizer=change_at(tokenizer_json(), path, value))
    with pytest.raises(ValueError, match=r"tokenizer\.json") as raised:
        read_encoder(tmp_path)
    assert f"{path} is {json.dumps(value)}" in str(raised.value)


@pytest.mark.parametrize("value", [None, 0, 0.0])
def test_a_tokenizer_may_say_in_several_ways_that_it_does_nothing_else(tmp_path, tiny_encoder, value):
    tokenizer = tokenizer_json(dropout=value)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        tokenizer["model"][name] = None
    for name in ("byte_fallback", "ignore_merges", "fuse_unk", "unk_token"):
        del tokenizer["model"][name]
    del tokenizer["normalizer"], tokenizer["post_processor"]
    write_huggingface(tmp_path, tokenizer=tokenizer)
    assert read_encoder(tmp_path).encode(TEXTS[0]) == tiny_encoder.encode(TEXTS[0])


@pytest.mark.parametrize(
    "processor",
    [
        WITH_BOS,
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
        {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 0]},
        {"type": "Sequence", "processors": [BYTE_LEVEL, WITH_BOS]},
        {"type": "Sequence", "processors": [BYTE_LEVEL, {"type": "Sequence", "processors": [WITH_BOS]}]},
    ],
)
def test_a_post_processor_that_adds_tokens_is_refused(tmp_path, processor):
    write_huggingface(tmp_path, tokenizer=tokenizer_json() | {"post_processor": processor})
    with pytest.raises(ValueError, match=r"tokenizer\.json: post_processor adds tokens"):
        read_encoder(tmp_path)


@pytest.mark.parametrize(
    "processor", [None, BYTE_LEVEL, TEMPLATE, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}]
)
def test_a_post_processor_that_adds_none_is_accepted(tmp_path, tiny_encoder, processor):
    write_huggingface(tmp_path, tokenizer=tokenizer_json() | {"post_processor": processor})
    assert read_encoder(tmp_path).encode(TEXTS[0]) == tiny_encoder.encode(TEXTS[0])


@pytest.mark.parametrize("name", ["add_prefix_space", "add_bos_token", "add_eos_token"])
def test_options_that_add_to_a_text_are_refused_by_name(tmp_path, name):
    write_huggingface(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {name: False, "model_max_length": 1024})
    read_encoder(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {name: True})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {name} is true: only false"):
        read_encoder(tmp_path)


def test_tables_of_another_tokenizer_are_refused(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_tables(tmp_path)
    for name in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name})
        read_encoder(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})
    with pytest.raises(ValueError, match='tokenizer_class is "CLIPTokenizer"'):
        read_encoder(tmp_path)


def test_a_directory_without_a_tokenizer_says_which_files_it_could_have(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json is there"):
        load(tmp_path)
    write_tables(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.vocab", None),
        ("model.vocab", []),
        ("model.vocab", {"a": "0"}),
        ("model.vocab", {"a": True}),
        ("model.vocab", {"a": 0}),
        ("model.merges", ["a b c"]),
        ("model.merges", [["a"]]),
        ("model.merges", [["a", 1]]),
        ("model.merges", ["Ġ never"]),
        ("model.merges", [5]),
        ("model.merges", 5),
        ("model.merges", None),
        ("added_tokens", 5),
        ("added_tokens", ["<pad>"]),
        ("added_tokens", [{"content": "<pad>"}]),
        ("added_tokens", [{"id": 300}]),
        ("added_tokens", [added(300, 5)]),
        ("added_tokens", [added(300, None)]),
        ("added_tokens", [added("300", "<pad>")]),
        ("added_tokens", [added(300, "")]),
        ("added_tokens", [added(301, "<pad>")]),
        ("added_tokens", [added(298, END_OF_TEXT)]),
        ("added_tokens", [added(5, "<pad>")]),
        ("added_tokens", [added(300, "\ud800")]),
        ("post_processor", [1]),
        ("post_processor", "ByteLevel"),
        ("post_processor", {"type": "Sequence"}),
        ("post_processor", {"type": "Sequence", "processors": 5}),
        ("post_processor", {"type": "Sequence", "processors": [5]}),
        ("post_processor", {"type": "TemplateProcessing", "single": None}),
        ("post_processor", {"type": "TemplateProcessing", "single": [5]}),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_damaged_tokenizer_is_refused_by_the_files_name(tmp_path, path, value):
    write_huggingface(tmp_path)
    tokenizer = change_at(tokenizer_json(), path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        read_encoder(tmp_path)


def test_embeddings_may_be_padded_but_not_be_too_few(tmp_path):
    encoder, hparams, params = load(write_huggingface(tmp_path / "padded", {"vocab_size": 320}))
    assert (len(encoder.encoder), hparams["n_vocab"], len(params["wte"])) == (300, 320, 320)
    with pytest.raises(ValueError, match=r"300 tokens, but vocab_size in config\.json is 299"):
        load(write_huggingface(tmp_path / "small", {"vocab_size": 299}))


# Added tokens


ADDED = [
    added(300, "<pad>"),
    added(301, "<mask>", lstrip=True),
    added(302, "<tool>", special=False),
    added(303, "[end]", special=False, rstrip=True),
    added(304, "yes", special=False, single_word=True),
    added(305, "( )", lstrip=True, rstrip=True),
    added(306, "«Ġ»", special=False, normalized=True),
    added(307, "ab", special=False),
    added(308, "abc", special=False),
    added(309, "<word>", single_word=True, lstrip=True),
    added(310, "<w>", single_word=True, rstrip=True),
]  # fmt: skip
SEGMENTS = [
    ("a<pad>b <pad>", ["a", 300, "b ", 300]),
    ("a  \n<mask> b", ["a", 301, " b"]),
    ("\t <mask><mask> <mask>", [301, 301, 301]),
    (" <tool> ", [" ", 302, " "]),
    ("[end] \n b", [303, "b"]),
    ("x [end]", ["x ", 303]),
    ("yes eyes yes! yesterday yes_ (yes)", [304, " eyes ", 304, "! yesterday yes_ (", 304, ")"]),
    ("a ( ) b", ["a", 305, "b"]),
    ("«Ġ»«Ġ", [306, "«Ġ"]),
    ("abcab", [308, 307]),
    ("aab c", ["a", 307, " c"]),
    ("a <word> <word>b", ["a", 309, " <word>b"]),
    ("<w> b <w>\n a<w> <w>b", [310, "b ", 310, "a<w> <w>b"]),
    ("<|endoftext|><pad>\n", [299, 300, "\n"]),
]


@pytest.fixture(scope="module")
def with_added(tmp_path_factory):
    return read_encoder(write_huggingface(tmp_path_factory.mktemp("hf") / "model", tokenizer=tokenizer_json(ADDED)))


def encode_segments(segments, encoder):
    """Token ids of pieces of ordinary text and of tokens, given as their ids."""
    return [i for segment in segments for i in ([segment] if isinstance(segment, int) else encoder.encode(segment))]


@pytest.mark.parametrize(("text", "segments"), SEGMENTS)
def test_added_tokens_are_found_with_the_space_that_they_take(with_added, tiny_encoder, text, segments):
    assert with_added.encode(text, allow_special=True) == encode_segments(segments, tiny_encoder)


def test_special_tokens_are_text_unless_asked_for_and_other_added_ones_never_are(with_added, tiny_encoder):
    text = "<pad> <tool><|endoftext|> <mask>"
    assert with_added.encode(text) == encode_segments(["<pad> ", 302, "<|endoftext|> <mask>"], tiny_encoder)
    assert with_added.encode(text, True) == encode_segments([300, " ", 302, 299, 301], tiny_encoder)
    for allow_special in (False, True):
        ids = with_added.encode("<pad>«Ġ»<tool>yes( )", allow_special)
        assert with_added.decode(ids) == "<pad>«Ġ»<tool>yes( )"


def test_100_000_spaces_before_no_token_are_read_in_time(with_added, tiny_encoder):
    for space in (" " * 100_000, "\n" * 100_000):
        assert with_added.encode(space, True) == tiny_encoder.encode(space)
        assert with_added.encode(f"a{space}<mask>", True) == [*tiny_encoder.encode("a"), 301]
        assert with_added.encode(f"[end]{space}<mas", True) == [303, *tiny_encoder.encode("<mas")]


def test_added_tokens_beside_tables_are_those_of_tokenizer_json(tmp_path, with_added):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_tables(tmp_path)
    entries = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in ADDED}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": entries})
    encoder = read_encoder(tmp_path)
    assert (encoder.added, encoder.special) == (with_added.added, with_added.special)
    assert [encoder.encode(text, True) for text, _ in SEGMENTS] == [with_added.encode(t, True) for t, _ in SEGMENTS]


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_the_tokens_of_added_tokens_json_are_special_where_they_are_named_so(tmp_path, tiny_encoder, file):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_tables(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<tool>": 300, "<pad>": 301, "<x>": 302})
    write_json(tmp_path / file, {"pad_token": "<pad>", "additional_special_tokens": [{"content": "<x>"}]})
    encoder = read_encoder(tmp_path)
    assert encoder.encode("<tool><pad><x>") == encode_segments([300, "<pad><x>"], tiny_encoder)
    assert encoder.encode("<tool><pad><x>", True) == [300, 301, 302]


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("added_tokens.json", {"<pad>": "300"}),
        ("added_tokens.json", {"<pad>": None}),
        ("added_tokens.json", {"": 300}),
        ("added_tokens.json", {"<pad>": 301}),
        ("tokenizer_config.json", {"added_tokens_decoder": []}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<pad>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": "<pad>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": 5}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": ""}}}),
    ],
    ids=str,
)
def test_damaged_added_tokens_beside_tables_are_refused(tmp_path, file, value):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_tables(tmp_path)
    write_json(tmp_path / file, value)
    with pytest.raises(ValueError, match=rf"{tmp_path}.* is damaged"):
        read_encoder(tmp_path)


# int8 and the lens


def test_int8_works_on_such_a_directory_and_is_made_anew_for_another_config_or_other_weights(tmp_path):
    quantize = pytest.importorskip("quantize", reason="Numba is not installed", exc_type=ImportError)
    directory = write_huggingface(tmp_path / "model", EVERYTHING)
    times = set()

    def check(n):
        _, hparams, params = load(directory)
        for _ in range(2):
            quantized = quantize.map_quantized(directory, params)
            times.add((directory / quantize.INT8_WEIGHTS).stat().st_mtime_ns)
            assert len(times) == n, "it is made once"
        tensors, expected = quantize.to_tensors(quantized), quantize.to_tensors(quantize.quantize(params))
        assert_same_params(tensors, expected)
        assert quantized["lm_head"].rows.dtype == np.int8
        assert quantized["ln_f"]["eps"] == params["ln_f"]["eps"]
        logits, exact = (gpt2(IDS, **p, n_head=hparams["n_head"]) for p in (quantized, params))
        assert 0 < np.abs(logits - exact).max() < 0.05 * np.ptp(exact)

    check(1)
    config = CONFIG | EVERYTHING | {"scale_attn_weights": False, "layer_norm_epsilon": 0.2}
    write_json(directory / "config.json", config)
    check(2)
    tensors = tensors_for(config, seed=3)
    save_file(tensors, directory / "model.safetensors")
    check(3)
    write_shards(directory, tensors)
    check(4)
    tensors["h.1.mlp.c_fc.bias"] += 1
    write_shards(directory, tensors)
    check(5)


def test_the_lens_sees_the_epsilon_and_the_lm_head(everything):
    _, hparams, params = load(everything)
    found = trace(IDS, params, hparams["n_head"])
    logits = gpt2(IDS, **params, n_head=hparams["n_head"])
    np.testing.assert_array_equal(found["logits"], logits)
    for token in (None, 7):
        parts = attribution(found, params, token=token)
        expected = logits[-1].max() if token is None else logits[-1, token]
        assert sum(part.sum() for part in parts.values()) == pytest.approx(expected, abs=float(1e-5 * np.ptp(logits)))


def test_padding_of_an_lm_head_is_no_token_to_the_lens(tmp_path):
    config = CONFIG | {"vocab_size": 320, "tie_word_embeddings": False}
    tensors = tensors_for(config)
    tensors["lm_head.weight"][300:] = 100 * tensors["lm_head.weight"][:20]
    directory = write_huggingface(tmp_path / "model", config, tensors)
    shown = run("lens.py", "next", "a b c", f"--model_size={directory}", env={"PYTHONIOENCODING": "utf-8"})
    assert (shown.returncode, shown.stderr) == (0, b"")
    encoder, hparams, params = load(directory)
    best = gpt2(encoder.encode("a b c"), **params, n_head=hparams["n_head"])[-1, :300].argmax()
    assert f" {best} " in shown.stdout.decode().splitlines()[1]


# By name, from a stand-in of the hub


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    hub = Hub(tmp_path)
    with serving(make_handler(hub)) as hub.url:
        yield hub


def one_line(shown):
    """What a script that failed has to say."""
    assert (shown.returncode, shown.stdout) == (1, b""), shown.stderr.decode()
    (line,) = shown.stderr.decode().splitlines()
    return line


def continuation(directory, prompt="def", n=5):
    encoder, hparams, params = load(directory)
    ids = generate(encoder.encode(prompt), params, hparams["n_head"], n, eot_id=encoder.eot_id, n_vocab=300)
    return f"{encoder.decode(ids)}\n"


def test_a_model_is_downloaded_once_and_then_needs_no_network(hub, everything):
    hub.add(everything)
    others = ("README.md", "pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack")
    hub.files |= dict.fromkeys(others, b"not wanted")
    shown = hub.run()
    assert (shown.returncode, shown.stdout.decode()) == (0, continuation(everything)), shown.stderr.decode()
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.requests.clear()
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for env in ({}, nowhere, nowhere | {"GPT2_OFFLINE": "1"}, nowhere | {"HF_HUB_OFFLINE": "1"}):
        shown = hub.run(env=env)
        assert (shown.returncode, shown.stdout.decode(), shown.stderr) == (0, continuation(everything), b"")
    assert hub.fetched() == []


def test_what_other_programs_have_not_downloaded_is_fetched(hub, plain):
    hub.add(plain)
    download = "from huggingface_hub import hf_hub_download as f; [f('owner/model', n) for n in FILES]"
    command = f"FILES = ['config.json', 'tokenizer.json']; {download}"
    subprocess.run([sys.executable, "-c", command], env=hub.env | {"HF_ENDPOINT": hub.url}, check=True)
    hub.files["tokenizer_config.json"] = b'{"add_prefix_space": true}'
    assert "add_prefix_space is true" in one_line(hub.run())


def test_weights_in_parts_are_downloaded_part_by_part(hub, tmp_path, plain_tensors):
    directory = write_huggingface(tmp_path / "model")
    write_shards(directory, plain_tensors, 3)
    hub.add(directory)
    shown = hub.run()
    assert (shown.returncode, shown.stdout.decode()) == (0, continuation(directory)), shown.stderr.decode()
    assert len(hub.fetched()) == len(set(hub.fetched())) == 6
    hub.requests.clear()
    assert hub.run().stdout == shown.stdout
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("flags", "env"), [((), {"GPT2_OFFLINE": "1"}), (("--offline",), {}), ((), {"HF_HUB_OFFLINE": "1"})]
)
def test_offline_with_an_empty_cache_is_one_line(hub, plain, flags, env):
    hub.add(plain)
    line = one_line(hub.run("def", *flags, env=env))
    assert line.startswith("gpt2.py: there is no directory owner/model")
    assert "cache" in line
    assert hub.requests == []


def test_offline_with_all_but_the_weights_is_one_line(hub, plain):
    hub.add(plain)
    assert hub.run("def", script="encoder.py").returncode == 0
    hub.requests.clear()
    for env in ({"GPT2_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "1"}):
        line = one_line(hub.run(env=env))
        assert "there is no directory owner/model" in line and "cache" in line
        assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        pytest.param(404, "RepoNotFound", "there is none, or it is private", marks=pytest.mark.slow),
        (401, "RepoNotFound", "there is none, or it is private"),
        pytest.param(403, "GatedRepo", "accept its terms", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_does_not_come_is_one_line(hub, status, code, says):
    hub.status, hub.code = status, code
    line = one_line(hub.run(env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"}))
    assert line.startswith("gpt2.py: there is no directory owner/model, and no model of that name came from Hugging")
    assert says in line
    assert len(line) < 600


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_one_line(hub):
    assert "owner/model" in one_line(hub.run(env={"HF_ENDPOINT": "http://127.0.0.1:9"}))


@pytest.mark.parametrize(
    ("file", "change"),
    [("config.json", {"activation_function": "relu"}), ("tokenizer.json", {"normalizer": {"type": "NFC"}})],
)
def test_a_model_that_is_refused_does_not_download_its_weights(hub, plain, file, change):
    hub.add(plain)
    hub.files[file] = json.dumps(json.loads(hub.files[file]) | change).encode()
    assert f"{next(iter(change))} is" in one_line(hub.run())
    assert sorted(hub.fetched()) == ["config.json", "tokenizer.json"]


@pytest.mark.slow
def test_a_repository_without_a_config_is_no_model(hub):
    hub.files = {"README.md": b"data", "vocab.json": b"{}"}
    assert "it has no config.json" in one_line(hub.run())


def test_pytorchs_weights_are_not_downloaded_where_they_could_not_be_read(hub, plain, tmp_path):
    hub.add(plain)
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    assert "pip install torch" in one_line(hub.run(env={"PYTHONPATH": str(tmp_path)}))
    assert "pytorch_model.bin" not in hub.fetched()


def test_to_show_tokens_sends_the_users_key_and_downloads_no_weights(hub, plain, tiny_encoder):
    hub.add(plain)
    shown = hub.run("def x", script="encoder.py", env={"HF_TOKEN": "hf_secret"})
    assert [int(line.split()[0]) for line in shown.stdout.decode().splitlines()] == tiny_encoder.encode("def x")
    assert sorted(hub.fetched()) == ["config.json", "tokenizer.json"]
    assert {token for _, path, token in hub.requests if "/owner/model" in path} == {"Bearer hf_secret"}


def test_a_directory_of_that_name_is_taken_before_the_hub(hub, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "owner" / "model")
    shown = hub.run(cwd=tmp_path)
    assert (shown.returncode, shown.stdout.decode(), shown.stderr) == (0, continuation(plain), b"")
    assert hub.requests == []


def test_a_directory_of_that_name_is_not_completed_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (write_huggingface(Path("owner/model")) / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface, "fetch_weights", lambda *args: pytest.fail("the hub is asked"))
    with pytest.raises(FileNotFoundError, match=r"owner.model has no weights"):
        load_encoder_hparams_and_params("owner/model")


@pytest.mark.parametrize("name", ["../model", "./model", "model/..", "a/b/c", "a/", "/a", "a b/c", "owner/.."])
def test_a_path_is_no_name_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface, "fetch_model", lambda name: pytest.fail("the hub is asked"))
    with pytest.raises(FileNotFoundError, match="there is no model "):
        load_encoder_hparams_and_params(name)


def test_without_huggingface_hub_one_line_says_what_to_install(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here', name='huggingface_hub')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = one_line(run("gpt2.py", "a", "--model_size=owner/model", env=env, cwd=tmp_path))
    assert line == "gpt2.py: there is no directory owner/model; to download it: pip install huggingface_hub"


# Export


@pytest.fixture(params=["ours", "plain", "everything", "not scaled", "special in encoder.json", "no end"])
def exported(request, tmp_path, tiny_model):
    """A model's directory, and what is exported of it."""
    if request.param == "ours":
        source = tiny_model
    elif request.param == "special in encoder.json":
        source = write_model(tmp_path / "source", TINY | {"n_vocab": 301}, n_tokens=300)
        vocabulary = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
        write_json(source / "encoder.json", vocabulary | {"<the end>": 300})
    elif request.param == "no end":
        source = write_huggingface(tmp_path / "source", {"eos_token_id": None, "bos_token_id": 7})
    elif request.param == "not scaled":
        source = write_huggingface(tmp_path / "source", {"scale_attn_weights": False})
    else:
        source = request.getfixturevalue(request.param)
    huggingface.export(str(source), str(tmp_path / "new" / "out"))
    return source, tmp_path / "new" / "out"


def test_what_is_exported_loads_back_bit_by_bit(exported):
    (encoder, hparams, params), (found_encoder, found_hparams, found) = map(load, exported)
    assert hparams == found_hparams
    same_params(found, params)
    assert (found_encoder.eot_id, found_encoder.bos_id) == (encoder.eot_id, encoder.bos_id)
    assert (found_encoder.encoder, found_encoder.added, found_encoder.special) == (
        encoder.encoder, encoder.added, encoder.special,
    )  # fmt: skip
    for text in (*TEXTS, *(text for text, _ in SEGMENTS)):
        for allow_special in (False, True):
            assert found_encoder.encode(text, allow_special) == encoder.encode(text, allow_special)
    assert [path.name for path in exported[1].parent.iterdir()] == ["out"]


def test_what_is_exported_is_what_transformers_asks_for(exported):
    source, out = exported
    files = ["config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    tensors, params = load_file(out / "model.safetensors"), load(source)[2]
    assert tensors.keys() == prefixed(tensors_of(params)).keys()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert config["tie_word_embeddings"] == ("lm_head" not in params)
    assert config["layer_norm_epsilon"] == params["ln_f"].get("eps", 1e-5)
    ids = [entry["id"] for entry in json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]]
    assert ids == sorted(ids)
    assert b'"format": "pt"' in (out / "model.safetensors").read_bytes()[:4096], "or transformers refuses it"


def snapshot(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("state", ["file", "not empty", "link", "dangling link"])
def test_an_export_never_replaces_what_is_there(tmp_path, plain, state):
    out = tmp_path / "out"
    if state == "file":
        out.write_text("mine")
    elif state == "not empty":
        out.mkdir()
        (out / "mine").touch()
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / ("elsewhere" if state == "link" else "nowhere"))
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="is there already: choose another name"):
        huggingface.export(str(plain), str(out))
    assert snapshot(tmp_path) == before


def test_an_export_to_an_empty_directory_or_a_relative_path_is_fine(tmp_path, plain, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    huggingface.export(str(plain), "out")
    huggingface.export(str(plain), "a/b/")
    same_params(load(tmp_path / "out")[2], load(plain)[2])
    same_params(load(tmp_path / "a" / "b")[2], load(plain)[2])


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_nothing_behind(tmp_path, plain, monkeypatch, there):
    def fails(path, *args):
        path.write_bytes(b"a part")
        raise OSError(f"{path} could not be written: the disk is full")

    monkeypatch.setattr(huggingface, "save_tensors", fails)
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="the disk is full"):
        huggingface.export(str(plain), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == ([tmp_path / "out"] if there else [])
    assert snapshot(tmp_path) == ({tmp_path / "out": None} if there else {})


def test_an_export_of_no_model_makes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model"):
        huggingface.export("nothing", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_exports(tmp_path):
    shown = run("huggingface.py", "export", "shakespeare", str(tmp_path / "out"))
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')" in shown.stdout.decode()
    (encoder, hparams, params), (found_encoder, found_hparams, found) = load(BUNDLED), load(tmp_path / "out")
    same_params(found, params)
    assert (found_hparams, found_encoder.encoder) == (hparams, encoder.encoder)


# transformers, as the judge of all of it


PROMPTS = ["def encode(self, text):", "the tokens of <|endoftext|> a", " 1"]


@pytest.fixture
def transformers():
    pytest.importorskip("torch").set_num_threads(1)  # such models are slower with more
    return pytest.importorskip("transformers", reason="transformers is not installed")


def reference_model(config, tensors):
    """transformers' GPT-2 with these weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    state = {name: torch.tensor(array) for name, array in prefixed(tensors).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def save_tokenizer(directory, layout, entries=()):
    """The tokenizer of the tests as transformers writes it, or as tokenizer.json or the two tables alone."""
    from tokenizers import AddedToken
    from transformers import GPT2Tokenizer

    write_tables(directory)
    if layout == "tokenizer.json":
        write_json(directory / "tokenizer.json", tokenizer_json(entries))
    if layout == "transformers":
        tokenizer = GPT2Tokenizer.from_pretrained(directory)
        for entry in entries:
            options = {name: value for name, value in entry.items() if name not in ("id", "content")}
            tokenizer.add_tokens(AddedToken(entry["content"], **options), special_tokens=entry["special"])
    if layout != "tables":
        (directory / "vocab.json").unlink()
        (directory / "merges.txt").unlink()
    if layout == "transformers":
        tokenizer.save_pretrained(directory)


def assert_as_transformers(directory, prompts=PROMPTS, logits_too=True):
    """The same token ids, logits and greedy text as transformers has from the same directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoder, hparams, params = load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        assert encoder.encode(prompt, allow_special=True) == ids
        if "«" not in prompt:  # which transformers takes for a byte, also in an added token
            assert encoder.decode(ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        inputs = torch.tensor([ids])
        with torch.no_grad():
            expected = model(inputs).logits[0].numpy()
        assert_close(gpt2(ids, **params, n_head=hparams["n_head"]), expected, TOLERANCE)
        n = min(20, hparams["n_ctx"] - len(ids))
        options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, len(ids) :].tolist()
        assert generate(ids, params, hparams["n_head"], n, n_vocab=len(encoder.encoder)) == made


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_computed_as_transformers_does(transformers, tmp_path, variant):
    config = CONFIG | {"n_positions": 64} | VARIANTS[variant]
    save_tokenizer(tmp_path, "transformers")
    reference_model(config, tensors_for(config)).save_pretrained(tmp_path)
    assert_as_transformers(tmp_path)
    out = tmp_path / "out"
    huggingface.export(str(tmp_path), str(out))
    same_params(load(out)[2], load(tmp_path)[2])
    assert_as_transformers(out)


@pytest.mark.reference
@pytest.mark.parametrize("layout", ["transformers", "tokenizer.json", "tables"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("parts", ["whole", "shards", "no prefix"])
def test_each_layout_is_read_as_transformers_does(transformers, tmp_path, layout, dtype, parts):
    import torch

    config = CONFIG | {"n_positions": 64}
    save_tokenizer(tmp_path, layout)
    model = reference_model(config, tensors_for(config)).to(getattr(torch, dtype))
    model = model.transformer if parts == "no prefix" else model
    model.save_pretrained(tmp_path, max_shard_size="100KB" if parts == "shards" else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (parts == "shards")
    assert_as_transformers(tmp_path)


@pytest.mark.reference
def test_the_bundled_model_is_exported_as_transformers_reads_it(transformers, tmp_path):
    huggingface.export(str(BUNDLED), str(tmp_path / "out"))
    assert_as_transformers(tmp_path / "out", ["ROMEO:", "First Citizen:\nWe are <|endoftext|>", "\n"])


@pytest.mark.reference
@pytest.mark.parametrize("layout", ["transformers", "tokenizer.json"])
def test_added_tokens_are_those_of_transformers_also_when_exported(transformers, tmp_path, layout):
    config = CONFIG | {"vocab_size": 311, "n_positions": 64}
    save_tokenizer(tmp_path, layout, ADDED)
    reference_model(config, tensors_for(config)).save_pretrained(tmp_path)
    texts = [text for text, _ in SEGMENTS]
    assert_as_transformers(tmp_path, texts)
    huggingface.export(str(tmp_path), str(tmp_path / "out"))
    assert_as_transformers(tmp_path / "out", texts)


@pytest.mark.reference
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "max_position_embeddings": 16},
        {"hidden_size": 96, "n_embd": 48},
        {"layer_norm_epsilon": 0.5, "n_inner": 7},
    ],
    ids=str,
)
def test_a_config_means_what_gpt2config_makes_of_it(transformers, tmp_path, config):
    write_json(tmp_path / "config.json", config)
    found = huggingface.read_config(tmp_path / "config.json")
    expected = transformers.GPT2Config.from_pretrained(tmp_path)
    assert {name: found[name] for name in huggingface.DEFAULTS} == {
        name: getattr(expected, name) for name in huggingface.DEFAULTS
    }


@pytest.mark.reference
@pytest.mark.parametrize("layout", ["tables", "tokenizer.json"])
@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_a_token_of_the_vocabulary_is_special_where_it_is_named_so(transformers, tmp_path, layout, file):
    write_huggingface(tmp_path)
    vocabulary = tiny_tables()[0] | {"<pad>": 300}
    write_json(tmp_path / "tokenizer.json", tokenizer_json(vocab=vocabulary))
    if layout == "tables":
        (tmp_path / "tokenizer.json").unlink()
        write_tables(tmp_path)
        write_json(tmp_path / "vocab.json", vocabulary)
    write_json(tmp_path / file, {"pad_token": "<pad>"})
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a <pad>")["input_ids"]
    assert read_encoder(tmp_path).encode("a <pad>", allow_special=True) == ids


PIECES = [entry["content"] for entry in ADDED]
PIECES += ["a", "b", "c", " ", "  ", "\n", "\t", "\u00a0", "_", "é", "1", "<", ">", "[", "«", "Ġ", END_OF_TEXT]


@pytest.mark.reference
@settings(max_examples=2000)
@given(text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_added_tokens_are_found_as_the_tokenizers_library_does(with_added, library, text):
    assert with_added.encode(text, allow_special=True) == library.encode(text).ids
    assert with_added.decode(with_added.encode(text)) == text or any(piece in text for piece in ("[end]", "( )"))


@pytest.fixture(scope="module")
def library():
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ADDED)))


APART, OVERLAPPING = ["ab", "<a>", "-é", "( )"], ["ab", "abc", "bc", "éa", " bc", "bc ", "\n", "  "]
SHORT = st.lists(st.sampled_from([*"abc <>-\n_é", "ab", "<a>", "-é"]), max_size=12).map("".join)


@st.composite
def added_tokens(draw):
    overlapping = draw(st.booleans())
    contents = draw(st.lists(st.sampled_from(OVERLAPPING if overlapping else APART), unique=True, min_size=1))
    names = ("special",) if overlapping else ("single_word", "special", "lstrip", "rstrip")
    return [added(300 + i, c, **{name: draw(st.booleans()) for name in names}) for i, c in enumerate(contents)]


@pytest.mark.reference
@settings(max_examples=1000)
@given(entries=added_tokens(), texts=st.lists(SHORT, min_size=1, max_size=5))
def test_any_added_tokens_are_found_as_the_tokenizers_library_does(tmp_path_factory, entries, texts):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    directory = tmp_path_factory.getbasetemp() / "any"
    write_huggingface(directory, tokenizer=tokenizer_json(entries), tensors={"a": np.zeros(1)})
    encoder = read_encoder(directory)
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in texts:
        assert encoder.encode(text, allow_special=True) == library.encode(text).ids

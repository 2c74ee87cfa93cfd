"""Directories as transformers writes them: config.json and the weights become parameters, or an error names them."""

import json
import math
import mmap
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt2 import gpt2
from helpers import huggingface_models as hf
from helpers.huggingface_models import CONFIG, EVERYTHING, TENSORS, VARIANTS, assert_refused, assert_tensors, load
from helpers.models import TINY, assert_same_params, write_model
from helpers.processes import run
from lens import attribution, trace
from store import huggingface
from store.params import tensors_of
from test_gpt2 import TOLERANCE, assert_close

IDS = np.random.default_rng(1).integers(0, 300, 20).tolist()
BIAS, PREFIXED = TENSORS["h.1.ln_2.bias"], "transformer.h.1.ln_2.bias"


def reference_logits(ids, tensors, config):
    """GPT-2's logits in float64, as modeling_gpt2.py computes them from the tensors and config.json of the files."""
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
        scale = math.sqrt(q.shape[-1]) if config.get("scale_attn_weights", True) else 1
        scale *= i + 1 if config.get("scale_attn_by_inverse_layer_idx", False) else 1
        scores = q @ k.swapaxes(1, 2) / scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True)) * np.tri(n)
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + dense((weights @ v).swapaxes(0, 1).reshape(n, -1), f"h.{i}.attn.c_proj")
        a = dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        a = a / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + dense(a, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t.get("lm_head.weight", t["wte.weight"]).T


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_follow_the_config(tmp_path, variant):
    config = CONFIG | VARIANTS[variant]
    tensors = hf.tensors_for(config)
    _, hparams, params = load(hf.write(tmp_path, config, hf.prefixed(tensors)))
    expected = reference_logits(IDS, tensors, config)
    assert_close(gpt2(IDS, **params, n_head=hparams["n_head"]), expected)
    if variant not in ("plain", "small eps", "no eps", "padded", "another name for gelu"):
        plain = reference_logits(IDS, TENSORS, CONFIG)
        assert np.abs(expected[:, :300] - plain).max() > 100 * TOLERANCE * np.ptp(plain), "the variant matters"


@pytest.mark.parametrize("scaled", [True, False])
def test_float32_is_mapped_except_queries_that_the_config_scales(tmp_path, scaled):
    directory, pages = hf.write(tmp_path, {"scale_attn_weights": scaled}), set()
    for name, array in tensors_of(load(directory)[2]).items():
        assert (array.dtype, array.flags.writeable) == (np.float32, False)
        if scaled or ".c_attn." not in name:
            np.testing.assert_array_equal(array, TENSORS[name])
            while isinstance(array, np.ndarray):
                array = array.base
            pages.add(array.obj if isinstance(array, memoryview) else array)
        else:
            np.testing.assert_array_equal(array[..., 48:], TENSORS[name][..., 48:])
            np.testing.assert_allclose(array[..., :48], TENSORS[name][..., :48] * math.sqrt(12), rtol=1e-6)
    assert [type(page) for page in pages] == [mmap.mmap]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float32])
def test_prefixes_shards_and_mask_buffers_make_no_difference(tmp_path, prefix, n_shards, dtype):
    tensors = dict(TENSORS)
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = np.tri(32).astype(dtype).reshape(1, 1, 32, 32)
        tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4).astype(np.float32)
    tensors = hf.prefixed(tensors) if prefix else tensors
    hf.write(tmp_path, tensors=tensors)
    if n_shards > 1:
        hf.write_shards(tmp_path, tensors, n_shards)
    assert_tensors(tmp_path, TENSORS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [0, 1])
def test_an_lm_head_is_kept_only_if_it_differs_from_wte(tmp_path, tied, change):
    head = TENSORS["wte.weight"].copy()
    head[-1] += change
    hf.write(tmp_path, {"tie_word_embeddings": tied}, TENSORS | {"lm_head.weight": head})
    assert_tensors(tmp_path, TENSORS | ({"lm_head.weight": head} if change else {}))


def save_bfloat16(tensors, path):
    """A safetensors file with the upper halves of float32. The library cannot save it: NumPy has no bfloat16."""
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data := data + (array.reshape(-1).view("<u4") >> 16).astype("<u2").tobytes())]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Subnormal numbers, zeros, infinity, the largest number; for bfloat16 also bits of NaN, which no cast may change.
FLOAT16 = np.array([2**-24, -(2**-15), -0.0, np.inf, 65504], "<f4")
BFLOAT16 = (np.array([1, 0x807F, 0x80, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0x7F7F], "<u4") << 16).view("<f4")


@pytest.mark.parametrize("special", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])
def test_16_bit_weights_are_widened_exactly(tmp_path, special):
    tensors = TENSORS | {"wpe.weight": TENSORS["wpe.weight"].copy()}
    tensors["wpe.weight"][0, : len(special)] = special
    tensors["lm_head.weight"] = tensors["wte.weight"]
    hf.write(tmp_path)
    if special is BFLOAT16:
        save_bfloat16(hf.prefixed(tensors), tmp_path / "model.safetensors")
        expected = {name: array.view("<u4") & 0xFFFF0000 for name, array in tensors.items()}
    else:
        halves = {name: array.astype(np.float16) for name, array in tensors.items()}
        save_file(hf.prefixed(halves), tmp_path / "model.safetensors")
        expected = {name: array.astype(np.float32).view("<u4") for name, array in halves.items()}
    params = load(tmp_path)[2]
    assert "lm_head" not in params
    for name, array in tensors_of(params).items():
        np.testing.assert_array_equal(array.view("<u4"), expected[name])
        assert (array.dtype, array.flags.writeable, array.flags.c_contiguous) == (np.float32, False, True)


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"transformer.wte.weight": None}, r"wte\.weight is missing"), ({PREFIXED: None}, r"h\.1\.ln_2\.bias is missing"),
    ({"h.9.ln_1.weight": BIAS}, r"h\.9\.ln_1\.weight is not part of"),
    ({"h.0.ln_1.bias": BIAS}, r"h\.0\.ln_1\.bias occurs twice"),
    ({"h.3.attn.bias": BIAS, "h.0.attn.biased": BIAS}, "biased is not"),
    ({"lm_head.weight": np.zeros((299, 48), np.float32)}, r"weight has the shape \[299, 48\], not \[300, 48\]"),
    (dict.fromkeys(hf.prefixed(TENSORS)), "is missing; .* is missing; .* is missing, and 37 more such"),
    ({"lm_head.weight": None}, r"tie_word_embeddings = false, but lm_head\.weight is missing"),
    *(({PREFIXED: BIAS.astype(t)}, r"h\.1\.ln_2\.bias has the type") for t in ("f8", "i4", "i8", "i1", "u1", "?")),
])  # fmt: skip
def test_an_error_names_tensors_that_do_not_fit_the_config(tmp_path, changes, complaint):
    tensors = {name: array for name, array in (hf.prefixed(TENSORS) | changes).items() if array is not None}
    assert_refused(hf.write(tmp_path, {"tie_word_embeddings": "false" not in complaint}, tensors), complaint)


def test_a_classifiers_head_is_ignored_with_a_message(tmp_path, capsys):
    hf.write(tmp_path, {}, TENSORS | {"score.weight": np.zeros((2, 48), np.float32)})
    assert_tensors(tmp_path, TENSORS)
    assert "ignored, as they are not part of a GPT-2: score.weight" in capsys.readouterr().err


def test_a_directory_with_hparams_json_is_not_hugging_faces(tmp_path, tiny_params):
    write_model(tmp_path, TINY, tiny_params)
    hf.write_json(tmp_path / "config.json", {"model_type": "not looked at"})
    assert_same_params(load(tmp_path)[2], tiny_params)


def test_one_file_is_preferred_to_shards_and_safetensors_to_pytorch(tmp_path):
    directory = hf.write(tmp_path / "model", tensors=TENSORS)
    (directory / "pytorch_model.bin").write_bytes(b"not looked at")
    shutil.copy(hf.write_shards(tmp_path, TENSORS), directory)
    for _ in range(2):
        assert_tensors(directory, TENSORS)
        hf.write_shards(directory, TENSORS)


def test_an_error_names_missing_weight_files_and_duplicate_tensors(tmp_path):
    index = hf.write_shards(hf.write(tmp_path), TENSORS)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"transformer.wte.weight": TENSORS["wte.weight"]}, second)
    assert_refused(tmp_path, r"model-00002-of-00002\.safetensors: wte\.weight occurs twice")
    second.unlink()
    assert_refused(tmp_path, r"model-00002-of-00002\.safetensors is missing", FileNotFoundError)
    index.unlink()
    assert_refused(tmp_path, r"neither model\.safetensors nor pytorch_model\.bin exists", FileNotFoundError)


NO_PLACES = [None, [], {}, "model.safetensors", 1]
NO_FILES = [1, None, "", "..", "../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x", "x\n", ["x"], "*"]


@pytest.mark.parametrize("places", [*NO_PLACES, *({"wte.weight": file} for file in NO_FILES)], ids=str)
def test_an_index_must_name_files_in_its_directory(tmp_path, places):
    save_file(TENSORS, tmp_path / "x.safetensors")
    hf.write_json(hf.write_shards(hf.write(tmp_path / "model"), TENSORS), {"weight_map": places})
    assert_refused(tmp_path / "model", r"model\.safetensors\.index\.json is damaged: weight_map")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.fixture
def pytorch_file(tmp_path):
    """The path of an empty pytorch_model.bin in a directory that has no other weights."""
    directory = hf.write(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").touch()
    return directory / "pytorch_model.bin"


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("n_shards", [1, 2])
def test_old_new_and_sharded_pytorch_files_are_read(torch, pytorch_file, dtype, zipped, n_shards):
    tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in TENSORS.items()}
    buffer = {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool)}

    def save(part, path):
        torch.save(part, path, _use_new_zipfile_serialization=zipped)

    save(hf.prefixed(tensors) | buffer, pytorch_file)
    if n_shards > 1:
        hf.write_shards(pytorch_file.parent, hf.prefixed(tensors) | buffer, n_shards, "pytorch_model", "bin", save)
    assert_tensors(pytorch_file.parent, {name: tensor.float().numpy() for name, tensor in tensors.items()})
    params, maps = load(pytorch_file.parent)[2], Path("/proc/self/maps")
    assert {(a.dtype.str, a.flags.writeable) for a in tensors_of(params).values()} == {("<f4", False)}
    if maps.exists() and zipped and dtype == "float32":  # only Linux tells what is mapped
        assert str(pytorch_file.parent) in maps.read_text(), "new files are mapped"


class Evil(str):
    """A path. Unpickling it creates the file."""

    def __reduce__(self):
        return open, (str(self), "w")


@pytest.mark.reference
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(torch, pytorch_file, tmp_path, form):
    evil = {"wte.weight": Evil(tmp_path / "made")}
    if form == "pickle":
        pytorch_file.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, pytorch_file, _use_new_zipfile_serialization=form == "zip")
    assert_refused(pytorch_file.parent, r"pytorch_model\.bin is damaged, or holds other things than tensors")
    assert not (tmp_path / "made").exists()
    if form == "zip":
        torch.load(pytorch_file, weights_only=False)
        assert (tmp_path / "made").exists(), "it would have"


NO_PICKLE = [b"", b"PK\x03\x04" + bytes(100), b"x" * 1000, b"\x80\x02]q\x00."]
NO_TENSORS = [{"wte.weight": value} for value in (3, [1.0], {"a": 1}, "text", None)]
NO_NAMES = [{name: None} for name in (5, None, ("a",), "a\nb")]


@pytest.mark.reference
@pytest.mark.parametrize("content", [*NO_PICKLE, *NO_TENSORS, *NO_NAMES], ids=lambda content: str(content)[:30])
def test_a_pytorch_file_that_is_damaged_or_has_no_tensors_is_refused(torch, pytorch_file, content):
    pytorch_file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, pytorch_file)
    reason = "is not a valid name of a tensor" if content in NO_NAMES else ""
    assert_refused(pytorch_file.parent, rf"pytorch_model\.bin is damaged, or holds other things.*{reason}")


@pytest.mark.reference
@pytest.mark.parametrize("form", ["compressed", "expanded"])
def test_a_decompression_bomb_is_refused(torch, pytorch_file, form):
    tensors = {"wte.weight": torch.zeros(1).expand(2**30), "wpe.weight": torch.zeros(1)}
    torch.save(tensors if form != "compressed" else {"wte.weight": torch.zeros(10**7)}, pytorch_file)
    if form == "compressed":
        with zipfile.ZipFile(pytorch_file) as stored:
            parts = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(pytorch_file, "w", zipfile.ZIP_DEFLATED) as compressed:
            for name, data in parts.items():
                compressed.writestr(name, data)
    assert pytorch_file.stat().st_size < 100_000
    assert_refused(pytorch_file.parent, r"pytorch_model\.bin is damaged, .*(compressed|larger than the file)")


@pytest.mark.parametrize(("pytorch", "complaint"), [
    (None, r"pip install torch; or python export\.py .*model OUT"),
    (SimpleNamespace(__version__="2.5.1+cpu"), r"in PyTorch 2\.5\.1\+cpu: pip install --upgrade torch"),
])  # fmt: skip
def test_without_a_safe_pytorch_an_error_says_what_to_do(pytorch_file, monkeypatch, pytorch, complaint):
    monkeypatch.setitem(sys.modules, "torch", pytorch)
    assert_refused(pytorch_file.parent, complaint, ImportError)
    load(hf.write(pytorch_file.parent))  # safetensors files do not need it


@pytest.mark.parametrize(("name", "value"), [
    ("model_type", "gpt_neo"), ("model_type", None), ("activation_function", "relu"),
    ("activation_function", "gelu"), ("add_cross_attention", True), ("add_cross_attention", 0),
    ("is_encoder_decoder", True), ("pruned_heads", {"0": [1]}),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
])  # fmt: skip
def test_an_error_names_unsupported_settings_and_their_values(tmp_path, name, value):
    complaint = re.escape(f"{name} is {json.dumps(value)}")
    assert_refused(hf.write(tmp_path, {name: value}), rf"config\.json.*{complaint}")


@pytest.mark.parametrize("config", [
    {"vocab_size": 300, "hidden_size": 48, "max_position_embeddings": 32, "num_attention_heads": 4,
     "num_hidden_layers": 3, "bos_token_id": 299, "eos_token_id": 299},
    CONFIG | {
        "pruned_heads": {}, "quantization_config": None, "add_cross_attention": False, "resid_pdrop": 0.5,
        "reorder_and_upcast_attn": True, "use_cache": False, "n_inner": 192, "scale_attn_weights": True,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_pytorch_tanh", "summary_activation": "relu",
    },
])  # fmt: skip
def test_aliases_and_settings_that_change_nothing_are_accepted(tmp_path, config):
    hf.write_json(hf.write(tmp_path) / "config.json", config)
    assert load(tmp_path)[1] == TINY | {"n_layer": 3}
    assert_tensors(tmp_path, TENSORS)


SIZES = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")
WRONG = [(name, value) for name in SIZES for value in ("48", -1, 0, True, 1.5, None, [48], 10**30, float("nan"))]
WRONG += [(name, value) for name in FLAGS for value in ("true", 1, 0, None, [])]
WRONG += [("n_inner", value) for value in ("96", -1, 0, True, 1.5, [96], 10**9)]
WRONG += [("layer_norm_epsilon", value) for value in ("1e-5", -1, True, None, float("nan"), float("inf"), [1e-5])]


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("n_head", 5)], ids=str)
def test_an_error_names_impossible_settings(tmp_path, name, value):
    hf.write_json(tmp_path / "config.json", CONFIG | {name: value})
    with pytest.raises(ValueError, match=rf"config\.json.* {name} "):
        huggingface.load_hparams(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000], ids=lambda c: str(c[:4]))
@pytest.mark.parametrize("file", [*huggingface.ALL_BUT_WEIGHTS[:6], "model.safetensors.index.json"])
def test_an_error_names_a_file_that_is_not_a_json_object(tmp_path, file, content):
    hf.write_shards(hf.write(tmp_path), TENSORS)
    (tmp_path / file).write_bytes(content)
    assert_refused(tmp_path, rf"{re.escape(file)} is damaged")


def test_int8_weights_are_rebuilt_only_if_config_or_weights_change(tmp_path):
    int8 = pytest.importorskip("engine.int8", reason="Numba is not installed", exc_type=ImportError)
    config, times = CONFIG | EVERYTHING | {"scale_attn_weights": False, "layer_norm_epsilon": 0.2}, set()
    tensors = hf.tensors_for(config, seed=3)
    for n, change in enumerate([
        lambda: hf.write(tmp_path, EVERYTHING), lambda: hf.write_json(tmp_path / "config.json", config),
        lambda: save_file(tensors, tmp_path / "model.safetensors"), lambda: hf.write_shards(tmp_path, tensors),
        lambda: hf.write_shards(tmp_path, tensors | {"h.1.mlp.c_fc.bias": tensors["h.1.mlp.c_fc.bias"] + 1}),
    ]):  # fmt: skip
        change()
        _, hparams, params = load(tmp_path)
        for _ in range(2):
            quantized = int8.map_quantized(tmp_path, params)
            times.add((tmp_path / int8.INT8_WEIGHTS).stat().st_mtime_ns)
            assert len(times) == n + 1, "they are built once"
        assert_same_params(int8.to_tensors(quantized), int8.to_tensors(int8.quantize(params)))
        assert quantized["lm_head"].rows.dtype == np.int8
        assert quantized["ln_f"]["eps"] == params["ln_f"]["eps"]
        logits, exact = (gpt2(IDS, **p, n_head=hparams["n_head"]) for p in (quantized, params))
        assert 0 < np.abs(logits - exact).max() < 0.05 * np.ptp(exact)


def test_the_lens_uses_the_epsilon_and_the_lm_head(tmp_path):
    _, hparams, params = load(hf.write(tmp_path, EVERYTHING))
    found = trace(IDS, params, hparams["n_head"])
    logits = gpt2(IDS, **params, n_head=hparams["n_head"])
    np.testing.assert_array_equal(found["logits"], logits)
    for token, expected in ((None, logits[-1].max()), (7, logits[-1, 7])):
        parts = attribution(found, params, token=token)
        assert sum(part.sum() for part in parts.values()) == pytest.approx(expected, abs=float(1e-5 * np.ptp(logits)))


def test_the_lens_ignores_padding_of_the_lm_head(tmp_path):
    config = CONFIG | {"vocab_size": 320, "tie_word_embeddings": False}
    tensors = hf.tensors_for(config)
    tensors["lm_head.weight"][300:] = 100 * tensors["lm_head.weight"][:20]
    encoder, hparams, params = load(hf.write(tmp_path, config, tensors))
    shown = run("lens.py", "next", "a b c", f"--model_size={tmp_path}", env={"PYTHONIOENCODING": "utf-8"})
    best = gpt2(encoder.encode("a b c"), **params, n_head=hparams["n_head"])[-1, :300].argmax()
    assert (shown.stderr, f" {best} " in shown.stdout.decode().splitlines()[1]) == (b"", True)

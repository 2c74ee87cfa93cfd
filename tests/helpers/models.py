"""Small models, their directories and checkpoints; where the tests find files from outside the repository."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from encoder import train_bpe
from gpt2 import gpt2
from store.params import flatten, map_leaves, param_shapes, tensor_name

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models" / "shakespeare"
LARGE = {"n_vocab": 300, "n_ctx": 32, "n_embd": 512, "n_head": 8, "n_layer": 24}  # 302 MB
TINY = {"n_vocab": 300, "n_ctx": 32, "n_embd": 48, "n_head": 4, "n_layer": 2}


def data_file(name: str) -> Path:
    """A file that is not in the repository, such as GPT-2's tables: from the directory that GPT2_TEST_DATA names."""
    path = Path(os.environ.get("GPT2_TEST_DATA", ""), name)
    if "GPT2_TEST_DATA" not in os.environ or not path.is_file():
        pytest.skip(f"{name} is not here: GPT2_TEST_DATA names the directory that has it")
    return path


def random_params(hparams: dict, seed: int = 0, dtype: type = np.float32) -> dict:
    """Weights so large that every part of the model matters. RandomState never changes, so golden files stay valid."""
    random = np.random.RandomState(seed)

    def draw(path: tuple, shape: tuple) -> np.ndarray:
        scale = {"w": 1 / np.sqrt(shape[0]), "g": 0.2, "b": 0.2}.get(path[-1], 0.5)
        return (scale * random.standard_normal(shape) + (path[-1] == "g")).astype(dtype)

    return map_leaves(draw, param_shapes(hparams))


def flip_bit(data: bytes, i: int) -> bytes:
    """`data` with its bit number i changed."""
    return data[: i // 8] + bytes([data[i // 8] ^ 1 << i % 8]) + data[i // 8 + 1 :]


def assert_same_params(params: dict, expected: dict) -> None:
    found, expected = flatten(params, tensor_name), flatten(expected, tensor_name)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def reference_losses(ids: np.ndarray, params: dict, n_head: int) -> np.ndarray:
    """-log softmax of gpt2's logits at ids[1:], in float64, with nothing taken from evaluate.py: [n_seq - 1]."""
    logits = gpt2(ids[:-1], **params, n_head=n_head).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -log_p[np.arange(len(ids) - 1), ids[1:]]


@functools.cache
def tiny_tables(n_vocab: int = 300) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokenizer tables learned from the project's own text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py")))
    return train_bpe(text, n_vocab)


def write_tables(directory: Path, n_vocab: int = 300, hparams: dict = TINY) -> None:
    """Write the small files of a model. The directory is made if it is missing."""
    encoder, merges = tiny_tables(n_vocab)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
    (directory / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (directory / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")


def write_model(directory: Path, hparams: dict = TINY, params: dict | None = None, n_tokens: int | None = None) -> Path:
    """A model directory as it is after conversion."""
    write_tables(directory, n_tokens or hparams["n_vocab"], hparams)
    save_file(flatten(params or random_params(hparams), tensor_name), directory / "model.safetensors")
    return directory


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], hparams: dict = TINY) -> Path:
    """A model directory as it was released: a TensorFlow checkpoint, written by TensorFlow in a process of its own."""
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    write_tables(directory, hparams=hparams)
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n', encoding="utf-8")
    (directory / "model.ckpt.meta").write_bytes(b"the graph, which is not read")
    np.savez(directory / "tensors.npz", **tensors)
    save = """if True:
        import sys, numpy, tensorflow as tf
        tensors = numpy.load(sys.argv[1] + "/tensors.npz")
        tf.raw_ops.SaveV2(prefix=sys.argv[1] + "/model.ckpt", tensor_names=list(tensors),
                          shape_and_slices=[""] * len(tensors), tensors=[tf.constant(a) for a in tensors.values()])
    """
    subprocess.run([sys.executable, "-c", save, str(directory)], check=True, capture_output=True)
    (directory / "tensors.npz").unlink()
    return directory

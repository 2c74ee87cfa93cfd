"""Small models, their directories and checkpoints, and a server for the tests."""

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from encoder import train_bpe
from utils import flatten, map_leaves, param_shapes, tensor_name

ROOT = Path(__file__).parent.parent
DATA_PLACES = (ROOT.parent / "shared" / "data" / "gpt2", ROOT / "models" / "124M")
BUNDLED = ROOT / "models" / "shakespeare"
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
TINY = {"n_vocab": 300, "n_ctx": 32, "n_embd": 48, "n_head": 4, "n_layer": 2}


def random_params(hparams: dict, seed: int = 0, dtype: type = np.float32) -> dict:
    """Weights so large that every part of the model matters. RandomState never changes, so the golden files hold."""
    random = np.random.RandomState(seed)

    def draw(path: tuple, shape: tuple) -> np.ndarray:
        scale = {"w": 1 / np.sqrt(shape[0]), "g": 0.2, "b": 0.2}.get(path[-1], 0.5)
        return (scale * random.standard_normal(shape) + (path[-1] == "g")).astype(dtype)

    return map_leaves(draw, param_shapes(hparams))


def assert_same_params(params: dict, expected: dict) -> None:
    found, expected = flatten(params, tensor_name), flatten(expected, tensor_name)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@functools.cache
def tiny_tables(n_vocab: int = 300) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokenizer tables learned from the project's own text."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py")))
    return train_bpe(text, n_vocab)


def write_tables(directory: Path, n_vocab: int = 300) -> None:
    encoder, merges = tiny_tables(n_vocab)
    (directory / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (directory / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")


def write_model(directory: Path, hparams: dict = TINY, params: dict | None = None, n_tokens: int | None = None) -> Path:
    """A model directory as it is after conversion."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tables(directory, n_tokens or hparams["n_vocab"])
    (directory / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
    save_file(flatten(params or random_params(hparams), tensor_name), directory / "model.safetensors")
    return directory


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], hparams: dict = TINY) -> Path:
    """A model directory as it was released: a TensorFlow checkpoint, written by TensorFlow in a process of its own."""
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    directory.mkdir(parents=True, exist_ok=True)
    write_tables(directory)
    (directory / "hparams.json").write_text(json.dumps(hparams), encoding="utf-8")
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


@contextlib.contextmanager
def serving(handler: Callable) -> Iterator[str]:
    """Answer HTTP requests with `handler` while the block runs; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, and capture what it prints, as bytes."""
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, **{"stdin": subprocess.DEVNULL, **options})


def interrupt(process: subprocess.Popen, timeout: float = 20) -> tuple[bytes, bytes]:
    """Press Ctrl-C; what the process has still printed, and its errors, if it ends in time."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


def as_any_user() -> None:
    """For `preexec_fn`: have the permissions of files hold for root too, as they do for others (on Linux)."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def has_permissions() -> bool:
    """Whether the permissions of files hold for a child with `as_any_user`."""
    if os.name != "posix":
        return False
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        command = [sys.executable, "-c", "import os, sys; sys.exit(os.access(sys.argv[1], os.W_OK))", directory]
        return subprocess.run(command, preexec_fn=as_any_user).returncode == 0

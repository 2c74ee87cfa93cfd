"""Opening and saving models: good ones, damaged ones, and what is not imported."""

import os
from pathlib import Path

import pytest

from helpers.models import assert_same_params, write_model
from helpers.processes import as_any_user, error_line, run, run_code
from store.tensors import WEIGHTS
from utils import load_encoder_hparams_and_params, save_model

FILES = ("encoder.json", "vocab.bpe", "hparams.json", WEIGHTS)
STATES = {
    "missing": Path.unlink, "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "empty": lambda path: path.write_bytes(b""), "garbage": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "nested": lambda path: path.write_text("[" * 100_000), "other JSON": lambda path: path.write_text("[1, 2]"),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"too much"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    **{f"a link to {target}": lambda path, target=target: (path.unlink(), path.symlink_to(target.format(path)))
       for target in ("nowhere", "{}", "/dev/zero")},
    "sparse": lambda path: (path.write_bytes(b""), os.truncate(path, 2**40)),
} | ({"a pipe": lambda path: (path.unlink(), os.mkfifo(path))} if hasattr(os, "mkfifo") else {})  # fmt: skip
KINDS = dict.fromkeys(("a link to /dev/zero", "a pipe"), "it is not a file") | {"sparse": "has 1,099,511,627,776 bytes"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("file", FILES)
def test_an_error_names_a_damaged_file(tmp_path, file, state):
    directory = write_model(tmp_path / "bad")
    STATES[state](directory / file)
    with pytest.raises((ValueError, OSError)) as raised:
        load_encoder_hparams_and_params(str(directory))
    assert file in str(raised.value)
    assert KINDS.get(state, "") in str(raised.value) or file == WEIGHTS
    assert "\n" not in str(raised.value)
    assert "Errno" not in str(raised.value)


@pytest.mark.parametrize("file", FILES)
def test_an_error_names_an_unreadable_file(permissions, tmp_path, file):
    directory = write_model(tmp_path / "bad")
    (directory / file).chmod(0)
    result = run("gpt2.py", "x", f"--model_size={directory}", preexec_fn=as_any_user)
    assert f"{file} cannot be read: Permission denied" in error_line(result)


def test_files_are_read_as_utf8_whatever_the_locale(tiny_model):
    code = "import sys, utils; print(len(utils.load_encoder_hparams_and_params(sys.argv[1])[0].encoder))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run_code(code, str(tiny_model), env=env) == "300\n"


def test_a_saved_model_opens_unchanged(tmp_path, tiny_model):
    encoder, hparams, params = load_encoder_hparams_and_params(str(tiny_model))
    save_model(tmp_path / "new", encoder, hparams, params)
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(FILES)
    again = load_encoder_hparams_and_params(str(tmp_path / "new"))
    assert (again[0].encoder, again[0].bpe_ranks, again[1]) == (encoder.encoder, encoder.bpe_ranks, hparams)
    assert_same_params(again[2], params)


def test_unneeded_libraries_are_not_imported(mirror, tmp_path):
    code = """if True:
        import sys, utils
        utils.load_encoder_hparams_and_params("124M", sys.argv[1])
        assert "tensorflow" not in sys.modules, "while converting"
        if "--converted" in sys.argv:
            late = {"tensorflow", "requests", "tqdm", "fire", "store.download", "safetensors.numpy", "numba"}
            late |= {"filelock", "platformdirs", "huggingface_hub", "torch", "threadpoolctl"}
            assert not late & set(sys.modules), late & set(sys.modules)
    """
    for flags in ([], ["--converted"]):
        run_code(code, str(tmp_path), *flags)

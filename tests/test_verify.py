"""--verify finds every changed bit of a model, and opening a model does not check them."""

import importlib.util
import os
import shutil

import pytest

from helpers import huggingface_models as hf
from helpers.models import TINY, flip_bit, write_model
from helpers.processes import error_line, run
from store.checkpoint import CHECKPOINT_DATA, CHECKPOINT_INDEX
from store.files import digest
from store.models import INT8_WEIGHTS, SMALL_FILES, verify_model
from store.params import map_leaves, tensors_of
from store.tensors import WEIGHTS, map_tensors, save_tensors
from utils import load_encoder_hparams_and_params, save_model

SMALL = TINY | {"n_ctx": 4, "n_embd": 2, "n_head": 1, "n_layer": 1}
HAS_NUMBA = importlib.util.find_spec("numba") is not None


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "mine", *load_encoder_hparams_and_params(str(write_model(tmp_path / "source", SMALL))))
    if HAS_NUMBA:
        load_encoder_hparams_and_params(str(tmp_path / "mine"), quantize="int8")
    return tmp_path / "mine"


@pytest.mark.parametrize("file", [WEIGHTS, *[INT8_WEIGHTS] * HAS_NUMBA, *SMALL_FILES])
def test_every_changed_bit_is_found(model, file, capsys):
    verify_model(model)
    data = (model / file).read_bytes()
    n_header = data.rindex(b"}", 0, 4096) + 1 if file in (WEIGHTS, INT8_WEIGHTS) else 0
    for i in (*range(0, 8 * n_header, 7), *range(8 * n_header, 8 * len(data), 41)):
        (model / file).write_bytes(flip_bit(data, i))
        with pytest.raises(ValueError, match=file) as raised:
            verify_model(model)
        assert str(raised.value).isprintable()
    (model / file).write_bytes(data)
    verify_model(model)
    assert capsys.readouterr().err == f"{model}: verified\n" * 2


def test_a_run_verifies_only_if_asked_to(model):
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(flip_bit(data, 8 * len(data) - 20))
    command = ("gpt2.py", "Hi", f"--model_size={model}", "--n_tokens_to_generate=2")
    assert f"{WEIGHTS} is damaged: its bytes are not those that were written" in error_line(run(*command, "--verify"))
    assert run(*command).returncode == 0


def test_weights_are_verified_only_by_a_recorded_hash_or_a_name_in_the_hubs_cache(tmp_path):
    weights = hf.write(tmp_path / "hf") / WEIGHTS
    with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be verified: it has no SHA-256"):
        verify_model(tmp_path / "hf")
    blob = weights.rename(tmp_path / digest(weights).hex())
    weights.symlink_to(blob)
    verify_model(tmp_path / "hf")
    os.truncate(blob, blob.stat().st_size - 1)
    with pytest.raises(ValueError, match=WEIGHTS):
        verify_model(tmp_path / "hf")


@pytest.mark.slow
def test_converted_weights_are_compared_with_their_checkpoint(released, tmp_path):
    directory = shutil.copytree(released / "124M", tmp_path / "mine")
    *_, params = load_encoder_hparams_and_params(str(directory), verify=True)
    data, (_, metadata) = (directory / WEIGHTS).read_bytes(), map_tensors(directory / WEIGHTS)
    changed = map_leaves(lambda path, array: array + 1e-6 * (path == ("ln_f", "b")), params)
    save_tensors(directory / WEIGHTS, tensors_of(changed), metadata)
    with pytest.raises(ValueError, match=r"ln_f\.bias is not that of the checkpoint"):
        load_encoder_hparams_and_params(str(directory), verify=True)
    (directory / WEIGHTS).write_bytes(data)
    for file in (CHECKPOINT_DATA, CHECKPOINT_INDEX):
        data = (directory / file).read_bytes()
        for i in (1000, 8 * len(data) - 1000):
            (directory / file).write_bytes(flip_bit(data, i))
            with pytest.raises(ValueError, match=f"{file}.* (is damaged|has changed since)"):
                verify_model(directory)
        (directory / file).write_bytes(data)

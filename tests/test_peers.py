"""The other libraries that bench.py measures do the same work."""

import numpy as np
import pytest

from dev.peers import Model, llama_cpp_engine, tiktoken_encode, transformers_engine
from encoder import WORD
from export import main as export
from gpt2 import generate
from helpers.models import BUNDLED
from utils import load_encoder_hparams_and_params


def test_tiktoken_encodes_to_the_same_ids(shakespeare):
    pytest.importorskip("tiktoken")
    encoder, text = shakespeare[0], "ROMEO:\nI'll say  'yes' 12 times, née Zoë!\n\n"
    assert tiktoken_encode(encoder, WORD.pattern)(text) == encoder.encode(text)


@pytest.mark.reference
@pytest.mark.parametrize("is_exported", [False, True])
@pytest.mark.parametrize("kind", ["transformers", "f32", "q8_0"])
def test_peers_compute_the_same_model(kind, tmp_path, is_exported):
    for module in ("transformers",) if kind == "transformers" else ("llama_cpp", "gguf"):
        pytest.importorskip(module)
    directory = tmp_path / "exported" if is_exported else BUNDLED
    if is_exported:  # with its own layer_norm_epsilon
        export(str(BUNDLED), str(directory))
        config = (directory / "config.json").read_text()
        assert "1e-05" in config
        (directory / "config.json").write_text(config.replace("1e-05", "0.001"))
    model = Model(directory, "", "", *load_encoder_hparams_and_params(str(directory)))
    engine = transformers_engine(model, tmp_path) if kind == "transformers" else llama_cpp_engine(model, tmp_path, kind)
    ids, n_head = np.array(model.encoder.encode("ROMEO:")), model.hparams["n_head"]
    n_tokens = 1 if kind == "q8_0" else 8  # with int8 weights, later tokens differ
    expected = generate(ids, model.params, n_head, n_tokens)
    assert list(engine(ids, n_tokens)) == list(engine(ids, n_tokens)) == expected
    if kind == "transformers":
        batch = np.stack([ids, ids[::-1]])
        assert np.transpose(list(engine(batch, 8))).tolist() == generate(batch, model.params, n_head, 8)

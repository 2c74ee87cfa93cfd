"""The bundled model is what its README says it is, and a change of the code that harms it is seen."""

import json

import numpy as np
import pytest

from encoder import train_bpe
from gpt2 import generate, gpt2
from helpers import BUNDLED, SHAKESPEARE, run

GREEDY = """
I'll tell thee, I'll tell thee, and I'll not.

ROMEO:
I will not, I'll tell thee, and I'll not.

ROMEO:
"""
PARAGRAPH = """FIRST FISHERMAN:
What news from the harbour? The wind has turned, good neighbour,
And all night long the boats lay knocking at the quay.

SECOND FISHERMAN:
I'll tell thee: three came home, and one did not;
The widow stands and asks the sea for him.
"""
PARAGRAPH_LOSS, HELD_OUT_LOSS = 1.7735, 1.4991  # nats per character


def nats_per_character(text, encoder, hparams, params):
    """Total nats over total characters, in windows that do not overlap, in float64 from the logits on."""
    ids, total = encoder.encode(text), 0.0
    for start in range(0, len(ids) - 1, hparams["n_ctx"]):
        targets = ids[start + 1 : start + hparams["n_ctx"] + 1]
        logits = gpt2(ids[start : start + len(targets)], **params, n_head=hparams["n_head"]).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= log_probabilities[np.arange(len(targets)), targets].sum()
    return total / len(text)


def test_it_is_small_and_has_a_real_context(shakespeare):
    encoder, hparams, _ = shakespeare
    assert (BUNDLED / "model.safetensors").stat().st_size <= 8_500_000
    assert hparams["n_ctx"] >= 256
    assert len(encoder.encoder) == hparams["n_vocab"]


def test_greedy_text_after_romeo_is_the_recorded_one(shakespeare):
    encoder, hparams, params = shakespeare
    assert encoder.decode(generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 40)) == GREEDY


def test_the_first_command_of_the_readme_works_offline_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    shown = run("gpt2.py", "ROMEO:", "--model_size=shakespeare", "--n_tokens_to_generate=40", cwd=tmp_path)
    assert (shown.returncode, shown.stdout.decode()) == (0, GREEDY + "\n")
    assert list(tmp_path.iterdir()) == []


def test_loss_on_a_paragraph_is_the_recorded_one(shakespeare):
    assert nats_per_character(PARAGRAPH, *shakespeare) == pytest.approx(PARAGRAPH_LOSS, abs=1e-3)


def test_its_log_ends_with_the_training(shakespeare):
    steps = [line.split(",")[0] for line in (BUNDLED / "train.csv").read_text().splitlines()]
    assert (steps[0], steps[1], steps[-1]) == ("step", "0", "6500")


@pytest.mark.slow
def test_loss_on_the_last_tenth_of_its_text_is_the_recorded_one(shakespeare):
    text = shakespeare_text()
    assert nats_per_character(text[len(text) * 9 // 10 :], *shakespeare) == pytest.approx(HELD_OUT_LOSS, abs=1e-3)


def test_its_tokenizer_was_learned_from_the_first_nine_tenths():
    text = shakespeare_text()
    tokens, merges = train_bpe(text[: len(text) * 9 // 10], 1024)
    assert json.loads((BUNDLED / "encoder.json").read_text(encoding="utf-8")) == tokens
    lines = (BUNDLED / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == [" ".join(merge) for merge in merges]


def shakespeare_text():
    if not SHAKESPEARE.is_file():
        pytest.skip("the Shakespeare text is not here")
    return SHAKESPEARE.read_text(encoding="utf-8")

"""The bundled model is what its README says, and a change that harms it is detected."""

import json
import math

import pytest

from encoder import train_bpe
from evaluate import measures, text_losses
from helpers.models import BUNDLED, data_file, reference_losses
from helpers.processes import run

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


def shakespeare_text():
    return data_file("tinyshakespeare/input.txt").read_text(encoding="utf-8")


def nats_per_character(text, encoder, hparams, params):
    """Total nats divided by total characters, in windows that do not overlap."""
    ids, n_ctx, n_head = encoder.encode(text), hparams["n_ctx"], hparams["n_head"]
    starts = range(0, len(ids) - 1, n_ctx)
    return sum(reference_losses(ids[i : i + n_ctx + 1], params, n_head).sum() for i in starts) / len(text)


def test_the_first_command_of_the_readme_works_offline_in_any_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    shown = run("gpt2.py", "ROMEO:", "--model_size=shakespeare", "--n_tokens_to_generate=40", cwd=tmp_path)
    assert (shown.returncode, shown.stdout.decode()) == (0, GREEDY + "\n")
    assert list(tmp_path.iterdir()) == []


def test_loss_of_a_paragraph_equals_the_recorded_one(shakespeare):
    assert nats_per_character(PARAGRAPH, *shakespeare) == pytest.approx(PARAGRAPH_LOSS, abs=1e-3)


def test_it_is_small_and_its_log_is_complete(shakespeare):
    encoder, hparams, _ = shakespeare
    assert (BUNDLED / "model.safetensors").stat().st_size <= 8_500_000
    assert hparams["n_ctx"] >= 256 and len(encoder.encoder) == hparams["n_vocab"]
    steps = [line.split(",")[0] for line in (BUNDLED / "train.csv").read_text().splitlines()]
    assert (steps[0], steps[1], steps[-1]) == ("step", "0", "6500")


@pytest.mark.slow
def test_loss_of_the_validation_text_equals_the_recorded_one(shakespeare):
    (encoder, hparams, params), text = shakespeare, shakespeare_text()
    text = text[len(text) * 9 // 10 :]
    losses = text_losses(encoder.encode(text), params, hparams["n_head"])
    found = measures(losses.sum(), len(losses), len(text.encode()), len(text), len(text.split()))
    assert found["nats per token"] == pytest.approx(3.3839, abs=1e-4)
    assert found["bits per character"] * math.log(2) == pytest.approx(HELD_OUT_LOSS, abs=1e-4)


def test_its_tokenizer_was_learned_from_the_first_nine_tenths():
    text = shakespeare_text()
    tokens, merges = train_bpe(text[: len(text) * 9 // 10], 1024)
    assert json.loads((BUNDLED / "encoder.json").read_text(encoding="utf-8")) == tokens
    assert (BUNDLED / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] == list(map(" ".join, merges))

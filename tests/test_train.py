"""The optimizer and the data by independent formulas; trainings of seconds from beginning to end, and interrupted."""

import csv
import inspect
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import train
from gpt2 import gpt2, softmax
from helpers import ROOT, TINY, interrupt, run
from huggingface import export
from train import main, view_as
from utils import flatten, load_encoder_hparams_and_params, map_leaves, param_shapes, tensor_name

SMALL = {"n_vocab": 270, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2, "batch_size": 4, "eval_every": 5}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text that is easy to learn but has more than pairs of tokens in it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    animals, sounds = ("dog", "cat", "cow", "owl"), ("woof", "meow", "moo", "hoo")
    order = np.random.RandomState(0).randint(0, 4, 300)
    path.write_text("".join(f"The {animals[i]} and the {animals[i]} say {sounds[i]}.\n" for i in order))
    return str(path)


def weights_of(directory):
    return (Path(directory) / "model.safetensors").read_bytes()


def rows_of(directory):
    with open(Path(directory) / "train.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def press_ctrl_c_after(monkeypatch, step):
    """Let Ctrl-C arrive in the middle of a step."""
    original, calls = train.compute_gradient, itertools.count(1)

    def compute_gradient(*args):
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(train, "compute_gradient", compute_gradient)


# The parts


def test_initial_weights_are_those_of_gpt2():
    hparams = {"n_vocab": 500, "n_ctx": 300, "n_embd": 192, "n_head": 4, "n_layer": 8}
    params = view_as(param_shapes(hparams), np.full(4_000_000, np.nan, np.float32))
    train.initialize(params, np.random.default_rng(0))
    for name, array in flatten(params, tensor_name).items():
        if array.ndim == 1:
            assert np.all(array == (1 if "ln_" in name and name.endswith("weight") else 0)), name
            continue
        std = 0.01 if name == "wpe.weight" else 0.02 / 4 if "c_proj" in name else 0.02
        assert np.std(array) == pytest.approx(std, rel=0.02), name
        assert abs(np.mean(array)) < 0.02 * std, name


def test_learning_rate_warms_up_and_then_follows_a_cosine():
    rates = [train.learning_rate_at(progress, 2.0) for progress in np.linspace(0, 1, 1001)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(2.0)
    assert peak / 1000 == pytest.approx(train.WARM_UP)
    assert 0 < rates[0] < 0.05
    assert np.all(np.diff(rates[:peak]) >= 0)
    assert np.allclose(np.diff(rates[1 : peak + 1], n=2), 0, atol=0.05)
    assert np.all(np.diff(rates[peak:]) < 0)
    middle = train.learning_rate_at((1 + train.WARM_UP) / 2, 2.0)
    assert middle == pytest.approx(2.0 * (1 + train.LAST_RATE) / 2)
    assert rates[-1] == pytest.approx(2.0 * train.LAST_RATE)


def test_gradient_is_clipped_to_norm_1_only_if_it_is_longer():
    gradient = np.array([3, 4], np.float32)
    assert train.clip_gradient(gradient) == 5
    assert gradient == pytest.approx([0.6, 0.8])
    assert train.clip_gradient(gradient) == pytest.approx(1)
    assert gradient == pytest.approx([0.6, 0.8])


def test_only_matrices_decay(tiny_params):
    decay = view_as(param_shapes(TINY), train.weight_decay(param_shapes(TINY)))
    assert train.weight_decay(param_shapes(TINY)).dtype == np.float32
    for name, array in flatten(decay, tensor_name).items():
        assert np.all(array == np.float32(0.1 if array.ndim == 2 else 0)), name


def test_adamw_follows_the_paper():
    """Algorithm 2 of Loshchilov and Hutter in float64, number by number, over pieces that are longer than one block."""
    random = np.random.RandomState(0)
    n = 2**16 + 5
    weights, decay = random.standard_normal(n), 0.1 * random.randint(0, 2, n)
    vectors = {"weights": weights.astype(np.float32), "m": np.zeros(n, np.float32), "v": np.zeros(n, np.float32)}
    m, v = np.zeros(n), np.zeros(n)
    for step in range(1, 6):
        gradient = 0.1 * random.standard_normal(n)
        rate = 0.01 * step
        train.adamw(
            **vectors,
            gradient=gradient.astype(np.float32),
            decay=decay.astype(np.float32),
            step=step,
            learning_rate=rate,
        )
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        corrected = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        weights = weights - rate * (corrected + decay * weights)
    assert vectors["weights"].dtype == np.float32
    np.testing.assert_allclose(vectors["weights"], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.reference
def test_adamw_is_that_of_pytorch():
    import torch

    random = np.random.RandomState(0)
    weights = random.standard_normal(1000).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(weights))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    vectors = {"weights": weights, "m": np.zeros_like(weights), "v": np.zeros_like(weights)}
    for step in range(1, 6):
        gradient = random.standard_normal(1000).astype(np.float32)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        train.adamw(**vectors, gradient=gradient, decay=np.full(1000, 0.1, np.float32), step=step, learning_rate=0.01)
    np.testing.assert_allclose(vectors["weights"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_gradient_of_a_batch_is_the_mean_over_its_windows(tiny_params, n_threads):
    windows, shapes = np.random.RandomState(0).randint(0, 300, (5, 20)), param_shapes(TINY)
    buffers = [np.full(sum(a.size for a in flatten(tiny_params, str).values()), np.nan, np.float32) for _ in "123"]
    shares = [(buffer, view_as(shapes, buffer)) for buffer in buffers[:n_threads]]
    with ThreadPoolExecutor(n_threads) as pool:
        loss, gradient = train.compute_gradient(windows, tiny_params, 4, 0, (1, 2), shares, pool)
    grads = map_leaves(lambda _, array: np.zeros_like(array), tiny_params)
    expected_loss, backward = train.gpt2_loss(windows, tiny_params, 4)  # all at once
    backward(1.0, grads)
    expected = np.concatenate([grad.ravel() for grad in flatten(grads, tensor_name).values()])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def test_dropout_depends_on_the_seed_and_not_on_the_threads(tiny_params):
    windows, shapes = np.random.RandomState(0).randint(0, 300, (4, 20)), param_shapes(TINY)

    def loss(n_threads, seed):
        buffers = [np.zeros(sum(a.size for a in flatten(tiny_params, str).values()), np.float32) for _ in "12"]
        shares = [(buffer, view_as(shapes, buffer)) for buffer in buffers[:n_threads]]
        with ThreadPoolExecutor(n_threads) as pool:
            return train.compute_gradient(windows, tiny_params, 4, 0.3, seed, shares, pool)[0]

    assert loss(1, (0, 1)) == pytest.approx(loss(2, (0, 1)), rel=1e-6)
    assert loss(1, (0, 1)) != pytest.approx(loss(1, (0, 2)), rel=1e-3)


@pytest.mark.parametrize("n_tokens", [2, 32, 33, 34, 100])
def test_evaluation_predicts_every_token_but_the_first_in_windows_that_do_not_overlap(tiny_params, n_tokens):
    tokens = np.random.RandomState(0).randint(0, 300, n_tokens)
    nats = 0.0
    for start in range(0, n_tokens - 1, TINY["n_ctx"]):
        targets = tokens[start + 1 : start + TINY["n_ctx"] + 1]
        logits = gpt2(tokens[start : start + len(targets)], **tiny_params, n_head=4).astype(np.float64)
        nats -= np.log(softmax(logits))[np.arange(len(targets)), targets].sum()
    with ThreadPoolExecutor(2) as pool:
        assert train.evaluate(tokens, tiny_params, 4, pool) == pytest.approx(nats / (n_tokens - 1), rel=1e-5)


def test_bigram_counts_pairs_and_adds_one():
    probabilities = train.bigram([0, 1, 0, 1, 0, 2], n_vocab=3)
    assert probabilities(0).tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert probabilities(1).tolist() == pytest.approx([3 / 5, 1 / 5, 1 / 5])
    assert probabilities(2).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])  # never seen to be followed


def test_the_help_states_the_defaults():
    stated = dict(re.findall(r"^--(\w+) (\S+)  ", inspect.getdoc(main), flags=re.MULTILINE))
    for name, default in train.DEFAULTS.items():
        expected = {"minutes": "N", "encoder": "NAME", "init_from": "NAME"}.get(name, str(default))
        assert stated[name] == expected, name
    assert f"(with --init_from: {train.FINE_TUNING['learning_rate']})" in main.__doc__


# Trainings


def test_a_training_makes_a_model_that_beats_the_bigram_and_loads_like_any_other(text, tmp_path, capsys):
    out = tmp_path / "deep" / "model"
    main(text, str(out), **SMALL, max_steps=300, dropout=0, learning_rate=5e-3, seed=1)
    printed = capsys.readouterr().out
    encoder, hparams, params = load_encoder_hparams_and_params(str(out))
    assert hparams == {name: SMALL[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
    assert len(encoder.encoder) == 270
    table = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in printed.splitlines()
             if line.startswith(("uniform", "bigram", "GPT"))}  # fmt: skip
    assert table["uniform"][0] == pytest.approx(math.log(270), abs=1e-4)
    assert table["GPT"][0] < 0.8 * table["bigram"][0] < 0.8 * table["uniform"][0]

    # The last tenth, total nats over total characters, with the weights as they were saved:
    content = Path(text).read_text()
    tail = content[len(content) * 9 // 10 :]
    tokens = np.array(encoder.encode(tail))
    with ThreadPoolExecutor(1) as pool:
        loss = train.evaluate(tokens, params, hparams["n_head"], pool)
    assert table["GPT"] == pytest.approx([loss, loss * (len(tokens) - 1) / len(tail)], abs=1e-4)
    pairs = train.bigram(encoder.encode(content[: len(content) * 9 // 10]), 270)
    expected = -np.mean([np.log(pairs(a)[b]) for a, b in itertools.pairwise(tokens.tolist())])
    assert table["bigram"] == pytest.approx([expected, expected * (len(tokens) - 1) / len(tail)], abs=1e-4)
    sample = printed.split("GPT")[-1]
    assert "say " in sample
    assert f"python gpt2.py TEXT --model_size {out}" in sample

    shown = run("gpt2.py", "The dog and the", "--model_size", str(out), "--stop", ".")
    assert (shown.returncode, shown.stdout.decode()) == (0, " dog say woof\n")


def test_the_log_has_a_row_for_each_evaluation(text, tmp_path, monkeypatch):
    original, losses = train.compute_gradient, []

    def compute_gradient(*args):
        loss, gradient = original(*args)
        losses.append(loss)
        return loss, gradient

    monkeypatch.setattr(train, "compute_gradient", compute_gradient)
    main(text, str(tmp_path / "m"), **SMALL, max_steps=12)
    rows = rows_of(tmp_path / "m")
    assert list(rows[0]) == ["step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second"]
    assert [row["step"] for row in rows] == ["0", "5", "10", "12"]
    assert rows[0]["train_loss"] == ""  # nothing was trained yet
    assert float(rows[0]["validation_loss"]) == pytest.approx(math.log(270), abs=0.1)
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["validation_loss"])
    assert all(0 < float(row["learning_rate"]) <= 1.5e-3 for row in rows)
    means = [np.mean(losses[max(step - 5, 0) : step]) for step in (5, 10, 12)]  # of the last five steps
    assert [float(row["train_loss"]) for row in rows[1:]] == pytest.approx(means)
    assert all(float(row["tokens_per_second"]) > 0 for row in rows[1:])


def test_the_tokenizer_is_learned_from_the_training_part_only(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc abd abe " * 300 + "z" * 390)  # the last tenth is in these, whose pair is among the commonest
    main(str(path), str(tmp_path / "m"), **SMALL | {"n_vocab": 262}, max_steps=1)
    tokens = json.loads((tmp_path / "m" / "encoder.json").read_text())
    assert "ab" in tokens
    assert not any("zz" in token for token in tokens)


def test_end_of_text_in_the_text_is_one_token(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(Path(text).read_text().splitlines()))
    main(str(path), str(tmp_path / "m"), **SMALL, max_steps=150, learning_rate=1e-2, dropout=0)
    shown = run("gpt2.py", " dog say woof.", "--model_size", str(tmp_path / "m"))
    assert (shown.returncode, shown.stdout.decode()) == (0, "\n")


def test_the_same_seed_gives_the_same_weights(text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(text, str(tmp_path / name), **SMALL, max_steps=8, dropout=0.2, seed=seed)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")


@pytest.mark.parametrize("constant", ["WEIGHT_DECAY", "MAX_NORM", "WARM_UP"])
def test_a_training_uses(constant, text, tmp_path, monkeypatch):
    main(text, str(tmp_path / "a"), **SMALL, max_steps=5)
    monkeypatch.setattr(train, constant, 0.5 * getattr(train, constant))
    main(text, str(tmp_path / "b"), **SMALL, max_steps=5)
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "b")


@pytest.mark.parametrize("step", [1, 7, 10, 20])
def test_a_resumed_training_ends_as_an_unbroken_one(text, tmp_path, monkeypatch, step):
    options = SMALL | {"max_steps": 20, "dropout": 0.2, "seed": 3}
    main(text, str(tmp_path / "whole"), **options)
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step)
        if step < 20:
            with pytest.raises(KeyboardInterrupt):
                main(text, str(tmp_path / "broken"), **options)
            assert len(rows_of(tmp_path / "broken")) < len(rows_of(tmp_path / "whole"))
            assert weights_of(tmp_path / "broken") != weights_of(tmp_path / "whole")
        else:  # all was done when it came
            main(text, str(tmp_path / "broken"), **options)
    main(text, str(tmp_path / "broken"), resume=True)
    assert weights_of(tmp_path / "broken") == weights_of(tmp_path / "whole")
    whole, broken = (rows_of(tmp_path / name) for name in ("whole", "broken"))
    for row in (*whole, *broken):
        del row["tokens_per_second"]
    assert broken == whole


def test_a_killed_training_resumes_from_its_last_evaluation(text, tmp_path):
    options = [*FLAGS, "--max_steps=150", "--dropout=0.2"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert run("train.py", text, f"--out={whole}", *options).returncode == 0
    command = [sys.executable, str(ROOT / "train.py"), text, f"--out={broken}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (Path(broken, "train.csv").is_file() and len(rows_of(broken)) > 3):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    Path(broken, "training.safetensors.123.tmp").write_bytes(b"half of it, as if it had been killed while writing")
    assert run("train.py", text, f"--out={broken}", "--resume").returncode == 0
    assert not list(Path(broken).glob("*.tmp"))
    assert weights_of(broken) == weights_of(whole)


def test_ctrl_c_saves_says_how_to_go_on_and_ends_with_status_130(text, tmp_path):
    out = str(tmp_path / "m")
    command = [sys.executable, str(ROOT / "train.py"), text, f"--out={out}", *FLAGS, "--max_steps=100000"]
    restore = (
        {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)} if os.name == "posix" else {}
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **restore) as process:
        while not (Path(out, "train.csv").is_file() and len(rows_of(out)) > 1) and process.poll() is None:
            time.sleep(0.01)
        _, errors = interrupt(process, timeout=60)
    assert process.returncode == 130
    first, last = errors.decode().strip().split("\n\n")
    assert first.startswith("finishing this step")
    step = int(re.fullmatch(rf"stopped: --resume goes on from step (\d+); {out} has the best weights .*", last)[1])
    assert train.load_state(Path(out, train.STATE))[1]["step"] == step > 0
    assert sorted(path.name for path in Path(out).iterdir()) == [
        "encoder.json", "hparams.json", "model.safetensors", "train.csv", "training.safetensors", "vocab.bpe"
    ]  # fmt: skip
    load_encoder_hparams_and_params(out)


def test_a_finished_training_can_be_made_longer(text, tmp_path, capsys):
    main(text, str(tmp_path / "m"), **SMALL, max_steps=5)
    main(text, str(tmp_path / "m"), resume=True, max_steps=10)
    assert [row["step"] for row in rows_of(tmp_path / "m")] == ["0", "5", "10"]
    assert "finished before" not in capsys.readouterr().out
    before = weights_of(tmp_path / "m")
    main(text, str(tmp_path / "m"), resume=True)
    assert "the training was finished before: a larger --max_steps" in capsys.readouterr().out
    assert weights_of(tmp_path / "m") == before


def test_minutes_fit_the_whole_schedule_into_the_time(text, tmp_path):
    main(text, str(tmp_path / "m"), **SMALL, minutes=0.05)
    rows = rows_of(tmp_path / "m")
    rates = [float(row["learning_rate"]) for row in rows]
    assert max(rates) > 1e-3
    assert rates[-1] == pytest.approx(1.5e-3 * train.LAST_RATE, rel=0.05)
    assert len(rows) > 3


def test_the_best_weights_are_kept_and_not_the_last(text, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(losses))
    saved = []
    original = train.save_params
    monkeypatch.setattr(
        train, "save_params", lambda path, params: (original(path, params), saved.append(weights_of(path.parent)))
    )
    main(text, str(tmp_path / "m"), **SMALL, max_steps=15)
    assert len(saved) == 2
    assert weights_of(tmp_path / "m") == saved[1] != saved[0]


@pytest.mark.parametrize("flag", ["--eval_every=5", "--eval_every=1", "--max_steps=1"])
def test_a_training_that_diverges_stops_and_keeps_the_last_good_weights(text, tmp_path, flag):
    out = tmp_path / "m"
    shown = run("train.py", text, f"--out={out}", *FLAGS, "--max_steps=50", "--learning_rate=1e30", flag)
    assert shown.returncode == 1
    (message,) = shown.stderr.decode().splitlines()
    assert re.search(r"the training diverged: after step \d+ the loss is nan\. Try a lower --learning_rate", message)
    for name in ("model.safetensors", "training.safetensors"):
        with safe_open(out / name, framework="numpy") as file:
            assert all(np.isfinite(file.get_tensor(tensor)).all() for tensor in file.keys())  # noqa: SIM118
    shown = run("train.py", text, f"--out={out}", "--resume", "--learning_rate=1e-3", "--max_steps=12")
    assert shown.returncode == 0
    assert rows_of(out)[-1]["step"] == "12"


def test_bigram_stops_after_its_sample(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(text, "m", model="bigram", n_vocab=270)
    printed = capsys.readouterr().out
    assert "bigram" in printed
    assert "GPT" not in printed
    assert "The " in printed.split("bigram")[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_can_be_taken_from_another_model(text, tmp_path, tiny_model):
    main(text, str(tmp_path / "m"), **SMALL | {"n_vocab": None}, max_steps=1, encoder=str(tiny_model))
    encoder, hparams, _ = load_encoder_hparams_and_params(str(tmp_path / "m"))
    assert hparams["n_vocab"] == 300
    assert encoder.encoder == load_encoder_hparams_and_params(str(tiny_model))[0].encoder


def test_fine_tuning_starts_from_the_weights_of_a_model(text, tmp_path, tiny_model, tiny_params):
    main(text, str(tmp_path / "m"), init_from=str(tiny_model), n_ctx=16, max_steps=4, eval_every=2, batch_size=2)
    encoder, hparams, params = load_encoder_hparams_and_params(str(tmp_path / "m"))
    assert hparams == TINY | {"n_ctx": 16}
    content = Path(text).read_text()
    tokens = np.array(encoder.encode(content[len(content) * 9 // 10 :]))
    with ThreadPoolExecutor(1) as pool:
        before = train.evaluate(tokens, tiny_params | {"wpe": tiny_params["wpe"][:16]}, 4, pool)
    rows = rows_of(tmp_path / "m")
    assert float(rows[0]["validation_loss"]) == pytest.approx(before, rel=1e-5)
    assert float(rows[-1]["validation_loss"]) < before
    assert max(float(row["learning_rate"]) for row in rows) <= 1e-4
    assert np.abs(params["wte"] - tiny_params["wte"]).max() < 0.01


def test_a_model_of_hugging_face_can_be_trained_on(text, tmp_path, tiny_model, tiny_params):
    export(str(tiny_model), str(tmp_path / "exported"))
    main(text, str(tmp_path / "m"), init_from=str(tmp_path / "exported"), max_steps=1, batch_size=2)
    _, hparams, params = load_encoder_hparams_and_params(str(tmp_path / "m"))
    assert hparams == TINY
    assert 0 < np.abs(params["wte"] - tiny_params["wte"]).max() < 0.01


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("config.json", {"layer_norm_epsilon": 1e-3}, "has eps of its own, which train.py cannot train"),
        ("config.json", {"eos_token_id": 5}, "its tokenizer has another end of text"),
        ("added_tokens.json", {"[PAD]": 299}, r"its tokenizer has \[PAD\], which a model trained here cannot keep"),
    ],
)
def test_of_a_model_of_hugging_face_what_cannot_be_kept_is_refused_before_training(
    text, tmp_path, tiny_model, file, change, complaint
):
    directory = tmp_path / "exported"
    export(str(tiny_model), str(directory))
    found = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
    if file == "added_tokens.json":  # in the place of <|endoftext|>
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (directory / name).read_text(encoding="utf-8")
            (directory / name).write_text(content.replace("<|endoftext|>", "[PAD]"), encoding="utf-8")
    (directory / file).write_text(json.dumps(found | change))
    with pytest.raises(ValueError, match=complaint):
        main(text, str(tmp_path / "m"), init_from=str(directory), max_steps=1)
    assert not (tmp_path / "m").exists()


def test_the_shape_of_a_model_to_start_from_is_its_own(text, tmp_path, tiny_model):
    with pytest.raises(ValueError, match=r"n_layer is 2 in .*: it cannot be 3"):
        main(text, str(tmp_path / "m"), init_from=str(tiny_model), n_layer=3)
    main(text, str(tmp_path / "m"), init_from=str(tiny_model), n_head=4, n_embd=48, max_steps=1)
    assert load_encoder_hparams_and_params(str(tmp_path / "m"))[1] == TINY


def test_end_of_text_is_not_learned_letter_by_letter(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"{n} {n + 7}" for n in range(400)))
    main(str(path), str(tmp_path / "m"), **SMALL | {"n_vocab": 262}, max_steps=1)
    tokens = json.loads((tmp_path / "m" / "encoder.json").read_text())
    assert not any(len(token) > 1 and set(token) & set("endoftx|<>") for token in tokens.keys() - {"<|endoftext|>"})


@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files are POSIX")
def test_a_full_disk_is_one_line(text, tmp_path):
    import resource

    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))}
    shown = run("train.py", text, f"--out={tmp_path / 'm'}", *FLAGS, "--max_steps=1", **limit)
    (message,) = shown.stderr.decode().splitlines()
    assert shown.returncode == 1
    assert "model.safetensors could not be written" in message
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["encoder.json", "hparams.json", "vocab.bpe"]


def test_overwrite_replaces_the_model_and_leaves_other_files(text, tmp_path):
    out = tmp_path / "m"
    main(text, str(out), **SMALL, max_steps=5)
    before = weights_of(out)
    (out / "README.md").write_text("mine")
    main(text, str(out), **SMALL | {"n_embd": 32}, max_steps=1, overwrite=True)
    assert weights_of(out) != before
    assert [row["step"] for row in rows_of(out)] == ["0", "1"]
    assert (out / "README.md").read_text() == "mine"


def test_the_losses_are_drawn(text, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    main(text, str(tmp_path / "m"), **SMALL, max_steps=5)
    assert (tmp_path / "m" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main(text, str(tmp_path / "m"), **SMALL, max_steps=1)
    assert "loss.png was not drawn: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "m" / "loss.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out={out}", "--n_head=3"], "n_embd = 16 is not a multiple of n_head = 3"),
        (["--out={out}", "--n_vocab=5000"], "not for n_vocab = 5000: give at most "),
        (["--out={out}", "--n_vocab=100"], "n_vocab must be at least 257"),
        (["--out={out}", "--n_ctx=100000"], "too short"),
        (["--out={out}", "--n_layer=0"], "n_layer must be a whole number"),
        (["--out={out}", "--batch_size=1.5"], "batch_size must be a whole number"),
        (["--out={out}", "--max_steps=0"], "max_steps must be a whole number"),
        (["--out={out}", "--minutes=0"], "minutes must be more than 0"),
        (["--out={out}", "--minutes=soon"], "minutes must be a number"),
        (["--out={out}", "--dropout=1"], "dropout must be below 1"),
        (["--out={out}", "--dropout=-0.1"], "dropout must be a number"),
        (["--out={out}", "--learning_rate=nan"], "learning_rate must be a number"),
        (["--out={out}", "--learning_rate=inf"], "learning_rate must be a number"),
        (["--out={out}", "--seed=-1"], "seed must be a whole number"),
        (["--out={out}", "--model=lstm"], "model must be gpt or bigram"),
        (["--out={out}", "--encoder=nowhere"], "there is no model 'nowhere'"),
        (["--out={out}", "--init_from=nowhere"], "there is no model 'nowhere'"),
        (["--out={out}", "--init_from=a", "--encoder=b"], "leave out --init_from or --encoder"),
        (["--out={out}", "--resume"], "nothing to resume"),
        (["--out={out}", "--resume", "--overwrite"], "leave out one of them"),
        (["--out={out}/355M"], "355M is the name of a released model"),
        ([], "--out is missing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(text, tmp_path, flags, message):
    out = tmp_path / "m"
    shown = run("train.py", text, *FLAGS, *(flag.format(out=out) for flag in flags))
    errors = shown.stderr.decode()
    assert (shown.returncode, len(errors.splitlines())) == (1, 1), errors
    assert message in errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe\x00", "not a text in UTF-8"), (b"short", "n_vocab"), (None, "No such file")],
)
def test_a_text_that_cannot_be_used_is_one_line(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    shown = run("train.py", str(path), *FLAGS, f"--out={tmp_path / 'm'}")
    errors = shown.stderr.decode()
    assert (shown.returncode, len(errors.splitlines())) == (1, 1), errors
    assert message in errors
    assert not (tmp_path / "m").exists()


def test_what_exists_is_not_replaced_unasked(text, tmp_path):
    out = tmp_path / "m"
    main(text, str(out), **SMALL, max_steps=1)
    before = weights_of(out)
    with pytest.raises(FileExistsError, match="exists already: --overwrite replaces its model, --resume goes on with"):
        main(text, str(out), **SMALL, max_steps=2)
    with pytest.raises(FileExistsError, match=r"exists already: --overwrite replaces its model$"):
        main(text, str(tmp_path), **SMALL, max_steps=2)
    with pytest.raises(NotADirectoryError, match="is a file, not a directory"):
        main(text, text, **SMALL, overwrite=True)
    with pytest.raises(ValueError, match="begun with n_embd = 16: it cannot go on with 32"):
        main(text, str(out), n_embd=32, resume=True)
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text() + "!")
    with pytest.raises(ValueError, match="begun with another text"):
        main(str(other), str(out), resume=True)
    assert weights_of(out) == before


def test_a_damaged_state_is_refused(text, tmp_path):
    main(text, str(tmp_path / "m"), **SMALL, max_steps=1)
    state = tmp_path / "m" / "training.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"training\.safetensors is damaged"):
        main(text, str(tmp_path / "m"), resume=True)


def test_a_training_in_place_of_its_own_start(text, tmp_path):
    """Fine-tuning a model into its own directory reads the weights before it replaces them."""
    out = str(tmp_path / "m")
    main(text, out, **SMALL, max_steps=5)
    last = float(rows_of(out)[-1]["validation_loss"])
    main(text, out, init_from=out, max_steps=1, overwrite=True)
    assert float(rows_of(out)[0]["validation_loss"]) == pytest.approx(last, rel=1e-6)

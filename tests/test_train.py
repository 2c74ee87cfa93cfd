"""Trainings of a few seconds: new, interrupted, resumed, fine-tuned and refused."""

import csv
import hashlib
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bigram
import optimizer
import train
from encoder import END_OF_TEXT, read_encoder, train_bpe
from evaluate import text_losses
from export import main as export
from helpers.models import TINY, write_model
from helpers.processes import error_line, interrupt, run, run_code, start
from show import terminal
from store.files import HOLDER, locked, temporary_of
from store.tensors import map_tensors
from store.training import SHAPE, Settings, load_state
from train import main
from utils import load_encoder_hparams_and_params

SMALL = {"n_vocab": 270, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2, "batch_size": 4, "eval_every": 5}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text that is easy to learn, but not by counting pairs of tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    animals, sounds = ("dog", "cat", "cow", "owl"), ("woof", "meow", "moo", "hoo")
    order = np.random.RandomState(0).randint(0, 4, 300)
    path.write_text("".join(f"The {animals[i]} and the {animals[i]} say {sounds[i]}.\n" for i in order))
    return str(path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m"


def fit(text, out, **options):
    main(text, str(out), **SMALL | options)


def weights_of(directory):
    return (directory / "model.safetensors").read_bytes()


def rows_of(directory):
    with open(directory / "train.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_of(directory, column):
    return [float(row[column]) for row in rows_of(directory)]


def press_ctrl_c_after(monkeypatch, step, sent=signal.SIGINT):
    """Let Ctrl-C, or another signal, arrive in the middle of a step."""
    original, calls = train.compute_gradient, itertools.count(1)
    monkeypatch.setattr(train, "compute_gradient", lambda *args: (
        next(calls) == step and signal.raise_signal(sent), original(*args)
    )[1])  # fmt: skip


def start_process(text, out, *flags, n_rows):
    """Start a training in its own process, and wait until it has logged n_rows evaluations."""
    process = start("train.py", text, f"--out={out}", *FLAGS, *flags)
    while process.poll() is None and not ((out / "train.csv").is_file() and len(rows_of(out)) >= n_rows):
        time.sleep(0.01)
    return process


def test_the_help_states_the_default_of_each_setting():
    stated = dict(re.findall(r"^ +--(\w+) (\S+)  ", main.__doc__, flags=re.MULTILINE))
    for name, default in asdict(Settings()).items():
        assert stated[name] == ({"minutes": "N"}.get(name, "NAME") if default is None else str(default)), name
    assert f"(with --init_from: {train.FINE_TUNING_RATE})" in main.__doc__


def test_each_flag_becomes_the_setting_of_its_name(text, out):
    settings = Settings(270, 12, 16, 8, 2, 0.3, 3, 2e-3, 1, 4, 5, 7)
    main(text, str(out), **asdict(settings))
    assert load_state(out / "training.safetensors").settings == settings


@pytest.mark.parametrize("saved", [None, Settings(), Settings(max_steps=None, minutes=3)])
@pytest.mark.parametrize("given", [{"minutes": 2}, {"max_steps": 5}, {"max_steps": 5, "minutes": 2}])
def test_a_given_limit_replaces_the_other_one(saved, given):
    settings = train.choose_settings(given, saved)
    assert (settings.max_steps, settings.minutes) == (given.get("max_steps"), given.get("minutes"))


@pytest.mark.parametrize("is_pipe", [False, True])
def test_reading_a_text_in_pieces_gives_the_same_corpus(tmp_path, monkeypatch, is_pipe):
    """The tokenizer is learned from the training part. An end of text is a single token, and is not learned."""
    monkeypatch.setattr(terminal, "PIECE", 50)
    text = "é " + "".join(f"{n} {n + 7}\n\n{END_OF_TEXT}\n" for n in range(400)) + 600 * "z"  # "zz" must not be learned
    split = len(text) * 9 // 10
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "text.txt").read_bytes())))
    corpus = train.read_corpus("-" if is_pipe else str(tmp_path / "text.txt"), Settings(n_vocab=262))
    assert corpus.digest == hashlib.sha256(text.encode()).hexdigest()
    tables = train_bpe(text[:split].replace(END_OF_TEXT, "\n"), 262)
    assert (corpus.encoder.encoder, list(corpus.encoder.bpe_ranks)) == tables
    assert corpus.tokens.tolist() == corpus.encoder.encode(text[:split], allow_special=True)
    assert corpus.validation.tolist() == corpus.encoder.encode(text[split:], allow_special=True)
    assert corpus.tokens.dtype == np.uint16
    assert np.count_nonzero(corpus.validation == corpus.encoder.eot_id) == text[split:].count(END_OF_TEXT) > 15
    assert corpus.tokens_per_char == (len(corpus.validation) - 1) / (len(text) - split)


def test_a_trained_model_beats_the_bigram_model_and_loads_like_any_other(text, tmp_path, capsys):
    out = tmp_path / "deep" / "model"
    fit(text, out, max_steps=300, dropout=0, learning_rate=5e-3, seed=1)
    printed = capsys.readouterr().out
    encoder, hparams, params = load_encoder_hparams_and_params(str(out))
    assert hparams == {name: SMALL[name] for name in SHAPE}
    lines = re.findall(r"^(uniform|bigram|GPT) +([\d.]+) +([\d.]+)$", printed, flags=re.MULTILINE)
    table = {name: [float(per_token), float(per_character)] for name, per_token, per_character in lines}
    assert table["GPT"][0] < 0.8 * table["bigram"][0] < 0.8 * table["uniform"][0]
    # Compute the same losses from the saved weights.
    content = Path(text).read_text()
    split = len(content) * 9 // 10
    tokens, validation = (encoder.encode(part) for part in (content[:split], content[split:]))
    expected = {"uniform": math.log(270), "bigram": bigram.loss(bigram.bigram(tokens, 270), validation)}
    expected["GPT"] = text_losses(validation, params, hparams["n_head"]).mean()
    for name, loss in expected.items():
        per_character = loss * (len(validation) - 1) / (len(content) - split)
        assert table[name] == pytest.approx([loss, per_character], abs=1e-4)
    sample = printed.split("GPT")[-1]
    assert "say " in sample
    assert f"python gpt2.py TEXT --model_size {out}" in sample
    shown = run("gpt2.py", "The dog and the", "--model_size", str(out), "--stop", ".")
    assert (shown.returncode, shown.stdout.decode()) == (0, " dog say woof\n")


def test_the_log_has_a_row_for_each_evaluation_and_the_losses_are_plotted(text, out):
    fit(text, out, max_steps=12)
    rows, state = rows_of(out), load_state(out / "training.safetensors")
    assert list(rows[0]) == ["step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second"]
    assert [row["step"] for row in rows] == ["0", "5", "10", "12"]
    assert rows[0]["train_loss"] == "", "nothing was trained yet"
    assert len(set(state.losses)) == 5
    assert float(rows[-1]["train_loss"]) == pytest.approx(np.mean(state.losses))  # of the last five steps
    first, *_, last = numbers_of(out, "validation_loss")
    assert last < first == pytest.approx(math.log(270), abs=0.1)
    assert [float(row["train_loss"]) for row in rows[1:]] == pytest.approx([math.log(270)] * 3, abs=0.5)
    assert all(0 < rate <= 1.5e-3 for rate in numbers_of(out, "learning_rate"))
    assert all(float(row["tokens_per_second"]) > 0 for row in rows[1:])
    pytest.importorskip("matplotlib")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("is_fine_tuning", [False, True])
def test_the_same_seed_gives_the_same_weights(text, tmp_path, tiny_model, is_fine_tuning):
    options = {"init_from": str(tiny_model), "batch_size": 2} if is_fine_tuning else SMALL
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(text, str(tmp_path / name), **options, max_steps=2, dropout=0.2, seed=seed)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")


@pytest.mark.parametrize("constant", ["WEIGHT_DECAY", "MAX_NORM", "WARM_UP"])
def test_a_training_uses(constant, text, tmp_path, monkeypatch):
    fit(text, tmp_path / "a", max_steps=5)
    monkeypatch.setattr(optimizer, constant, 0.5 * getattr(optimizer, constant))
    fit(text, tmp_path / "b", max_steps=5)
    assert weights_of(tmp_path / "a") != weights_of(tmp_path / "b")


def test_the_best_weights_are_kept(text, out, monkeypatch):
    losses, seen = iter([5.0, 3.0, 4.0, 6.0]), []

    def text_losses(ids, params, n_head):
        seen.append(params["wte"].copy())
        return np.array([next(losses)])

    monkeypatch.setattr(train, "text_losses", text_losses)
    fit(text, out, max_steps=15)
    best = load_encoder_hparams_and_params(str(out))[2]["wte"]
    assert [np.array_equal(best, wte) for wte in seen] == [False, True, False, False]


def test_bigram_stops_after_its_sample(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(text, "m", model="bigram", n_vocab=270)
    _, printed = capsys.readouterr().out.split("bigram")
    assert "The " in printed and "GPT" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "sent"), [*((step, signal.SIGINT) for step in (1, 7, 10, 20)), (7, signal.SIGTERM)])
def test_a_resumed_training_ends_like_an_uninterrupted_one(text, tmp_path, monkeypatch, step, sent):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"max_steps": 20, "dropout": 0.2, "seed": 3}
    fit(text, whole, **options)
    is_done = step == 20  # Ctrl-C comes in the last step
    with monkeypatch.context() as patch, nullcontext() if is_done else pytest.raises(KeyboardInterrupt):
        press_ctrl_c_after(patch, step, sent)
        fit(text, broken, **options)
    assert (weights_of(broken) == weights_of(whole)) == is_done
    assert load_state(broken / "training.safetensors").step == step
    main(text, str(broken), resume=True)
    assert weights_of(broken) == weights_of(whole)
    for column in ("step", "train_loss", "validation_loss", "learning_rate"):
        assert [row[column] for row in rows_of(broken)] == [row[column] for row in rows_of(whole)]


def test_a_killed_training_resumes_from_its_last_evaluation(text, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(text, whole, max_steps=150, dropout=0.2)
    with start_process(text, broken, "--max_steps=150", "--dropout=0.2", n_rows=4) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    temporary_of(broken / "training.safetensors").write_bytes(b"the leftover of a process killed while writing")
    assert run("train.py", text, f"--out={broken}", "--resume").returncode == 0
    assert not list(broken.glob(".*.tmp"))
    assert weights_of(broken) == weights_of(whole)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_or_sigterm_saves_and_says_how_to_resume(text, out, sent, status):
    with start_process(text, out, "--max_steps=100000", n_rows=2) as process:
        second = run("train.py", text, f"--out={out}", "--overwrite")
        assert f"m cannot be written (process {process.pid} (train.py) is writing it)" in error_line(second)
        n_rows = len(rows_of(out))
        while len(rows_of(out)) == n_rows and process.poll() is None:
            time.sleep(0.01)
        _, errors = interrupt(process, timeout=60, sent=sent)
    assert process.returncode == status
    first, last = errors.decode().strip().split("\n\n")
    assert first.startswith("finishing this step")
    step = int(re.fullmatch(rf"stopped: --resume continues from step (\d+); {out} has the best weights .*", last)[1])
    assert load_state(out / "training.safetensors").step == step > 0
    files = ".lock encoder.json hparams.json model.safetensors train.csv training.safetensors vocab.bpe"
    assert sorted(os.listdir(out)) == files.split()


def test_a_finished_training_can_be_continued(text, out, capsys):
    fit(text, out, max_steps=5)
    main(text, str(out), resume=True, max_steps=10)
    assert [row["step"] for row in rows_of(out)] == ["0", "5", "10"]
    assert "already finished" not in capsys.readouterr().out
    before = weights_of(out)
    main(text, str(out), resume=True)
    assert "the training was already finished: a larger --max_steps" in capsys.readouterr().out
    assert weights_of(out) == before


def test_minutes_fit_the_whole_schedule_into_the_time(text, tmp_path, monkeypatch):
    """The clock advances by 0.01 s at each call. The time before an interruption counts."""
    clock = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 100))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(text, whole, minutes=0.05)
    rates = numbers_of(whole, "learning_rate")
    assert len(rates) > 3 and max(rates) > 1e-3
    assert rates[-1] == pytest.approx(1.5e-3 * optimizer.LAST_RATE, rel=0.05)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        press_ctrl_c_after(patch, 40)
        fit(text, broken, minutes=0.05)
    main(text, str(broken), resume=True)
    assert numbers_of(broken, "step")[-1] == pytest.approx(numbers_of(whole, "step")[-1], abs=10)


@pytest.mark.parametrize("flag", ["--eval_every=5", "--eval_every=1", "--max_steps=1"])
def test_a_diverging_training_stops_and_keeps_the_last_good_weights(text, out, flag):
    shown = run("train.py", text, f"--out={out}", *FLAGS, "--max_steps=50", "--learning_rate=1e30", flag)
    assert shown.returncode == 1
    (message,) = shown.stderr.decode().splitlines()
    assert re.search(r"the training diverged: after step \d+ the loss is nan\. Try a lower --learning_rate", message)
    for name in ("model.safetensors", "training.safetensors"):
        assert all(np.isfinite(array).all() for array in map_tensors(out / name)[0].values())
    shown = run("train.py", text, f"--out={out}", "--resume", "--learning_rate=1e-3", "--max_steps=12")
    assert shown.returncode == 0
    assert rows_of(out)[-1]["step"] == "12"


def test_encoder_takes_the_tokenizer_of_another_model(text, out, tiny_model):
    fit(text, out, n_vocab=None, max_steps=1, encoder=str(tiny_model))
    encoder, hparams, _ = load_encoder_hparams_and_params(str(out))
    assert (hparams["n_vocab"], encoder.encoder) == (300, read_encoder(tiny_model).encoder)


@pytest.mark.parametrize("is_exported", [False, True])
def test_init_from_starts_from_the_weights_of_another_model(text, tmp_path, out, tiny_model, tiny_params, is_exported):
    source = str(tmp_path / "exported") if is_exported else str(tiny_model)
    if is_exported:  # in Hugging Face's format
        export(str(tiny_model), source)
    main(text, str(out), init_from=source, n_ctx=16, n_head=4, max_steps=4, eval_every=2, batch_size=2)
    encoder, hparams, params = load_encoder_hparams_and_params(str(out))
    assert hparams == TINY | {"n_ctx": 16}
    content = Path(text).read_text()
    tokens = encoder.encode(content[len(content) * 9 // 10 :])
    before = text_losses(tokens, tiny_params | {"wpe": tiny_params["wpe"][:16]}, TINY["n_head"]).mean()
    losses = numbers_of(out, "validation_loss")
    assert losses[-1] < before == pytest.approx(losses[0], rel=1e-5)
    assert max(numbers_of(out, "learning_rate")) <= 1e-4
    assert 0 < np.abs(params["wte"] - tiny_params["wte"]).max() < 0.01


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_training_killed_before_its_start_is_complete_keeps_the_old_model(text, out):
    fit(text, out, max_steps=5)
    (out / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    code = """if True:
        import os, signal, sys
        from store import files
        import train
        files.swap_directories = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        train.main(sys.argv[1], sys.argv[2], init_from=sys.argv[2], overwrite=True, max_steps=1)
    """
    with pytest.raises(subprocess.CalledProcessError, match="SIGKILL"):
        run_code(code, text, str(out))
    assert {path: path.read_bytes() for path in out.iterdir() if path.name != HOLDER} == before
    main(text, str(out), init_from=str(out), max_steps=1, overwrite=True)
    assert ((out / "README.md").read_text(), set(out.iterdir())) == ("mine", set(before))
    assert list(out.parent.iterdir()) == [out], "leftovers are removed"


@pytest.mark.parametrize(("file", "there", "instead"), [
    ("hparams.json", '"n_head": 2', '"n_head": 4'), ("hparams.json", "}", ', "n_inner": 64}'),
    ("hparams.json", "\n", " "), ("encoder.json", "{", "{ "), ("vocab.bpe", "0.2", "0.3"),
])  # fmt: skip
def test_a_training_whose_files_were_edited_is_not_resumed(text, out, file, there, instead):
    fit(text, out, max_steps=1)
    (out / file).write_text((out / file).read_text(encoding="utf-8").replace(there, instead, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file} has changed since the training was started: restore it"):
        main(text, str(out), resume=True, max_steps=2)
    assert [row["step"] for row in rows_of(out)] == ["0", "1"]


def test_a_training_that_needs_more_memory_than_there_is_is_refused(text, out, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**17}.get)
    train.check_size(Settings())
    with pytest.raises(ValueError, match=r"batch_size = 10,000,000 takes (4|5)\d\.\d GB of memory, and .* has 0\.5"):
        train.check_size(Settings(batch_size=10**7))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**12}.get)
    for name, most in (("batch_size", 10**5), ("n_embd", 512), ("n_ctx", 1000), ("n_layer", 200)):
        with pytest.raises(ValueError, match=rf"{name}.*takes 0\.\d GB .*, and this machine has 0\.0: choose less"):
            fit(text, out, **{name: most}, max_steps=1)
    assert not out.exists()


def test_a_second_training_names_the_process_of_the_first(text, out):
    with locked(out, wait=False), pytest.raises(OSError, match=rf"m cannot be .*process {os.getpid()} \(.*is writing"):
        fit(text, out, max_steps=1)
    assert not out.exists()


def test_init_from_fixes_the_shape_of_the_model(text, tmp_path, out):
    source = str(write_model(tmp_path / "source", TINY | {"n_more": 1}))
    with pytest.raises(ValueError, match=r"n_layer is 2 in .*: it cannot be 3"):
        main(text, str(out), init_from=source, n_layer=3)
    main(text, str(out), init_from=source, max_steps=1, batch_size=2)
    assert load_encoder_hparams_and_params(str(out))[1] == TINY, "other entries of hparams.json are left out"


@pytest.mark.parametrize(("there", "instead", "complaint"), [
    ("1e-05", "0.001", "cannot be used here, because it has its own eps$"),
    ('"eos_token_id": 299', '"eos_token_id": 5', "cannot be used here, because it has its own end of text$"),
    (END_OF_TEXT, "[PAD]", r"it has its own \[PAD\]"),
])  # fmt: skip
def test_unsupported_hugging_face_models_are_refused(text, tmp_path, out, tiny_model, there, instead, complaint):
    export(str(tiny_model), str(tmp_path / "exported"))
    for file in (tmp_path / "exported").glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace(there, instead), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        main(text, str(out), init_from=str(tmp_path / "exported"), max_steps=1)
    assert not out.exists()


@pytest.mark.skipif(os.name != "posix", reason="limits of the size of files are POSIX")
def test_a_full_disk_ends_with_one_line(text, out):
    import resource

    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))}
    shown = run("train.py", text, f"--out={out}", *FLAGS, "--max_steps=1", **limit)
    assert "model.safetensors could not be written" in error_line(shown)
    assert not out.exists()


MISTAKES = {
    "--n_head=3": "n_head = 3 does not divide the model's n_embd = 16", "--n_layer=0": "n_layer must be a whole number",
    "--n_vocab=5000": "not for n_vocab = 5000: give at most ", "--n_vocab=100": "n_vocab must be at least 257",
    "--n_ctx=6000": "too short", "--batch_size=0": "batch_size must be a whole number",
    "--max_steps=0": "max_steps must be a whole number", "--seed=-1": "seed must be a whole number",
    "--minutes=0": "minutes must be above 0", "--dropout=1": "dropout must be 0 or more and below 1, not 1.0",
    "--dropout=-0.1": "dropout must be 0 or more", "--learning_rate=nan": "learning_rate must be 0 or more, not nan",
    "--learning_rate=inf": "learning_rate must be 0 or more, not inf",
    "--model=lstm": "model must be gpt or bigram", "--encoder=nowhere": "there is no model 'nowhere'",
    "--init_from=nowhere": "there is no model 'nowhere'", "--resume": "nothing to resume",
    "--init_from=a --encoder=b": "leave out --encoder", "--resume --overwrite": "leave out one of them",
    "--out={out}/355M": "355M is the name of a released model", "--out=": "--out is missing",
}  # fmt: skip


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(text, out, flags):
    shown = run("train.py", text, *FLAGS, f"--out={out}", *flags.format(out=out).split())
    assert MISTAKES[flags] in error_line(shown)
    assert not out.exists()


def test_existing_files_are_only_replaced_with_overwrite(text, tmp_path, out):
    fit(text, out, max_steps=1)
    before = weights_of(out)
    (tmp_path / "other.txt").write_text(Path(text).read_text() + "!")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source, directory, options, complaint in [
        (text, out, {}, "exists already: --overwrite replaces its model, --resume continues its training$"),
        (text, tmp_path, {}, "exists already: --overwrite replaces its model$"),
        *((text, path, {"overwrite": True}, "is not a directory") for path in (text, tmp_path / "loop")),
        (tmp_path / "none.txt", tmp_path / "new", {}, "none.txt cannot be read: there is no such file"),
        (text, out, {"resume": True, "n_embd": 32}, "started with n_embd = 16: it cannot be resumed with 32"),
        (tmp_path / "other.txt", out, {"resume": True}, "started with another text"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            main(str(source), str(directory), **options)
    assert weights_of(out) == before


def test_overwrite_replaces_the_model_that_it_starts_from_and_leaves_other_files(text, out, monkeypatch, capsys):
    fit(text, out, max_steps=5)
    before, last = weights_of(out), numbers_of(out, "validation_loss")[-1]
    (out / "README.md").write_text("mine")
    (out / "loss.png").write_text("the plot of the old training")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main(text, str(out), init_from=str(out), max_steps=1, overwrite=True)
    assert "loss.png was not drawn: pip install matplotlib" in capsys.readouterr().out
    assert weights_of(out) != before
    assert numbers_of(out, "validation_loss")[0] == pytest.approx(last, rel=1e-6)
    assert [row["step"] for row in rows_of(out)] == ["0", "1"]
    assert ((out / "README.md").read_text(), (out / "loss.png").exists()) == ("mine", False)

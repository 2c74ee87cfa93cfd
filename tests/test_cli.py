"""The command line as a user types it, mostly that of gpt2.py on a tiny model."""

import os
import platform
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import evaluate
import gpt2
import show
from helpers.models import ROOT, TINY, random_params, write_model
from helpers.processes import error_line, interrupt, run, start
from show import cli
from show.cli import help_text, sort_arguments
from utils import load_encoder_hparams_and_params

ODD_PROMPTS = [
    "2019", "1e3", "0x10", "(1)", "[1, 2]", "{'a': 1}", "None", "True", '"quoted"', "'quoted'", "a, b", "a=b", "--",
    "-1 degrees", "-x", "-5", "-nine", "- a list", "--hello world", "--5", "--seed is what I say", "-n is short",
    "#comment", "two\nlines\n", " leading space", "日本 👍🏽", "lambda x: x", "main", "__doc__",
]  # fmt: skip
SCRIPTS = ["gpt2.py", "encoder.py", "train.py", "evaluate.py", "lens.py", "export.py", "bench.py"]
SEPARATOR = "\n" + "-" * 40 + "\n"
posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and terminals are POSIX")


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_encoder_hparams_and_params(str(tiny_model))


@pytest.fixture(scope="module")
def gpt2_py(tiny_model):
    """Run gpt2.py on the tiny model."""

    def call(*arguments, **options):
        return run("gpt2.py", *arguments, f"--model_size={tiny_model}", **options)

    return call


@pytest.fixture
def typed(monkeypatch):
    """Call a function with the arguments of a command line, as a script does, but in this process."""

    def call(main, *argv, script="gpt2.py"):
        monkeypatch.setattr(sys, "argv", [script, *argv])
        cli.run(main)

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # as it ends, a script ignores Ctrl-C
    return call


@pytest.fixture
def printed(typed, capsys, tiny_model):
    """What gpt2.py prints, in this process."""

    def call(*argv, model=tiny_model):
        typed(gpt2.main, *argv, f"--model_size={model}")
        out, errors = capsys.readouterr()
        assert errors == ""
        return out

    return call


def continuation(model, prompt, n=40, **options):
    encoder, hparams, params = model
    inputs = encoder.encode(prompt) or [encoder.eot_id]
    return gpt2.generate(inputs, params, hparams["n_head"], n, eot_id=encoder.eot_id, n_vocab=300, **options)


def line(model, prompt, n=40):
    return model[0].decode(continuation(model, prompt, n)) + "\n"


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_a_prompt_is_text_wherever_it_stands(prompt):
    for argv in ([prompt, "--top_k", "1"], ["--top_k=1", prompt], ["--top_k=1", f"--prompt={prompt}"]):
        assert sort_arguments(gpt2.main, argv) == ([prompt], ["--top_k=1"])
    assert sort_arguments(gpt2.main, [prompt]) == sort_arguments(gpt2.main, [f"--prompt={prompt}"]) == ([prompt], [])


@pytest.mark.parametrize("text", ODD_PROMPTS)
def test_fire_hands_over_text_as_it_was_typed(text, typed):
    received = []

    def one(prompt: str, stop: str | None = None, top_k: int = 0, ignore_eot: bool = False):
        received.append((prompt, stop, top_k, ignore_eot))

    def several(context: str, *options: str, top_k: int = 0):
        received.append((context, options, top_k))

    typed(one, text, f"--stop={text}", "--top_k", "3", "--ignore_eot")
    typed(several, "context", "a", text, text, "--top_k=3")
    typed(several, "context", text)
    typed(several, "context", f"--options={text}")
    typed(several, text, "a", "--context=context")
    assert received[0] == (text, text, 3, True)
    assert received[1:3] == [("context", ("a", text, text), 3), ("context", (text,), 0)]
    assert received[3:] == [("context", (text,), 0), ("context", (text, "a"), 0)]


@pytest.mark.parametrize(("argv", "flags"), [
    (["--ignore_eot", "x"], ["--ignore_eot=True"]), (["x", "--ignore_eot"], ["--ignore_eot=True"]),
    (["--ignore_eot=True", "x"], ["--ignore_eot=True"]), (["x", "--ignore_eot=False"], ["--ignore_eot=False"]),
    (["x", "--stop", "-y", "--temperature", "-1", "--seed=2"], ["--stop=-y", "--temperature=-1", "--seed=2"]),
])  # fmt: skip
def test_a_switch_takes_no_value_and_the_value_of_a_flag_may_begin_with_a_dash(argv, flags):
    assert sort_arguments(gpt2.main, argv) == (["x"], flags)


@pytest.mark.parametrize(("argv", "flags"), [
    (["-n", "8", "x"], ["--n_tokens_to_generate=8"]), (["x", "-n=8"], ["--n_tokens_to_generate=8"]),
    (["-m", "a", "-t", "1", "x", "-s=2"], ["--model_size=a", "--temperature=1", "--seed=2"]),
    (["--n-tokens-to-generate", "8", "x", "--model-size=a-b"], ["--n_tokens_to_generate=8", "--model_size=a-b"]),
])  # fmt: skip
def test_flags_have_short_names_and_accept_hyphens(argv, flags):
    assert sort_arguments(gpt2.main, argv) == (["x"], flags)
    assert sort_arguments(first, ["-n"]) == (["-n"], []), "a script without that flag takes it as text"


AS_TEXT = 'To give it as text, write --prompt="{}"'


@pytest.mark.parametrize(("argv", "complaint"), [
    ([], "PROMPT is missing"), (["--top_k", "3"], "PROMPT is missing"), (["two", "words"], "quotes"),
    (["x", "--prompt=y"], "quotes"), (["x", "--seed"], "--seed needs a value"), (["x", "-s"], "--seed needs a value"),
    (["x", "--seed", "--top_k=3"], '--seed needs a value; if --top_k=3 is its value, write --seed="--top_k=3"'),
    (["x", "--stop", "--hello"], '--stop needs a value; if --hello is its value, write --stop="--hello"'),
    (["--hello"], f"unknown flag --hello. {AS_TEXT.format('--hello')}"),
    (["x", "--hello=a-b"], f"unknown flag --hello. {AS_TEXT.format('--hello=a-b')}"),
    (["--layer", "2", "x"], "unknown flag --layer"), (["--top", "1", "x"], "--top: did you mean --top_k?"),
    (["x", "--temperatur=1"], "unknown flag --temperatur: did you mean --temperature?"),
    (["x", "--n-sample", "2"], "unknown flag --n-sample: did you mean --n_samples?"),
    (["x", "--ignore_eot=maybe"], "--ignore_eot is a switch"), (["x", "--ignore_eot="], "--ignore_eot is a switch"),
    (["x", "-n", "1.5"], "--n_tokens_to_generate must be a whole number, not '1.5'"),
    (["x", "--seed=1or"], "--seed must be a whole number"), (["x", "-t="], "--temperature must be a number, not ''"),
])  # fmt: skip
def test_wrong_usage_is_one_line_and_the_usage_with_status_2(typed, capsys, mirror, argv, complaint):
    with pytest.raises(SystemExit) as raised:
        typed(gpt2.main, *argv)
    problem, usage_line = capsys.readouterr().err.splitlines()
    assert (raised.value.code, mirror.requests) == (2, [])
    assert complaint in problem and usage_line.startswith("usage: python gpt2.py PROMPT [--")


@pytest.mark.parametrize("words", [["gpt2.py"], ["lens.py"], ["lens.py", "next"], ["bench.py"]])
def test_the_version_is_shown_with_those_of_python_and_numpy(words):
    numbers = rf"gpt2-numpy {show.__version__} \(Python {platform.python_version()}, NumPy {np.__version__}\)\n"
    for flag in ("--version", "-V"):
        result = run(*words, flag)
        assert (result.returncode, result.stderr) == (0, b"") and re.fullmatch(numbers, result.stdout.decode())


def first(prompt: str):
    """Do the first thing."""


def second(context: str, *options: str, k: int = 1):
    """Do the second thing."""


BOTH, UNNAMED = {"first": first, "second": second}, {"": first, "second": second}


@pytest.mark.parametrize(("verbs", "argv", "complaint"), [
    (BOTH, [], "x.py: the command is missing: the first argument is one of first, second"),
    (BOTH, ["frst", "a"], "x.py: there is no 'frst': did you mean first?"),
    (BOTH, ["a b"], "x.py: there is no 'a b': the first argument is one of first, second"),
    (BOTH, ["first"], "x.py first: PROMPT is missing"),
    (UNNAMED, ["second", "a", "--k=1"], "x.py second: OPTIONS is missing"),
    (UNNAMED, ["second", "a", "b", "--kk=1"], "x.py second: unknown flag --kk: did you mean --k?"),
    (UNNAMED, ["secon"], "x.py: there is no 'secon': did you mean second?"),
])  # fmt: skip
def test_a_wrong_command_says_which_ones_exist(typed, capsys, verbs, argv, complaint):
    with pytest.raises(SystemExit) as raised:
        typed(verbs, *argv, script="/path/x.py")
    out, errors = capsys.readouterr()
    problem, usage_line, *_ = errors.split("\n")
    assert (usage_line[:5], out, raised.value.code) == ("usage", "", 2) and problem.startswith(complaint)


def fail(text: str):
    raise ValueError(f"there is no {text}")


@pytest.mark.parametrize(("main", "n_texts"), [(fail, 1), (first, 2), (BOTH, 1)])
@pytest.mark.parametrize("text", ["n" * 5000, "n " * 5000, "a\nb"])
def test_an_error_is_one_readable_line_whatever_text_it_repeats(typed, capsys, main, n_texts, text):
    with pytest.raises(SystemExit) as raised:
        typed(main, *[text] * n_texts)
    problem, *rest = (raised.value.code if main is fail else capsys.readouterr().err).splitlines()
    assert (text[:60] in problem) == text.isprintable()
    assert len(problem) < (2100 if " " in text else 300)
    assert [line[:5] for line in rest[:1]] == ([] if main is fail else ["usage"])


@pytest.mark.parametrize(("given", "status"), [((), 130), ((signal.SIGTERM,), 143)])
def test_the_exit_status_tells_which_signal_ended_the_run(typed, given, status):
    def stop():
        raise KeyboardInterrupt(*given)

    with pytest.raises(SystemExit) as raised:
        typed(stop)
    assert raised.value.code == status


@pytest.mark.parametrize("words", [*([name] for name in SCRIPTS), ["lens.py", "next"], ["evaluate.py", "choose"]])
def test_help_works_without_docstrings(words):
    result = run(*words, "--help", env={**os.environ, "PYTHONOPTIMIZE": "2"})
    assert (result.returncode, result.stdout[:5], result.stderr) == (0, b"usage", b"")


def test_help_names_every_flag_with_its_default_or_its_kind_of_value(gpt2_py):
    result = gpt2_py("x", "--help")
    text = result.stdout.decode()
    assert (result.returncode, result.stderr, gpt2_py("-h").stdout) == (0, b"", result.stdout)
    assert text.startswith("usage: python gpt2.py PROMPT [--")
    values = dict(re.findall(r"\[--(\w+)\s(\S+)\]", text))
    assert len(values) == 10 and (values["quantize"], values["models_dir"], values["seed"]) == ("int8", "DIR", "N")
    for name, value in values.items():
        assert re.search(rf"^(-\w, |    )--{name} {value}  ", text, re.MULTILINE), "the docstring and the usage differ"
    assert "\n-n, --n_tokens_to_generate 40  " in text and "--ignore_eot" in text and "fire" not in text.lower()
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_lists_each_shared_flag_once():
    for main, n in ((gpt2.main, 1), (evaluate.show_options, 1), (first, 0)):
        assert [help_text(main).count(f" --{name} ") for name in ("model_size", "models_dir")] == [n, n]
        assert ("downloaded once" in help_text(main)) == (main is gpt2.main)


# An empty prompt starts from <|endoftext|>. In any other prompt, <|endoftext|> is ordinary text.
@pytest.mark.parametrize("prompt", ["[1, 2]", "--hello world", "日本 👍🏽", "a<|endoftext|>", ""])
def test_it_prints_the_continuation_and_nothing_else(gpt2_py, model, prompt):
    result = gpt2_py(prompt, "--n_tokens_to_generate", "12")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == line(model, prompt, 12)


def test_a_dash_reads_standard_input_and_bytes_that_are_not_utf8_are_replaced(gpt2_py, model):
    two = "line one\nline two: é"
    for argument, data, prompt in (("-", two.encode(), two), ("-", b"a\xff", "a\ufffd"), (b"a\xff", b"", "a\ufffd")):
        result = gpt2_py(argument, "--n_tokens_to_generate=5", input=data, stdin=None)
        assert result.stdout.decode() == line(model, prompt, 5)


def test_samples_follow_their_options_and_each_stops_at_its_own_stop_text(printed, model):
    options = {"n_samples": 4, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    flags = ["--n_tokens_to_generate=20", *(f"--{name}={value}" for name, value in options.items())]
    samples = [model[0].decode(ids) for ids in continuation(model, "Hello", 20, **options)]
    stop = samples[1][6:8]
    assert printed("Hello", *flags) == SEPARATOR.join(samples) + "\n"
    stopped = [sample.partition(stop)[0] for sample in samples]
    assert printed("Hello", *flags, "--stop", stop) == SEPARATOR.join(stopped) + "\n" != SEPARATOR.join(samples) + "\n"


def test_padding_of_the_vocabulary_is_never_chosen(printed, tmp_path):
    hparams = {**TINY, "n_vocab": 320}
    params = random_params(hparams)
    params["wte"][300:] *= 100  # otherwise the padding would win
    assert printed("Hello", "--ignore_eot", model=write_model(tmp_path / "padded", hparams, params, n_tokens=300))


def test_it_stops_before_end_of_text_unless_told_to_go_on(printed, tmp_path, tiny_params):
    # This model always predicts <|endoftext|>: the final shift points to that token's row.
    params = {**tiny_params, "ln_f": {**tiny_params["ln_f"]}}
    params["ln_f"]["b"] = tiny_params["ln_f"]["b"] + 100 * tiny_params["wte"][299]
    ending = write_model(tmp_path / "model", TINY, params)
    assert printed("x", model=ending) == "\n"
    assert printed("x", "--n_samples=2", model=ending) == SEPARATOR + "\n"
    assert printed("x", "--n_tokens_to_generate=3", "--ignore_eot", model=ending) == "<|endoftext|>" * 3 + "\n"


BAD = {
    "n_tokens_to_generate": ["-1"], "n_samples": ["0"], "temperature": ["-0.1", "nan"], "top_k": ["-1"],
    "top_p": ["0", "1.01"], "seed": ["-1"], "stop": [""],
}  # fmt: skip


@pytest.mark.parametrize(("flag", "complaint"), [
    *((f"--{name}={value}", name) for name, values in BAD.items() for value in values),
    ("--n_samples=" + "1" * 30, ""), ("--temperature=1" + "0" * 400, ""),
    ("--model_size=125M", "124M, 355M, 774M, 1558M"), ("--model_size=1e3", "'1e3'"),
])  # fmt: skip
def test_a_users_mistake_is_one_line_and_status_1(typed, capsys, tiny_model, flag, complaint):
    with pytest.raises(SystemExit) as raised:
        typed(gpt2.main, "x", f"--model_size={tiny_model}", flag)
    (problem,) = raised.value.code.splitlines()  # a text: Python prints it and exits with status 1
    assert problem.startswith("gpt2.py: ") and complaint in problem
    assert capsys.readouterr() == ("", "")


def test_options_are_checked_before_anything_is_downloaded(mirror, tmp_path):
    assert error_line(run("gpt2.py", "x", "--top_p=2", cwd=tmp_path)).startswith("gpt2.py: top_p")
    assert [*mirror.requests, *tmp_path.iterdir()] == []


def test_a_failed_download_is_one_line_with_the_url(tmp_path, mirror):
    problem = error_line(run("gpt2.py", "x", "--model_size=355M", "--models_dir=models", cwd=tmp_path))
    assert f"{mirror.url}/355M/encoder.json" in problem and "404" in problem
    assert problem.endswith('needs no network: python gpt2.py "ROMEO:" --model_size shakespeare')


def test_a_bundled_model_is_found_from_any_directory(tmp_path):
    code = tmp_path / "code"
    for script in (path for folder in (".", "engine", "show", "store") for path in (ROOT / folder).glob("*.py")):
        copy = code / script.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(script.read_bytes())
    write_model(code / "models" / "mine")
    command = [sys.executable, str(code / "gpt2.py"), "x", "--model_size=mine", "--n_tokens_to_generate=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def in_shell(command, model, **environment):
    """Run a script on a model through bash, which offers redirections. PYTHONUNBUFFERED is unset unless given."""
    if os.name != "posix":
        pytest.skip("streams and pipes are POSIX")
    script, rest = command.split(maxsplit=1)
    command = f"'{sys.executable}' '{ROOT / script}' --model_size='{model}' {rest}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, env=env)


@posix
def test_ctrl_c_during_generation_keeps_the_text_and_has_no_traceback(tiny_model):
    flags = ("--ignore_eot", "--n_tokens_to_generate=100000000")
    with start("gpt2.py", "x", f"--model_size={tiny_model}", *flags) as process:
        first = os.read(process.stdout.fileno(), 100)
        time.sleep(0.2)
        rest, errors = interrupt(process)
    assert (process.returncode, bool(first), rest[-1:], errors) == (130, True, b"\n", b"")


@posix
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_numpy_is_imported_ends_without_a_traceback(tmp_path, script):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    result = run(script, "x", env={**os.environ, "PYTHONPATH": str(tmp_path)}, **options)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize(("redirection", "status", "errors"), [
    (">/dev/full", 1, b"gpt2.py: [Errno 28] No space left on device\n"),
    *((closed, 0, b"") for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-")),
])  # fmt: skip
def test_full_and_closed_streams(tiny_model, model, redirection, status, errors):
    result = in_shell(f"gpt2.py Hello --n_tokens_to_generate=5 {redirection}", tiny_model)
    assert (result.returncode, result.stderr) == (status, errors)
    assert result.stdout.decode() == ("" if redirection.startswith(">") else line(model, "Hello", 5))


@posix
@pytest.mark.parametrize("redirection", ["", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, redirection):
    code = "import show.start, sys; file = open(sys.argv[1], 'w'); file.write(str(file.fileno()))"
    subprocess.run(["bash", "-c", f'"$0" -c "$1" "$2" {redirection}', sys.executable, code, tmp_path / "n"], cwd=ROOT)
    assert (tmp_path / "n").read_text() == "3"


@pytest.mark.parametrize("command", [["gpt2.py"], ["lens.py", "surprisal"]])
def test_no_warning_appears_beside_the_one_line_of_an_error(tmp_path, command):
    params = random_params(TINY)
    params["wpe"][:] = np.inf
    result = run(*command, "Hello", f"--model_size={write_model(tmp_path / 'infinite', TINY, params)}")
    assert "not finite" in error_line(result)


def test_a_prompt_from_a_closed_standard_input_is_a_clear_error(tiny_model):
    result = in_shell("gpt2.py - <&-", tiny_model)
    assert error_line(result) == "gpt2.py: there is no prompt to read: standard input is closed"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("command", "n_bytes"), [
    ("encoder.py 'a b c d e f' | true", 0), ("gpt2.py --help | true", 0),
    ("gpt2.py x --ignore_eot --n_tokens_to_generate=100000000 | head -c 5", 5),
])  # fmt: skip
def test_a_pipe_that_nobody_reads_ends_quietly(tiny_model, command, n_bytes, unbuffered):
    result = in_shell(command, tiny_model, PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, len(result.stdout), result.stderr) == (0, n_bytes, b"")


@posix
@pytest.mark.parametrize("encoding", [
    {"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
], ids=str)  # fmt: skip
def test_characters_that_a_terminal_lacks_become_question_marks_or_escapes(gpt2_py, model, encoding):
    env = {**os.environ, **encoding}
    result = gpt2_py("1", "--n_tokens_to_generate=20", env=env)
    text = line(model, "1", 20)
    assert not text.isascii()
    assert (result.returncode, result.stdout, result.stderr) == (0, text.encode("ascii", "replace"), b"")
    error = error_line(run("gpt2.py", "x", "--model_size=é", env=env))
    assert error.isascii() and "there is no model '\\" in error

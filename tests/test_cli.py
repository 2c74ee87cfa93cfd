"""The command line, as a user types it; mostly gpt2.py's, on a tiny model."""

import inspect
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
import gpt2
from cli import print_samples, sort_arguments, until
from helpers import ROOT, TINY, interrupt, random_params, run, write_model
from utils import load_encoder_hparams_and_params

FLAGS = (
    "n_tokens_to_generate",
    "model_size",
    "models_dir",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "n_samples",
    "stop",
)
ODD_PROMPTS = [
    "2019",
    "[1, 2]",
    "{'a': 1}",
    "None",
    "True",
    '"quoted"',
    "'quoted'",
    "1e3",
    "0x10",
    "a, b",
    "a=b",
    "-1 degrees",
    "-x",
    "--hello world",
    "--hello",
    "--hello=world",
    "--seeds",
    "--seed is what I say",
    "--",
    "- a list",
    "(1)",
    "#comment",
    "two\nlines\n",
    " leading space",
    "日本 👍🏽",
    "lambda x: x",
    "main",
    "__doc__",
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_encoder_hparams_and_params(str(tiny_model))


@pytest.fixture(scope="module")
def gpt2_py(tiny_model):
    """Run gpt2.py on the tiny model."""

    def call(*arguments, **options):
        return run("gpt2.py", *arguments, f"--model_size={tiny_model}", **options)

    return call


def continuation(model, prompt, n=40, **options):
    encoder, hparams, params = model
    inputs = encoder.encode(prompt) or [encoder.eot_id]
    ids = gpt2.generate(inputs, params, hparams["n_head"], n, eot_id=encoder.eot_id, n_vocab=300, **options)
    return encoder.decode(ids)


# Sorting arguments


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_a_prompt_is_text_wherever_it_stands(prompt):
    for argv in ([prompt], [f"--prompt={prompt}"], [prompt, "--top_k", "1"], ["--top_k=1", prompt]):
        assert f"--prompt={prompt}" in sort_arguments(gpt2.main, argv)


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_fire_hands_over_text_as_it_was_typed(prompt, monkeypatch):
    received = []

    def main(prompt: str, stop: str | None = None, top_k: int = 0, ignore_eot: bool = False):
        received.extend([prompt, stop, top_k, ignore_eot])

    monkeypatch.setattr(sys, "argv", ["x.py", prompt, f"--stop={prompt}", "--top_k", "3", "--ignore_eot"])
    cli.run(main)
    assert received == [prompt, prompt, 3, True]


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_several_texts_arrive_as_they_were_typed(prompt, monkeypatch):
    received = []

    def main(context: str, options: list[str], top_k: int = 0):
        received.append((context, options, top_k))

    for options in (["a", prompt, prompt], [prompt]):
        monkeypatch.setattr(sys, "argv", ["x.py", "context", *options, "--top_k=3"])
        cli.run(main)
        assert received.pop() == ("context", options, 3)
    monkeypatch.setattr(sys, "argv", ["x.py", "context", f"--options={prompt}"])
    cli.run(main)
    assert received == [("context", [prompt], 0)]


@pytest.mark.parametrize("argv", [["--ignore_eot", "Hello"], ["Hello", "--ignore_eot"], ["--ignore_eot=True", "Hello"]])
def test_a_switch_takes_no_value(argv):
    assert set(sort_arguments(gpt2.main, argv)) == {"--prompt=Hello", "--ignore_eot=True"}


def test_the_value_of_a_flag_may_look_like_a_prompt_or_be_negative():
    arguments = sort_arguments(gpt2.main, ["x", "--stop", "-y", "--temperature", "-1", "--seed=2"])
    assert arguments == ["--stop=-y", "--temperature=-1", "--seed=2", "--prompt=x"]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "PROMPT is missing"),
        (["--top_k", "3"], "PROMPT is missing"),
        (["two", "words"], "quotes"),
        (["x", "--prompt=y"], "quotes"),
        (["x", "--seed"], "--seed needs a value"),
        (["x", "--seed", "--top_k", "3"], "--seed needs a value"),
        (["x", "--seed", "--top_k=3"], "--seed needs a value"),
        (["x", "--temprature", "1"], "unknown flag --temprature: did you mean --temperature?"),
        (["x", "--temperatur=1"], "unknown flag --temperatur: did you mean --temperature?"),
        (["--top", "1", "x"], "unknown flag --top: did you mean --top_k?"),
        (["x", "--n-samples", "2"], "unknown flag --n-samples: did you mean --n_samples?"),
        (["--hello", "world"], "unknown flag --hello"),
        (["x", "--ignore_eot=maybe"], "--ignore_eot is a switch"),
        (["x", "--ignore_eot="], "--ignore_eot is a switch"),
    ],
)
def test_missing_unknown_and_surplus_arguments_are_refused_with_the_usage(argv, complaint):
    with pytest.raises(SystemExit) as raised:
        sort_arguments(gpt2.main, argv)
    problem, usage_line = str(raised.value.code).split("\n")
    assert complaint in problem
    assert usage_line.startswith("usage: python ")


def test_help_names_every_flag_with_its_default(gpt2_py):
    result = gpt2_py("x", "--help")
    text = result.stdout.decode()
    assert (result.returncode, result.stderr) == (0, b"")
    assert gpt2_py("-h").stdout == result.stdout
    assert text.startswith("usage: python gpt2.py PROMPT [--")
    defaults = dict(zip(FLAGS, ("40", "124M", "models", "0", "0", "1", "N", "1", "TEXT"), strict=True))
    for name, default in defaults.items():
        assert f"[--{name} {default}]" in " ".join(text.split())
        assert f"\n--{name} {default}  " in text, "the docstring and the signature differ"
    assert "--ignore_eot" in text
    assert "fire" not in text.lower()
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_readme_lists_the_options_as_help_does():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = [line.strip() for line in readme.splitlines() if line.startswith("    --")]
    assert listed == [line for line in inspect.getdoc(gpt2.main).splitlines() if line.startswith("--")]


# Printing


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=5), st.randoms())
def test_text_ends_before_the_stop_text_however_it_is_cut(text, stop, random):
    cuts = sorted(random.sample(range(len(text) + 1), min(len(text), 5)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(until(pieces, stop)) == text.partition(stop)[0]


def test_text_is_not_held_back_longer_than_it_must():
    assert list(until(["ab", "c", "xy", "xyz!"], "xyz")) == ["ab", "c", "", "xy"]


def test_nothing_is_drawn_after_the_stop_text():
    def pieces():
        yield from ("one ", "two")
        raise AssertionError("read on")

    assert "".join(until(pieces(), "wo")) == "one t"


def test_each_sample_prints_its_own_ids_until_it_has_ended(capsys, tiny_encoder):
    a, b, c = tiny_encoder.encode("a") + tiny_encoder.encode("b") + tiny_encoder.encode("c")
    end = tiny_encoder.eot_id
    steps = (step for step in [[a, b], [end, c], [end, a], [end, b]])
    print_samples(steps, tiny_encoder, 4, 2, None, end)
    assert capsys.readouterr().out == "a\n" + "-" * 40 + "\nbcab\n"


def test_generation_ends_with_the_printing(capsys, tiny_encoder):
    (a,) = tiny_encoder.encode("a")
    closed = []

    def steps():
        try:
            while True:
                yield [a]
        finally:
            closed.append(True)

    print_samples(steps(), tiny_encoder, 100, 1, "aaa", None)
    assert closed
    assert capsys.readouterr().out == "\n"


# Running


@pytest.mark.parametrize("prompt", ["Hello", "[1, 2]", "--hello world", "日本 👍🏽", "2019"])
def test_it_prints_the_continuation_and_nothing_else(gpt2_py, model, prompt):
    result = gpt2_py(prompt, "--n_tokens_to_generate", "12")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == continuation(model, prompt, 12) + "\n"


def test_an_empty_prompt_starts_from_end_of_text(gpt2_py, model):
    result = gpt2_py("", "--n_tokens_to_generate", "5")
    assert result.stdout.decode() == continuation(model, "", 5) + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(gpt2_py, model):
    text = "line one\nline two: é"
    result = gpt2_py("-", "--n_tokens_to_generate=5", input=text.encode(), stdin=None)
    assert result.stdout.decode() == continuation(model, text, 5) + "\n"


def test_a_prompt_that_is_not_utf8_becomes_replacement_characters(gpt2_py, model):
    for result in (
        gpt2_py(b"a\xffb", "--n_tokens_to_generate=5"),
        gpt2_py("-", "--n_tokens_to_generate=5", input=b"a\xffb", stdin=None),
    ):
        assert result.stdout.decode() == continuation(model, "a\ufffdb", 5) + "\n"


def test_end_of_text_in_a_prompt_is_ordinary_text(gpt2_py, model):
    prompt = "a<|endoftext|>"
    assert gpt2_py(prompt, "--n_tokens_to_generate=5").stdout.decode() == continuation(model, prompt, 5) + "\n"


def test_sampling_follows_its_options_and_seed(gpt2_py, model):
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "seed": 3}
    flags = [f"--{name}={value}" for name, value in options.items()]
    once, again = (gpt2_py("Hello", "--n_tokens_to_generate=10", *flags).stdout.decode() for _ in range(2))
    assert once == again
    samples = gpt2.generate(
        model[0].encode("Hello"), model[2], 4, 10, n_samples=1, eot_id=model[0].eot_id, n_vocab=300, **options
    )
    assert once == model[0].decode(samples[0]) + "\n"


def test_several_samples_are_printed_one_after_another(gpt2_py, model):
    flags = ("--n_samples=3", "--temperature=1.5", "--seed=1", "--n_tokens_to_generate=8")
    encoder, _, params = model
    samples = gpt2.generate(
        encoder.encode("Hello"), params, 4, 8, n_samples=3, temperature=1.5, seed=1, eot_id=encoder.eot_id, n_vocab=300
    )
    separator = "\n" + "-" * 40 + "\n"
    assert gpt2_py("Hello", *flags).stdout.decode() == separator.join(map(encoder.decode, samples)) + "\n"


def test_it_stops_before_the_stop_text_also_where_that_spans_tokens(gpt2_py, model):
    whole = continuation(model, "Hello", 30)
    encoder, _, params = model
    first, second = map(encoder.decode, ([i] for i in gpt2.generate(encoder.encode("Hello"), params, 4, 2)))
    for stop in (whole[10], whole[5:9], first[-1:] + second[:1], whole[-2:]):
        result = gpt2_py("Hello", "--n_tokens_to_generate=30", "--stop", stop)
        assert result.stdout.decode() == whole.partition(stop)[0] + "\n", repr(stop)
    assert gpt2_py("Hello", "--n_tokens_to_generate=30", "--stop=not there").stdout.decode() == whole + "\n"


def test_each_sample_stops_at_its_own_stop_text(gpt2_py, model):
    flags = ("--n_samples=4", "--temperature=1", "--seed=2", "--n_tokens_to_generate=20")
    samples = gpt2_py("Hello", *flags).stdout.decode()[:-1].split("\n" + "-" * 40 + "\n")
    stop = samples[1][6]
    stopped = gpt2_py("Hello", *flags, "--stop", stop).stdout.decode()[:-1].split("\n" + "-" * 40 + "\n")
    assert stopped == [sample.partition(stop)[0] for sample in samples]


def test_padding_of_the_vocabulary_is_never_chosen(tmp_path):
    hparams = {**TINY, "n_vocab": 320}
    params = random_params(hparams)
    params["wte"][300:] *= 100  # it would win otherwise
    model = write_model(tmp_path / "padded", hparams, params, n_tokens=300)
    result = run("gpt2.py", "Hello", f"--model_size={model}", "--ignore_eot")
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.fixture(scope="module")
def ending_model(tmp_path_factory, tiny_params):
    """A model that always says <|endoftext|>: of that token's row and the final shift, only theirs is large."""
    params = {**tiny_params, "wte": tiny_params["wte"].copy(), "ln_f": {**tiny_params["ln_f"]}}
    params["ln_f"]["b"] = tiny_params["ln_f"]["b"] + 100 * tiny_params["wte"][299]
    return write_model(tmp_path_factory.mktemp("ending") / "model", TINY, params)


def test_it_stops_before_end_of_text_unless_told_to_go_on(ending_model):
    assert run("gpt2.py", "x", f"--model_size={ending_model}").stdout == b"\n"
    result = run("gpt2.py", "x", f"--model_size={ending_model}", "--n_tokens_to_generate=3", "--ignore_eot")
    assert result.stdout == b"<|endoftext|>" * 3 + b"\n"
    result = run("gpt2.py", "x", f"--model_size={ending_model}", "--n_samples=2")
    assert result.stdout == b"\n" + b"-" * 40 + b"\n\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["x", "--n_tokens_to_generate=-1"], "n_tokens_to_generate"),
        (["x", "--n_tokens_to_generate=1.5"], "n_tokens_to_generate"),
        (["x", "--n_tokens_to_generate=many"], "n_tokens_to_generate"),
        (["x", "--n_samples=0"], "n_samples"),
        (["x", "--n_samples=True"], "n_samples"),
        (["x", "--temperature=-0.1"], "temperature"),
        (["x", "--temperature=nan"], "temperature"),
        (["x", "--top_k=-1"], "top_k"),
        (["x", "--top_p=0"], "top_p"),
        (["x", "--top_p=1.01"], "top_p"),
        (["x", "--seed=-1"], "seed"),
        (["x", "--seed={[]: 1}"], "seed"),
        (["x", "--seed=1or"], "seed"),
        (["x", "--n_samples=" + "1" * 30], ""),
        (["x", "--temperature=1" + "0" * 400], ""),
        (["x", "--stop="], "stop"),
        (["x " * 1000], "room for 32"),
        (["x", "--model_size=125M"], "124M, 355M, 774M, 1558M"),
        (["x", "--model_size=1e3"], "'1e3'"),
        (["two", "words"], "quotes"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_1(gpt2_py, arguments, complaint):
    result = run("gpt2.py", *arguments) if "--model_size" in arguments[-1] else gpt2_py(*arguments)
    assert result.returncode == 1
    assert result.stdout == b""
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("gpt2.py: ")
    assert complaint in lines[0]
    assert [line[:6] for line in lines[1:]] in ([], ["usage:"])


def test_options_are_checked_before_anything_is_downloaded(mirror, tmp_path):
    result = run("gpt2.py", "x", "--top_p=2", cwd=tmp_path)
    assert b"top_p" in result.stderr
    assert mirror.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_one_line_with_the_url(tmp_path, mirror, monkeypatch):
    result = run("gpt2.py", "x", "--model_size=355M", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, b"")
    (line,) = result.stderr.decode().splitlines()
    assert f"{mirror.url}/355M/encoder.json" in line
    assert "404" in line
    assert line.endswith('needs no network: python gpt2.py "ROMEO:" --model_size shakespeare')


def test_a_bundled_model_is_found_from_any_directory(tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    for script in ROOT.glob("*.py"):
        (code / script.name).write_bytes(script.read_bytes())
    write_model(code / "models" / "mine")
    command = [sys.executable, str(code / "gpt2.py"), "x", "--model_size=mine", "--n_tokens_to_generate=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and terminals are POSIX")


@posix
def test_ctrl_c_ends_with_what_was_printed_a_newline_and_status_130(tiny_model):
    command = [sys.executable, str(ROOT / "gpt2.py"), "x", f"--model_size={tiny_model}", "--ignore_eot"]
    with subprocess.Popen(
        [*command, "--n_tokens_to_generate=100000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    ) as process:
        first = os.read(process.stdout.fileno(), 100)
        time.sleep(0.2)
        rest, errors = interrupt(process)
    assert process.returncode == 130
    assert first
    assert rest.endswith(b"\n")
    assert errors == b""


@posix
def test_ctrl_c_while_numpy_is_imported_ends_without_a_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = run(
        "gpt2.py",
        "x",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


@posix
@pytest.mark.parametrize(
    ("redirection", "status", "errors"),
    [
        (">/dev/full", 1, b"gpt2.py: [Errno 28] No space left on device\n"),
        (">&-", 0, b""),
        ("2>&-", 0, b""),
        ("<&-", 0, b""),
        (">&- 2>&- <&-", 0, b""),
    ],
)
def test_full_and_closed_streams(tiny_model, model, redirection, status, errors):
    command = f"'{sys.executable}' '{ROOT / 'gpt2.py'}' Hello --model_size='{tiny_model}' --n_tokens_to_generate=5"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(["bash", "-c", f"{command} {redirection}"], capture_output=True, timeout=60, env=env)
    assert (result.returncode, result.stderr) == (status, errors)
    written = "" if redirection.startswith(">") else continuation(model, "Hello", 5) + "\n"
    assert result.stdout.decode() == written


@posix
@pytest.mark.parametrize("arguments", ["encoder.py 'a b c d e f'", "gpt2.py --help"])
def test_a_pipe_that_nobody_reads_ends_quietly(tiny_model, arguments):
    script, rest = arguments.split(maxsplit=1)
    command = f"'{sys.executable}' '{ROOT / script}' {rest} --model_size='{tiny_model}' | true"
    for unbuffered in ("", "1"):
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, env=env)
        assert result.stderr == b""


@posix
def test_a_closed_pipe_ends_quietly(tiny_model):
    command = f"'{sys.executable}' '{ROOT / 'gpt2.py'}' x --model_size='{tiny_model}' --ignore_eot"
    result = subprocess.run(
        ["bash", "-c", f"{command} --n_tokens_to_generate=100000000 | head -c 5"], capture_output=True, timeout=60
    )
    assert len(result.stdout) == 5
    assert (result.returncode, result.stderr) == (0, b"")


@posix
@pytest.mark.parametrize("stdout_is_terminal", [True, False])
def test_speed_is_shown_on_a_terminal_only_and_never_on_standard_output(tiny_model, stdout_is_terminal):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, str(ROOT / "gpt2.py"), "x", f"--model_size={tiny_model}", "--n_tokens_to_generate=7"]
    stdout = theirs if stdout_is_terminal else subprocess.PIPE
    process = subprocess.Popen([*command, "--ignore_eot"], stdout=stdout, stderr=theirs)
    printed, _ = process.communicate(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode("utf-8", "replace")
    os.close(ours)
    assert process.returncode == 0
    assert "7 tokens in " in shown
    assert shown.rstrip().endswith("tokens/s")
    if not stdout_is_terminal:
        assert b"tokens" not in printed
        assert "0/7" in shown, "a bar where the text goes elsewhere"


ASCII = [
    {"PYTHONIOENCODING": "ascii"},
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@posix
@pytest.mark.parametrize("encoding", ASCII, ids=str)
def test_a_terminal_that_lacks_a_character_shows_a_question_mark(gpt2_py, model, encoding):
    result = gpt2_py("1", "--n_tokens_to_generate=20", env={**os.environ, **encoding})
    assert (result.returncode, result.stderr) == (0, b"")
    text = continuation(model, "1", 20)
    assert not text.isascii()
    assert result.stdout == text.encode("ascii", "replace") + b"\n"


@posix
@pytest.mark.parametrize("encoding", ASCII, ids=str)
def test_an_error_about_other_letters_is_shown_in_those_that_there_are(encoding):
    result = run("gpt2.py", "x", "--model_size=é", env={**os.environ, **encoding})
    (line,) = result.stderr.splitlines()
    assert (result.returncode, line.isascii()) == (1, True)
    assert b"there is no model '\\" in line


@posix
def test_a_prompt_from_a_closed_standard_input_is_a_clear_error(tiny_model):
    command = f"'{sys.executable}' '{ROOT / 'gpt2.py'}' - --model_size='{tiny_model}' <&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"gpt2.py: there is no prompt to read: standard input is closed\n"

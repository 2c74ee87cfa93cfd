"""Text in a terminal: documents and prompts, samples up to their stop text, tables, colours."""

import io
import itertools
import os
import re
import sys
import tempfile
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder import AddedToken, Encoder
from helpers.processes import run
from show import terminal

COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}  # rich takes that for a terminal


def environment(variables):
    return mock.patch.dict(os.environ, variables, clear=True)


@pytest.mark.parametrize(("data", "error", "message"), [
    (b"\xef\xbb\xbf", ValueError, "text is empty"), (None, OSError, "text cannot be read: No such file"),
    (b"one\ntwo caf\xe9 3", UnicodeError, r"not a text in UTF-8 \(byte 0xe9 at offset 11, in line 2\): convert it"),
])  # fmt: skip
def test_a_document_that_cannot_be_read_is_an_error_that_names_it(tmp_path, data, error, message):
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    with pytest.raises(error, match=message):
        terminal.read_document(str(tmp_path / "text"))


def stdin_of(data):
    return mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


PARTS = [b"a", b"\r", b"\n", b"\r\n", "é".encode(), "日".encode(), "日".encode()[:2], b"\xff", b"\xef\xbb\xbf"]


@given(st.lists(st.sampled_from(PARTS), min_size=1), st.integers(6, 12), st.sampled_from(["strict", "replace"]))
def test_a_document_that_is_read_in_pieces_has_the_text_or_the_error_of_the_whole(parts, n_bytes, errors):
    data = b"".join(parts)
    try:
        expected = data.decode("utf-8", errors).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        expected = expected or " is empty"
    except UnicodeDecodeError as error:
        expected = f"offset {error.start}, in line {data.count(10, 0, error.start) + 1})"
    with stdin_of(data), mock.patch.object(terminal, "PIECE", n_bytes), tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text")
        path.write_bytes(data)
        for source in ("-", str(path)):
            try:
                assert terminal.read_document(source, errors) == expected
            except ValueError as error:
                assert expected in str(error)


WORDS = st.text("ab'sé日1 \n-", min_size=1, max_size=9)


@given(st.lists(WORDS, max_size=60).map(" ".join), st.integers(1, 6), st.integers(1, 8), st.integers(1, 100))
def test_of_a_long_prompt_the_last_tokens_are_used(tiny_encoder, text, times, n_ctx, n_bytes):
    text = times * text
    ids, err = tiny_encoder.encode(text) or [tiny_encoder.eot_id], io.StringIO()
    sizes = mock.patch.multiple(terminal, PIECE=n_bytes, FIRST_WORDS=60)
    for prompt in ("-", text) if text != "-" else "-":
        with stdin_of(text.encode()), sizes, mock.patch.object(sys, "stderr", err):
            assert terminal.prompt_ids(prompt, tiny_encoder, n_ctx) == ids[-n_ctx:]
            assert terminal.prompt_ids(text + "a", tiny_encoder) == tiny_encoder.encode(text + "a"), "without a limit"
    note = f"the prompt is longer than the model's context: only its last {n_ctx} tokens are used\n"
    assert err.getvalue() == (note * (1 + (text != "-")) if len(ids) > n_ctx else "")


def test_no_word_that_the_last_tokens_are_of_is_cut_and_no_prompt_in_silence(capsys, tiny_encoder):
    letters = {token: i for token, i in tiny_encoder.encoder.items() if len(token) == 1}
    pairs = Encoder(letters | {"aa": 256}, [("a", "a")])
    assert terminal.prompt_ids("aaaab", pairs, 2) == [256, letters["b"]]
    strips = Encoder(letters | {"<m>": 256}, [], [AddedToken("<m>", lstrip=True)])
    assert terminal.prompt_ids("a" + " " * 10**6 + "<m>", strips, 2) == [256]
    assert re.findall("its last (.) tokens", capsys.readouterr().err) == ["2", "1"]


def test_a_prompt_of_10_mb_of_spaces_is_read_in_little_memory(tiny_encoder):
    with stdin_of(b" " * 10_000_000):
        tracemalloc.start()
        assert len(terminal.prompt_ids("-", tiny_encoder, 32)) == 32
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50e6


def test_the_command_line_continues_the_end_of_a_prompt_that_is_longer_than_the_context(tiny_model):
    shown = run("gpt2.py", "a b" * 100, "--model_size", str(tiny_model), "--n_tokens_to_generate=2")
    assert (shown.returncode, shown.stderr.count(b"only its last 32 tokens are used\n")) == (0, 1)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_a_bar_or_a_line_a_minute(monkeypatch, is_terminal):
    err = io.StringIO()
    err.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(terminal.time, "monotonic", itertools.count(0, 25).__next__)
    items = ["a" * 1000] * 7
    assert list(terminal.progress(items, "token", lambda: 10_000)) == items
    lines = re.findall(r"^ (\d+)% [\d.]+k/10.0k .*token/s\]$", err.getvalue(), re.MULTILINE)
    assert ("\r" in err.getvalue(), lines) == ((True, []) if is_terminal else (False, ["30", "60"]))


def test_an_empty_prompt_needs_an_end_of_text_to_start_from(tiny_encoder, monkeypatch):
    assert terminal.prompt_ids("", tiny_encoder) == [tiny_encoder.eot_id]
    monkeypatch.setattr(tiny_encoder, "bos_id", None)
    assert terminal.prompt_ids("a", tiny_encoder) == tiny_encoder.encode("a")
    with pytest.raises(ValueError, match="the prompt is empty"):
        terminal.prompt_ids("", tiny_encoder)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=5), st.randoms())
def test_text_ends_before_the_stop_text_however_it_is_cut(text, stop, random):
    cuts = sorted(random.sample(range(len(text) + 1), min(len(text), 5)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(terminal.until(pieces, stop)) == text.partition(stop)[0]


def test_text_is_not_held_back_longer_than_it_must_and_nothing_is_drawn_after_the_stop_text():
    pieces = iter(["ab", "c", "xy", "xyz!", "not drawn"])
    assert list(terminal.until(pieces, "xyz")) == ["ab", "c", "", "xy"]
    assert list(pieces) == ["not drawn"]


def test_each_sample_prints_its_own_ids_until_it_has_ended(capsys, tiny_encoder):
    a, b, c, end = *(tiny_encoder.encode(letter)[0] for letter in "abc"), tiny_encoder.eot_id
    terminal.print_samples((step for step in [[a, b], [end, c], [end, a], [end, b]]), tiny_encoder, 4, 2, None, end)
    assert capsys.readouterr().out == "a\n" + "-" * 40 + "\nbcab\n"


def test_generation_ends_with_the_printing(capsys, tiny_encoder):
    making = (tiny_encoder.encode("a") for _ in itertools.count())  # a reference, or it would end with its last one
    terminal.print_samples(making, tiny_encoder, 100, 1, "aaa", None)
    assert (making.gi_frame, capsys.readouterr().out) == (None, "\n"), "it is closed"


@pytest.mark.parametrize(("out_is_terminal", "err_is_terminal"), [(True, True), (False, True), (False, False)])
def test_speed_is_shown_on_a_terminal_only_and_never_on_standard_output(
    monkeypatch, tiny_encoder, out_is_terminal, err_is_terminal
):
    out, err = io.StringIO(), io.StringIO()
    out.isatty, err.isatty = lambda: out_is_terminal, lambda: err_is_terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    terminal.print_samples((tiny_encoder.encode("a") for _ in range(7)), tiny_encoder, 7, 1, None, None)
    out, err = out.getvalue(), err.getvalue()
    assert out == "aaaaaaa\n"
    assert bool(re.search(r"(^|\r)7 tokens in \d+\.\d\d s, [\d.]+ tokens/s\n$", err)) == bool(err) == err_is_terminal
    assert ("0/7" in err) == (err_is_terminal and not out_is_terminal), "a bar where the text goes elsewhere"


def test_labels_show_what_cannot_be_seen(tiny_encoder):
    shown = "".join(terminal.token_labels(tiny_encoder.encode(" a\n\té\x1b"), tiny_encoder))
    assert shown in ("·a⏎⇥é\\x1b", "·a⏎⇥\\xc3\\xa9\\x1b")


def test_every_token_of_gpt2_has_a_label_that_prints_and_a_part_of_a_character_is_shown_as_its_bytes(gpt2_encoder):
    assert terminal.token_labels(gpt2_encoder.encode("日"), gpt2_encoder) == ["\\xe6\\x97", "\\xa5"]
    assert terminal.token_labels([50256], gpt2_encoder) == ["<|endoftext|>"]
    assert all(label and label.isprintable() for label in terminal.token_labels(range(50257), gpt2_encoder))


@pytest.mark.parametrize("has_colours", [False, True])
def test_a_table_is_aligned_and_takes_any_text(capsys, has_colours):
    if has_colours:
        pytest.importorskip("rich", reason="rich is not installed")
    with environment(COLOURS if has_colours else {}):
        terminal.print_table({"n": "right", "[b]text": "left"}, [("1", "[red]a"), ("100", "")])
    header, rows = capsys.readouterr().out.split("\n", 1)
    assert header == ("\x1b[1m  n  [b]text\x1b[0m" if has_colours else "  n  [b]text")
    assert rows == "  1  [red]a\n100\n"


def test_colours_are_for_a_terminal_that_has_them_without_no_color():
    pytest.importorskip("rich", reason="rich is not installed")
    has_none = {"TERM": "xterm-256color"}, {**COLOURS, "NO_COLOR": "1"}, {**COLOURS, "TERM": "dumb"}
    for variables in (COLOURS, *has_none):
        with environment(variables):
            assert bool(terminal.colour_console()) == (variables is COLOURS)


@pytest.mark.parametrize("error", ["ImportError", "SyntaxError", "AttributeError"])
def test_a_missing_or_broken_rich_is_as_good_as_none(capsys, monkeypatch, tmp_path, error):
    (tmp_path / "rich.py").write_text(f"raise {error}('not here')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with environment(COLOURS):
        terminal.print_table({"n": "right"}, [("1",)])
    assert capsys.readouterr().out == "n\n1\n"


def test_each_token_has_the_colour_of_its_own_bits():
    rich = pytest.importorskip("rich.console", reason="rich is not installed")
    out = io.StringIO()
    console = rich.Console(file=out, force_terminal=True, color_system="256", width=80)
    terminal.print_surprise(console, ["a", "b", "[c]\t", "", "é\n", "f", "\x1b[31m", ""], [0.1, 2, 3, 7.5, 99, 0])
    text, _, legend = out.getvalue().partition("\n\n")
    colours = dict(zip(terminal.HEAT, (f"\x1b[30;48;5;{colour}m" for colour in terminal.HEAT.values()), strict=True))
    assert text.replace("\x1b[0m", "") == f"ab{colours[2]}[c]⇥{colours[7]}é⏎\n{colours[14]}f\\x1b[31m"
    assert all(f"{colour} {least} and more " in legend for least, colour in colours.items())

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

COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}


def test_a_document_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match="text cannot be read: No such file"):
        list(terminal.document_pieces(str(tmp_path / "text")))


def stdin_of(data):
    return mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


PARTS = [b"a", b"\r", b"\n", b"\r\n", "é".encode(), "日".encode(), "日".encode()[:2], b"\xff", b"\xef\xbb\xbf"]


@given(st.lists(st.sampled_from(PARTS), min_size=1), st.integers(6, 12), st.sampled_from(["strict", "replace"]))
def test_a_document_read_in_pieces_has_the_same_text_or_error_as_the_whole(parts, n_bytes, errors):
    data = b"".join(parts)
    try:
        expected = data.decode("utf-8", errors).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        expected = expected or " is empty"
    except UnicodeDecodeError as error:
        place = f"offset {error.start}, in line {data.count(10, 0, error.start) + 1}"
        expected = f" is not UTF-8 text (byte {data[error.start]:#x} at {place}): convert it"
    with stdin_of(data), mock.patch.object(terminal, "PIECE", n_bytes), tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text")
        path.write_bytes(data)
        for source in ("-", str(path)):
            try:
                assert "".join(terminal.document_pieces(source, errors)) == expected
            except ValueError as error:
                assert expected in str(error)


WORDS = st.text("ab'sé日1 \n-", min_size=1, max_size=9)


@given(st.lists(WORDS, max_size=60).map(" ".join), st.integers(1, 6), st.integers(1, 8), st.integers(1, 100))
def test_only_a_long_prompts_last_tokens_are_used(tiny_encoder, text, times, n_ctx, n_bytes):
    text = times * text
    ids, err = tiny_encoder.encode(text) or [tiny_encoder.eot_id], io.StringIO()
    sizes = mock.patch.multiple(terminal, PIECE=n_bytes, LONGEST_WORD=60)
    for prompt in ("-", text) if text != "-" else "-":
        with stdin_of(text.encode()), sizes, mock.patch.object(sys, "stderr", err):
            assert terminal.prompt_ids(prompt, tiny_encoder, n_ctx) == ids[-n_ctx:]
            assert terminal.prompt_ids(text + "a", tiny_encoder) == tiny_encoder.encode(text + "a"), "without a limit"
    note = f"the prompt is longer than the model's context: only its last {n_ctx} tokens are used\n"
    assert err.getvalue() == (note * (1 + (text != "-")) if len(ids) > n_ctx else "")


def test_a_long_prompt_is_not_cut_inside_its_last_tokens_and_never_silently(capsys, tiny_encoder):
    letters = {token: i for token, i in tiny_encoder.encoder.items() if len(token) == 1}
    pairs = Encoder(letters | {"aa": 256}, [("a", "a")])
    assert terminal.prompt_ids("aaaab", pairs, 2) == [256, letters["b"]]
    strips = Encoder(letters | {"<m>": 256}, [], [AddedToken("<m>", lstrip=True)])
    with stdin_of(b"a" + b" " * 10**6 + b"<m>"):
        assert terminal.prompt_ids("-", strips, 2) == [256]
    assert re.findall("its last (.) tokens", capsys.readouterr().err) == ["2", "1"]


def test_a_prompt_of_10_mb_of_spaces_is_read_in_little_memory(tiny_encoder):
    with stdin_of(b" " * 10_000_000):
        tracemalloc.start()
        assert len(terminal.prompt_ids("-", tiny_encoder, 32)) == 32
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50e6


def test_gpt2_py_continues_the_end_of_a_prompt_that_is_longer_than_the_context(tiny_model):
    shown = run("gpt2.py", "a b" * 100, "--model_size", str(tiny_model), "--n_tokens_to_generate=2")
    assert (shown.returncode, shown.stderr.count(b"only its last 32 tokens are used\n")) == (0, 1)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_a_bar_or_a_line_a_minute(monkeypatch, is_terminal):
    err = io.StringIO()
    err.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", err)
    seconds = []
    monkeypatch.setattr("tqdm.std.time", lambda: 25 * len(seconds))
    items = (seconds.append(1) or "a" * 1000 for _ in range(7))
    assert list(terminal.progress(items, "token", lambda: 10_000)) == ["a" * 1000] * 7
    lines = re.findall(r"^ (\d+)% [\d.]+k/10.0k .*token/s\]$", err.getvalue(), re.MULTILINE)
    assert ("\r" in err.getvalue(), lines) == ((True, []) if is_terminal else (False, ["30", "60"]))


def test_an_empty_prompt_starts_from_end_of_text_or_is_refused(tiny_encoder, monkeypatch):
    assert terminal.prompt_ids("", tiny_encoder) == [tiny_encoder.eot_id]
    monkeypatch.setattr(tiny_encoder, "bos_id", None)
    assert terminal.prompt_ids("a", tiny_encoder) == tiny_encoder.encode("a")
    with pytest.raises(ValueError, match="the prompt is empty"):
        terminal.prompt_ids("", tiny_encoder)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=5), st.randoms())
def test_text_ends_before_the_stop_text_wherever_its_pieces_are_cut(text, stop, random):
    cuts = sorted(random.sample(range(len(text) + 1), min(len(text), 5)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(terminal.text_before(stop, pieces)) == text.partition(stop)[0]


def test_text_is_held_back_only_as_long_as_needed_and_generation_ends_at_the_stop_text():
    pieces = iter(["ab", "c", "xy", "xyz!", "not drawn"])
    assert list(terminal.text_before("xyz", pieces)) == ["ab", "c", "", "xy"]
    assert list(pieces) == ["not drawn"]


def test_each_sample_prints_its_own_ids_until_it_ends(capsys, tiny_encoder):
    a, b, c, end = *(tiny_encoder.encode(letter)[0] for letter in "abc"), tiny_encoder.eot_id
    terminal.print_samples((step for step in [[a, b], [end, c], [end, a], [end, b]]), tiny_encoder, 4, 2, None, end)
    assert capsys.readouterr().out == "a\n" + "-" * 40 + "\nbcab\n"


def test_generation_ends_with_the_printing(capsys, tiny_encoder):
    making = (tiny_encoder.encode("a") for _ in itertools.count())  # without this name, it would end by itself
    terminal.print_samples(making, tiny_encoder, 100, 1, "aaa", None)
    assert (making.gi_frame, capsys.readouterr().out) == (None, "\n"), "it is closed"


@pytest.mark.parametrize(("out_is_terminal", "err_is_terminal"), [(True, True), (False, True), (False, False)])
def test_the_speed_is_shown_only_on_a_terminal_and_never_on_standard_output(
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
    assert ("\r" in err) == (err_is_terminal and not out_is_terminal), "a bar if the text goes elsewhere"


def test_an_error_before_the_first_step_comes_at_once_however_many_samples(tiny_encoder):
    with pytest.raises(ValueError, match="too many"):
        terminal.print_samples((int("too many") for _ in "x"), tiny_encoder, 1, 10**15, None, None)


def test_labels_show_invisible_characters(tiny_encoder):
    shown = "".join(terminal.token_labels(tiny_encoder.encode(" a\n\té\x1b"), tiny_encoder))
    assert shown in ("·a⏎⇥é\\x1b", "·a⏎⇥\\xc3\\xa9\\x1b")


def test_every_token_of_gpt2_has_a_label_that_prints_and_a_part_of_a_character_is_shown_as_its_bytes(gpt2_encoder):
    assert terminal.token_labels(gpt2_encoder.encode("日"), gpt2_encoder) == ["\\xe6\\x97", "\\xa5"]
    assert terminal.token_labels([50256], gpt2_encoder) == ["<|endoftext|>"]
    assert all(label and label.isprintable() for label in terminal.token_labels(range(50257), gpt2_encoder))


@pytest.mark.parametrize("colours", [False, True])
def test_a_table_is_aligned_and_takes_any_text(capsys, colours):
    with mock.patch.dict(os.environ, COLOURS if colours else {}, clear=True):
        terminal.print_table({"n": "d", "[b]text": "s", "p": ".1%"}, [(1, "[red]a", 0.5), (100, "", 1)])
    header, rows = capsys.readouterr().out.split("\n", 1)
    assert header == ("\x1b[1m  n  [b]text       p\x1b[0m" if colours else "  n  [b]text       p")
    assert rows == "  1  [red]a    50.0%\n100           100.0%\n"


def test_colours_are_only_for_a_terminal_that_has_them_and_without_no_color():
    for variables in (COLOURS, {"TERM": "xterm-256color"}, {**COLOURS, "NO_COLOR": "1"}, {**COLOURS, "TERM": "dumb"}):
        with mock.patch.dict(os.environ, variables, clear=True):
            assert terminal.has_colours() == (variables is COLOURS)


def test_each_token_has_the_colour_of_its_own_bits(capsys):
    terminal.print_surprise(["a", "b", "[c]\t", "", "é\n", "f", "\x1b[31m", ""], [0.1, 2, 3, 7.5, 99, 0])
    text, _, legend = capsys.readouterr().out.partition("\n\n")
    colours = dict(zip(terminal.HEAT, (f"\x1b[30;48;5;{colour}m" for colour in terminal.HEAT.values()), strict=True))
    assert text.replace("\x1b[0m", "") == f"ab{colours[2]}[c]⇥{colours[7]}é⏎\n{colours[14]}f\\x1b[31m"
    assert all(f"{colour} {least} and more " in legend for least, colour in colours.items())

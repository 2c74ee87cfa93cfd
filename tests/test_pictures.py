"""pictures.py: labels, tables and pictures; the page has a file of its own, test_report.py."""

import io
import itertools
import math
import os
import warnings

import numpy as np
import pytest

from lens import logit_lens, trace
from pictures import (
    HEAT,
    MOST_LENS,
    attention_figure,
    check_picture,
    logit_lens_figure,
    print_surprise,
    print_table,
    save_figure,
    token_labels,
)

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ODD = "$x$ \n\t日本 é_{2}^ ​"


def drawn(figure):
    """The figure, drawn as a file of it would be; a warning, as of a character that the font lacks, is a failure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()
    return figure


def maps_of(n_maps, n_seq):
    weights = np.tril(np.random.default_rng(0).random((n_maps, n_seq, n_seq)))
    return weights / weights.sum(axis=-1, keepdims=True)


def lens_of(n_layer, n_seq):
    random = np.random.default_rng(0)
    shape = (n_layer + 1, n_seq)
    return {"probabilities": random.random(shape), "ranks": random.integers(1, 50_000, shape)}


def texts(ax):
    return [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels()) if label.get_text()]


def assert_no_overlap(figure):
    """No two labels of an axis cover each other."""
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes:
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and ax.axison]
            for one, other in itertools.pairwise(boxes):
                assert not one.shrunk(0.8, 0.8).overlaps(other.shrunk(0.8, 0.8))


def test_labels_show_what_cannot_be_seen(tiny_encoder):
    ids = tiny_encoder.encode(" a\n\té\x1b")
    shown = "".join(token_labels(ids, tiny_encoder))
    assert shown in ("·a⏎⇥é\\x1b", "·a⏎⇥\\xc3\\xa9\\x1b")


def test_a_byte_that_is_no_whole_character_is_shown_as_its_number(gpt2_encoder):
    assert token_labels(gpt2_encoder.encode("日"), gpt2_encoder) == ["\\xe6\\x97", "\\xa5"]
    assert token_labels([50256], gpt2_encoder) == ["<|endoftext|>"]


def test_every_token_of_gpt2_has_a_label_that_prints(gpt2_encoder):
    labels = token_labels(range(50257), gpt2_encoder)
    assert all(label and label.isprintable() for label in labels)


def test_a_table_is_aligned_and_takes_any_text(capsys):
    print_table({"n": "right", "text": "left"}, [("1", "[red]a"), ("100", "")])
    assert capsys.readouterr().out == "  n  text\n  1  [red]a\n100\n"


@pytest.mark.parametrize(("n_maps", "n_seq"), [(1, 1), (1, 30), (3, 5), (12, 20), (4, 64), (1, 300), (25, 2)])
def test_an_attention_picture_has_a_map_a_head_and_labels_that_can_be_read(n_maps, n_seq):
    labels = [f"·t{i}" for i in range(n_seq)]
    figure = drawn(attention_figure(maps_of(n_maps, n_seq), labels, "model, layer 3", range(n_maps)))
    *maps, bar = (ax for ax in figure.axes if ax.axison)
    assert figure.get_suptitle() == "model, layer 3"
    assert bar.get_ylabel() == "attention weight"
    assert [ax.get_title() for ax in maps] == ([f"head {i}" for i in range(n_maps)] if n_maps > 1 else [""])
    assert (figure.get_supylabel()[:5], figure.get_supxlabel()[:3]) == ("query", "key")
    assert texts(maps[0])[-1] in labels
    assert_no_overlap(figure)
    n_columns = math.ceil(math.sqrt(n_maps))
    if n_seq <= 64:
        assert [texts(ax)[:n_seq] == labels for ax in maps[-n_columns:]] == [
            True
        ] * n_columns  # the lowest of each column
        assert all(texts(ax)[-n_seq:] == labels for ax in maps[::n_columns])


def test_what_a_position_cannot_see_is_not_drawn_as_a_weight(tiny_params):
    weights = trace([1, 2, 3], tiny_params, 4)["attention"][0]
    image = drawn(attention_figure(weights, list("abc"), "", range(4))).axes[0].images[0].get_array()
    np.testing.assert_array_equal(image.mask, ~np.tri(3, dtype=bool))
    np.testing.assert_array_equal(image.data, weights[0])


@pytest.mark.parametrize(("n_layer", "n_seq"), [(1, 1), (4, 12), (12, 40), (2, 200)])
def test_a_logit_lens_picture_shows_each_prediction_and_rank(n_layer, n_seq):
    lens = lens_of(n_layer, n_seq)
    predictions = np.array([[f"p{i},{j}" for j in range(n_seq)] for i in range(n_layer + 1)])
    figure = drawn(logit_lens_figure(lens, [f"·t{j}" for j in range(n_seq)], predictions, "model"))
    likeliest, ranks, *bars = figure.axes
    assert {bar.get_ylabel() for bar in bars} == {"its probability", "rank"}
    n_shown = min(n_seq, MOST_LENS)
    assert [text.get_text() for text in likeliest.texts] == [*predictions[:, -n_shown:].flat]
    numbers = [text.get_text() for text in ranks.texts]
    assert numbers == [str(n) if n < 10_000 else f"{n / 1000:.0f}k" for n in lens["ranks"][:, -n_shown:].flat]
    assert texts(likeliest)[-1] == f"after block {n_layer - 1}"
    assert ("last 64 of 200" in figure.get_suptitle()) == (n_seq == 200)
    assert_no_overlap(figure)


def test_a_logit_lens_of_a_model_can_be_drawn(tiny_params, tiny_encoder):
    ids = tiny_encoder.encode("def main")
    lens = logit_lens(trace(ids, tiny_params, 4), tiny_params)
    predictions = np.reshape(token_labels(lens["ids"].flat, tiny_encoder), lens["ids"].shape)
    drawn(logit_lens_figure(lens, token_labels(ids, tiny_encoder), predictions, "tiny"))


def test_any_text_can_be_a_label_or_a_title():
    labels = [*ODD, "<|endoftext|>", "x" * 50]
    n = len(labels)
    figure = drawn(attention_figure(maps_of(2, n), labels, "$a_model$", range(2)))
    shown = texts(figure.axes[0])
    assert {"$", "\\u65e5", "é", "{", "_"} <= set(shown)
    assert "x" * 50 not in shown
    drawn(logit_lens_figure(lens_of(1, n), labels, np.array([labels, labels]), "$a_model$ 日本" + 100 * "x"))


def test_wide_letters_do_not_reach_into_the_next_cell():
    labels = ["WWWWWWWWWW", "MANAGEMENT"] * 3
    figure = drawn(logit_lens_figure(lens_of(2, 6), labels, np.array([labels] * 3), "wide"))
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes[:2]:
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        assert all(one.x1 <= other.x0 or one.y0 > other.y1 for one, other in itertools.pairwise(boxes))
    assert_no_overlap(figure)


def test_the_ranks_are_darker_the_better_and_can_be_read_on_their_colour():
    lens = {"probabilities": np.array([[0.0, 1.0]]), "ranks": np.array([[1, 5000]])}
    for ax in drawn(logit_lens_figure(lens, list("ab"), np.array([["a", "b"]]), "")).axes[:2]:
        image = ax.images[0]
        light = [np.mean(image.cmap(image.norm(value))[:3]) for value in image.get_array()[0]]
        assert [text.get_color() for text in ax.texts] == ["white" if n < 0.5 else "black" for n in light]
        assert (light[0] < light[1]) == (image.get_array()[0, 0] == 1)


def test_a_probability_has_the_same_colour_in_every_picture():
    for probabilities in ([[0.1, 0.2]], [[0.5, 1]]):
        lens = {"probabilities": np.array(probabilities), "ranks": np.array([[1, 2]])}
        image = logit_lens_figure(lens, list("ab"), np.array([["a", "b"]]), "").axes[0].images[0]
        assert (image.norm.vmin, image.norm.vmax) == (0, 1)


def test_each_token_has_the_colour_of_its_own_bits():
    rich = pytest.importorskip("rich.console", reason="rich is not installed")
    out = io.StringIO()
    console = rich.Console(file=out, force_terminal=True, color_system="256", width=80)
    print_surprise(console, ["a", "b", "[c]\t", "", "é\n", "f", ""], [0.1, 2, 3, 7.5, 99])
    text, _, legend = out.getvalue().partition("\n\n")
    colours = dict(zip(HEAT, (f"\x1b[30;48;5;{colour}m" for colour in HEAT.values()), strict=True))
    assert text.replace("\x1b[0m", "") == f"ab{colours[2]}[c]⇥{colours[7]}é⏎\n{colours[14]}f"
    assert all(f"{colour} {least} and more " in legend for least, colour in colours.items())


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.PDF", "é a.png"])
def test_a_picture_has_the_format_that_its_name_says(tmp_path, name):
    save_figure(attention_figure(maps_of(1, 3), list("abc"), "", [0]), str(tmp_path / name))
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}
    assert (tmp_path / name).read_bytes().startswith(starts[name[-4:]])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_symbolic_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    save_figure(attention_figure(maps_of(1, 3), list("abc"), "", [0]), str(tmp_path / "link.png"))
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_or_a_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="out must be the name of a file"):
        check_picture(str(tmp_path / "pipe.png"))


@pytest.mark.parametrize("out", ["", ".", "a", "a.xyz", "a.pgf", ".png"])
def test_an_ending_of_no_picture_is_refused_with_those_that_are_known(out):
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
        check_picture(out)


def test_the_users_settings_of_matplotlib_do_not_matter(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        check_picture(str(tmp_path / "a.png"))
        save_figure(attention_figure(maps_of(1, 3), list("abc"), "", [0]), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()

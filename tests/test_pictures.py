"""Attention maps, logit lenses and losses, drawn: every label can be read, every number has its place and colour."""

import itertools
import math
import warnings

import numpy as np
import pytest

from lens import trace
from show.pictures import MOST_LENS, attention_figure, check_picture, logit_lens_figure, loss_figure, save_figure

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
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
    random, shape = np.random.default_rng(0), (n_layer + 1, n_seq)
    return {"probabilities": random.random(shape), "ranks": random.integers(1, 50_000, shape)}


def texts(ax):
    return [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels()) if label.get_text()]


def assert_no_overlap(figure):
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes:
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
            for one, other in itertools.pairwise(boxes):
                assert not one.shrunk(0.8, 0.8).overlaps(other.shrunk(0.8, 0.8))


@pytest.mark.parametrize(("n_maps", "n_seq"), [(1, 1), (1, 30), (3, 5), (12, 20), (4, 64), (1, 300), (25, 2)])
def test_an_attention_picture_has_one_map_per_head_and_readable_labels(n_maps, n_seq):
    labels = [f"·t{i}" for i in range(n_seq)]
    figure = drawn(attention_figure(maps_of(n_maps, n_seq), labels, "model, layer 3", range(n_maps)))
    *maps, bar = figure.axes
    assert (figure.get_suptitle(), bar.get_ylabel()) == ("model, layer 3", "attention weight")
    assert [ax.get_title() for ax in maps] == ([f"head {i}" for i in range(n_maps)] if n_maps > 1 else [""])
    assert (figure.get_supylabel()[:5], figure.get_supxlabel()[:3]) == ("query", "key")
    assert texts(maps[0])[-1] in labels
    assert_no_overlap(figure)
    n_columns = math.ceil(math.sqrt(n_maps))
    if n_seq <= 64:
        assert all(texts(ax)[:n_seq] == labels for ax in maps[-n_columns:])  # the lowest of each column
        assert all(texts(ax)[-n_seq:] == labels for ax in maps[::n_columns])


def test_an_attention_map_leaves_out_what_a_position_cannot_see(tiny_params):
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


def test_any_text_can_be_a_label_or_a_title():
    labels = [*ODD, "<|endoftext|>", "x" * 50, r"$\no$"]  # no formula
    n = len(labels)
    figure = drawn(attention_figure(maps_of(2, n), labels, r"$\no_formula$", range(2)))
    shown = set(texts(figure.axes[0]))
    assert {"$", "\\u65e5", "é", "{", "_"} <= shown and "x" * 50 not in shown
    drawn(logit_lens_figure(lens_of(1, n), labels, np.array([labels, labels]), r"$\no$ 日本" + 100 * "x"))


def test_wide_letters_stay_inside_their_cell():
    labels = ["WWWWWWWWWW", "MANAGEMENT"] * 3
    figure = drawn(logit_lens_figure(lens_of(2, 6), labels, np.array([labels] * 3), "wide"))
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes[:2]:
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        assert all(one.x1 <= other.x0 or one.y0 > other.y1 for one, other in itertools.pairwise(boxes))
    assert_no_overlap(figure)


def test_better_ranks_are_darker_and_text_is_readable_on_every_colour():
    lens = {"probabilities": np.array([[0.1, 0.9]]), "ranks": np.array([[1, 5000]])}
    panels = drawn(logit_lens_figure(lens, list("ab"), np.array([["a", "b"]]), "")).axes[:2]
    for ax in panels:
        image = ax.images[0]
        light = [np.mean(image.cmap(image.norm(value))[:3]) for value in image.get_array()[0]]
        assert [text.get_color() for text in ax.texts] == ["white" if n < 0.5 else "black" for n in light]
        assert (light[0] < light[1]) == (ax is panels[1])
    norm = panels[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (0, 1)


def test_a_loss_picture_has_each_loss_at_its_step():
    rows = [(0, "", 5.0, "more"), (10, 4.0, 4.5, "more"), (20, 3.0, 4.25, "more")]
    (axes,) = drawn(loss_figure(rows, 4.1, "")).axes
    trained, validated, bigram = ([*map(list, line.get_data())] for line in axes.lines)
    assert (trained, validated) == ([[10, 20], [4, 3]], [[0, 10, 20], [5, 4.5, 4.25]])
    assert bigram[1] == [4.1, 4.1]


@pytest.mark.parametrize("settings", [{}, {"text.usetex": True, "font.family": "no such font"}])
@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.PDF", "é a.png"])
def test_a_picture_has_the_format_of_its_name_with_any_user_settings(tmp_path, name, settings):
    with matplotlib.rc_context(settings):
        check_picture(str(tmp_path / name))
        save_figure(attention_figure(maps_of(1, 3), list("abc"), "", [0]), str(tmp_path / name))
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}
    assert (tmp_path / name).read_bytes().startswith(starts[name[-4:]])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("out", ["", ".", "a", "a.xyz", "a.pgf", ".png"])
def test_an_unknown_ending_is_refused_with_the_known_ones(out):
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg or \.pdf"):
        check_picture(out)

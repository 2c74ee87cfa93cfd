"""Pictures: attention maps, a logit lens, the losses of a training. They need matplotlib, which is optional."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from show.output import check_out, writing

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
LABEL_SIZE = 8  # points
LABEL_HEIGHT, LONGEST_LABEL = 0.125, 0.7  # inches
CELL, LARGE_CELL = 0.16, 0.3  # inches of a token in one of several attention maps, and in a single one
LEAST_MAP, MOST_MAP = 2.2, 8  # inches of an attention map
LENS_WIDTH, LENS_HEIGHT = 0.62, 0.26  # inches of a cell of a logit lens
MOST_LENS = 64  # positions in a logit lens


def stage_names(n_layer: int) -> list[str]:
    """What the rows of a logit lens are called: the residual stream before block 0, then after each block."""
    return ["embedding", *(f"after block {i}" for i in range(n_layer))]


def load_matplotlib() -> ModuleType:
    """matplotlib; ImportError, with what to install, if it cannot be used."""
    try:
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.font_manager
    except Exception as error:  # it may be installed and not fit this NumPy
        raise ImportError(f"pictures need matplotlib: pip install matplotlib ({error})") from error
    return matplotlib


def check_picture(out: str | None) -> None:
    """Raise, before the work begins, if a picture cannot be drawn, or not be written to `out`: see `check_out`."""
    if out is None:
        return
    if Path(out).suffix.lower() not in PICTURES:
        raise ValueError(f"the name of a picture must end in {', '.join(PICTURES)}, unlike {out!r}")
    check_out(out)
    load_matplotlib().rcdefaults()  # the user's settings may need what is not installed, such as LaTeX


def drawable(text: str, inches: float) -> str:
    """`text` for a picture: escapes for what matplotlib's font lacks, and cut to a width at the size of a label."""
    fonts = load_matplotlib().font_manager
    font = fonts.get_font(fonts.findfont(fonts.FontProperties()))
    font.set_size(LABEL_SIZE, 72)  # at 72 dots an inch a pixel is a point; widths are in 64ths of it

    def width(text: str) -> float:
        font.set_text(text, 0)
        return font.get_width_height()[0] / 64 / 72

    text = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)
    if width(text) <= inches:
        return text
    return next((cut for n in range(len(text), 0, -1) if width(cut := f"{text[:n]}…") <= inches), "…")


def set_title(figure: "Figure", title: str, scale: float = 1) -> None:
    size = 12 * scale
    figure.suptitle(drawable(title, 0.95 * figure.get_figwidth() * LABEL_SIZE / size), fontsize=size, parse_math=False)


def label_axis(axis: "Axis", labels: Sequence[str], inches: float, longest: float, **options) -> None:
    """Put tokens on an axis of a length in inches: all, or as many of them as there is room for."""
    places = range(0, len(labels), math.ceil(LABEL_HEIGHT * len(labels) / inches))
    texts = [drawable(labels[i], longest) for i in places]
    axis.set_ticks(places, texts, fontsize=LABEL_SIZE, parse_math=False, **options)


def attention_figure(weights: Array, labels: Sequence[str], title: str, heads: Sequence[int] | None = None) -> "Figure":
    """Attention maps as small multiples, or a single one large.

    `weights` [n_maps, n_seq, n_seq] are those of `heads`, by default of 0, 1 and so on; `labels` are the tokens. What a
    position must not see is grey. The colours follow the square root of the weights, or small ones would be invisible.
    """
    matplotlib = load_matplotlib()
    n_maps, n_seq = weights.shape[:2]
    heads = range(n_maps) if heads is None else heads
    inches = min(max((CELL if n_maps > 1 else LARGE_CELL) * n_seq, LEAST_MAP), MOST_MAP)
    n_columns = math.ceil(math.sqrt(n_maps))
    n_rows = math.ceil(n_maps / n_columns)
    size = (n_columns * inches + 2, n_rows * (inches + 0.3) + 1.2)
    figure = matplotlib.figure.Figure(size, layout="constrained")
    scale = max(1, size[0] / 14)  # a large picture is looked at from afar
    set_title(figure, title, scale)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for ax in axes[n_maps:]:
        ax.set_axis_off()
    for i, (ax, head) in enumerate(zip(axes, heads, strict=False)):
        seen = np.ma.array(weights[i], mask=~np.tri(n_seq, dtype=bool))
        image = ax.imshow(seen, cmap="viridis", norm=matplotlib.colors.PowerNorm(0.5, 0, 1))
        ax.set_facecolor("0.9")
        ax.set_title(f"head {head}" if n_maps > 1 else "", fontsize=9 * scale)
        is_lowest, is_leftmost = i + n_columns >= n_maps, i % n_columns == 0
        label_axis(ax.xaxis, labels if is_lowest else [""] * n_seq, inches, LONGEST_LABEL, rotation=90)
        label_axis(ax.yaxis, labels if is_leftmost else [""] * n_seq, inches, LONGEST_LABEL)
    figure.supylabel("query: the position that attends", fontsize=9 * scale)
    figure.supxlabel("key: the position attended to", fontsize=9 * scale)
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.6, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("attention weight", fontsize=9 * scale)
    bar.ax.tick_params(labelsize=8 * scale)
    return figure


def logit_lens_figure(lens: dict[str, Array], labels: Sequence[str], predictions: Array, title: str) -> "Figure":
    """What each layer would predict and how likely, and below it the rank of the last layer's prediction.

    `lens` is that of `lens.logit_lens` for one text, `labels` are its tokens, `predictions` the text of lens["ids"].
    """
    matplotlib = load_matplotlib()
    if len(labels) > MOST_LENS:
        title += f"; the last {MOST_LENS} of {len(labels)} positions"
    labels, predictions = labels[-MOST_LENS:], predictions[:, -MOST_LENS:]
    probabilities, ranks = lens["probabilities"][:, -MOST_LENS:], lens["ranks"][:, -MOST_LENS:]
    n_rows, n_seq = ranks.shape
    width, longest = LENS_WIDTH * n_seq, 0.9 * LENS_WIDTH
    figure = matplotlib.figure.Figure((max(width, 4) + 3, 2 * LENS_HEIGHT * n_rows + 3), layout="constrained")
    set_title(figure, title)
    numbers = [[str(n) if n < 10_000 else f"{n / 1000:.0f}k" for n in row] for row in ranks]
    panels = (
        ("the likeliest token if this were the last layer", predictions, probabilities, "its probability", "Blues"),
        ("the rank of what the last layer finds likeliest", numbers, ranks, "rank", "Oranges_r"),
    )
    norms = (matplotlib.colors.Normalize(0, 1), matplotlib.colors.LogNorm(1, max(ranks.max(), 10)))
    for ax, (name, texts, values, meaning, colours), norm in zip(figure.subplots(2, 1), panels, norms, strict=True):
        image = ax.imshow(values, norm=norm, cmap=colours, aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(n_rows), stage_names(n_rows - 1), fontsize=LABEL_SIZE)
        label_axis(ax.xaxis, labels, width, longest)
        figure.colorbar(image, ax=ax, label=meaning, pad=0.01, format="{x:g}").minorticks_off()
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            text = drawable(texts[row][column], longest)
            ax.text(column, row, text, ha="center", va="center", fontsize=LABEL_SIZE - 1, color=ink, parse_math=False)
    figure.supxlabel("the text, a token at each position; what is predicted is the token after it", fontsize=9)
    return figure


def loss_figure(rows: Sequence[Sequence], bigram_loss: float, title: str) -> "Figure":
    """The losses of a training: `rows` begin with a step, its training loss and its validation loss."""
    figure = load_matplotlib().figure.Figure((8, 5), dpi=120, layout="constrained")
    steps, train_losses, losses, *_ = zip(*rows, strict=True)
    axes = figure.subplots()
    axes.plot(steps[1:], train_losses[1:], label="GPT, training text (with dropout)")
    axes.plot(steps, losses, label="GPT, validation text")
    axes.axhline(bigram_loss, color="gray", linestyle="--", label="bigram, validation text")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(figure: "Figure", out: str) -> None:
    """Write a picture in the format that the ending of its name says."""
    with writing(out) as temporary:
        figure.savefig(temporary, format=Path(out).suffix[1:])

"""Pictures: attention maps, logit lenses, training losses. They need matplotlib, which is optional."""

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

FORMATS = (".png", ".svg", ".pdf")
LABEL_SIZE = 8  # points
LABEL_HEIGHT, LONGEST_LABEL = 0.125, 0.7  # inches
LENS_WIDTH, LENS_HEIGHT = 0.62, 0.26  # inches, of one cell of a logit lens
MOST_LENS = 64  # the most positions that a logit lens shows


def stage_names(n_layer: int) -> list[str]:
    """The names of a logit lens's rows: the residual stream before block 0, then after each block."""
    return ["embedding", *(f"after block {i}" for i in range(n_layer))]


def load_matplotlib() -> ModuleType:
    """matplotlib; if it cannot be used, an ImportError says what to install."""
    try:
        import matplotlib.figure  # and with it matplotlib.colors and matplotlib.font_manager
    except Exception as error:  # an installed matplotlib may not fit this NumPy
        raise ImportError(f"pictures need matplotlib: pip install matplotlib ({error})") from error
    return matplotlib


def check_picture(out: str | None) -> None:
    """Raise an error, before the work starts, if a picture cannot be drawn, or cannot be written to `out`."""
    if out is None:
        return
    if Path(out).suffix.lower() not in FORMATS:
        raise ValueError(f"the name of a picture must end in {' or '.join(FORMATS)}, not be {out!r}")
    check_out(out)
    load_matplotlib().rcdefaults()  # the user's settings may need something that is not installed, such as LaTeX


def drawable(text: str, inches: float) -> str:
    """`text`, cut so that a label of it fits the width, with escapes for characters that matplotlib's font lacks."""
    fonts = load_matplotlib().font_manager
    font = fonts.get_font(fonts.findfont(fonts.FontProperties()))
    font.set_size(LABEL_SIZE, 72)  # at 72 dots per inch a pixel is a point; widths are in 64ths of a point
    text = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)
    for candidate in (text, *(f"{text[:n]}…" for n in range(len(text), 0, -1))):
        font.set_text(candidate, 0)
        if font.get_width_height()[0] / 64 / 72 <= inches:
            return candidate
    return "…"


def new_figure(width: float, height: float, title: str, title_size: float = 12) -> "Figure":
    """An empty figure of a size in inches. Its title is cut to its width."""
    figure = load_matplotlib().figure.Figure((width, height), layout="constrained")
    figure.suptitle(drawable(title, 0.95 * width * LABEL_SIZE / title_size), fontsize=title_size, parse_math=False)
    return figure


def label_axis(axis: "Axis", labels: Sequence[str], inches: float, longest: float, **options) -> None:
    """Put tokens on an axis that is `inches` long: all of them, or every n-th if there is no room for all."""
    places = range(0, len(labels), math.ceil(LABEL_HEIGHT * len(labels) / inches))
    texts = [drawable(labels[i], longest) for i in places]
    axis.set_ticks(places, texts, fontsize=LABEL_SIZE, parse_math=False, **options)


def attention_figure(weights: Array, labels: Sequence[str], title: str, heads: Sequence[int] | None = None) -> "Figure":
    """Draw the weights [n_maps, n_seq, n_seq] of `heads`, by default 0, 1 and so on; `labels` are the tokens."""
    n_maps, n_seq = weights.shape[:2]
    inches = min(max((0.16 if n_maps > 1 else 0.3) * n_seq, 2.2), 8)  # the side of a map: 0.16 or 0.3 per token
    n_columns = math.ceil(math.sqrt(n_maps))
    n_rows = math.ceil(n_maps / n_columns)
    width = n_columns * inches + 2
    scale = max(1, width / 14)  # a large picture is seen from afar
    figure = new_figure(width, n_rows * (inches + 0.3) + 1.2, title, 12 * scale)
    norm = load_matplotlib().colors.PowerNorm(0.5, 0, 1)  # the square root; otherwise small weights are invisible
    for i, head in enumerate(heads or range(n_maps)):
        ax = figure.add_subplot(n_rows, n_columns, i + 1)
        seen = np.ma.array(weights[i], mask=~np.tri(n_seq, dtype=bool))
        image = ax.imshow(seen, cmap="viridis", norm=norm)
        ax.set_facecolor("0.9")  # grey, for what a position cannot see
        ax.set_title(f"head {head}" if n_maps > 1 else "", fontsize=9 * scale)
        is_lowest, is_leftmost = i + n_columns >= n_maps, i % n_columns == 0
        label_axis(ax.xaxis, labels if is_lowest else [""] * n_seq, inches, LONGEST_LABEL, rotation=90)
        label_axis(ax.yaxis, labels if is_leftmost else [""] * n_seq, inches, LONGEST_LABEL)
    figure.supylabel("query: the position that attends", fontsize=9 * scale)
    figure.supxlabel("key: the position attended to", fontsize=9 * scale)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.6, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("attention weight", fontsize=9 * scale)
    bar.ax.tick_params(labelsize=8 * scale)
    return figure


def logit_lens_figure(lens: dict[str, Array], labels: Sequence[str], predictions: Array, title: str) -> "Figure":
    """Draw what `lens.logit_lens` returns for one text. `labels` are its tokens, `predictions` those of lens["ids"]."""
    if len(labels) > MOST_LENS:
        title += f"; the last {MOST_LENS} of {len(labels)} positions"
    predictions, probabilities, ranks = (a[:, -MOST_LENS:] for a in (predictions, lens["probabilities"], lens["ranks"]))
    n_rows, n_seq = ranks.shape
    width, longest = LENS_WIDTH * n_seq, 0.9 * LENS_WIDTH
    figure = new_figure(max(width, 4) + 3, 2 * LENS_HEIGHT * n_rows + 3, title)
    numbers = np.array([[str(n) if n < 10_000 else f"{n / 1000:.0f}k" for n in row] for row in ranks])
    panels = (
        ("the most likely token if this were the last layer", predictions, probabilities, "its probability", "Blues"),
        ("the rank of the last layer's prediction", numbers, ranks, "rank", "Oranges_r"),
    )
    scales = ({"vmin": 0, "vmax": 1}, {"vmin": 1, "vmax": max(ranks.max(), 10), "norm": "log"})
    for ax, (name, texts, values, meaning, colours), scale in zip(figure.subplots(2, 1), panels, scales, strict=True):
        image = ax.imshow(values, **scale, cmap=colours, aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(n_rows), stage_names(n_rows - 1), fontsize=LABEL_SIZE)
        label_axis(ax.xaxis, labels[-MOST_LENS:], width, longest)
        figure.colorbar(image, ax=ax, label=meaning, pad=0.01, format="{x:g}").minorticks_off()
        for (row, column), value in np.ndenumerate(values):
            ink = "black" if np.dot(image.to_rgba(value), (0.3, 0.6, 0.1, 0)) > 0.5 else "white"  # by the brightness
            text = drawable(str(texts[row, column]), longest)
            ax.text(column, row, text, ha="center", va="center", fontsize=LABEL_SIZE - 1, color=ink, parse_math=False)
    figure.supxlabel("the text, one token per position; each column predicts the token after it", fontsize=9)
    return figure


def loss_figure(rows: Sequence[Sequence], bigram_loss: float, title: str) -> "Figure":
    """The losses of a training: `rows` start with a step, its training loss and its validation loss."""
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
    """Write a picture in the format that its name's ending stands for."""
    with writing(out) as temporary:
        figure.savefig(temporary, format=Path(out).suffix[1:])

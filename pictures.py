"""How the numbers of lens.py are shown: a table or coloured text in the terminal, a picture, a page for the browser.

rich, which colours the terminal, and matplotlib, which draws, are optional: without the first all is plain text,
without the second an error says what to install.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from encoder import Encoder
from files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

PAGE = Path(__file__).with_name("lens.html")
SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥"}
HEAT = {2: 194, 4: 229, 7: 222, 10: 215, 14: 209}  # bits of surprise from which on a token has this one of 256 colours
LONGEST_LABEL = 9  # characters in a picture
# Inches: of a token in an attention map, among others and alone; of the smallest map and the largest; of a logit lens's
# cell, the width and the height; of a tick's label.
CELL, LARGE_CELL, LEAST_MAP, MOST_MAP, LENS_CELL, LABEL = 0.16, 0.3, 2.2, 8, (0.62, 0.26), 0.125
MOST_LENS = 64  # positions in a logit lens


def token_labels(ids: Iterable[int], encoder: Encoder) -> list[str]:
    """Each token as visible text: a space is `·`, a newline `⏎`, and a byte that is no whole character `\\xe2`."""
    texts = (encoder.token_bytes(int(i)).decode("utf-8", "backslashreplace") for i in ids)
    return ["".join(SIGNS.get(c, visible(c)) for c in text) for text in texts]


def visible(character: str) -> str:
    """`character`, or its escape if it is a control character or such, which a terminal might obey."""
    return character if character.isprintable() else ascii(character)[1:-1]


def colour_console() -> "Console | None":
    """rich's console where it is installed, on a terminal that has colours, and without NO_COLOR; else None."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(highlight=False)
    return console if console.is_terminal and console.color_system and not console.no_color else None


def print_table(columns: dict[str, str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under the names of `columns`, each to be aligned "left" or "right"."""
    if console := colour_console():
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold")
        for name, side in columns.items():
            table.add_column(name, justify=side, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    lines = [list(columns), *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, columns.values(), strict=True)
        print("  ".join(f"{cell:{'<' if side == 'left' else '>'}{n}}" for cell, n, side in cells).rstrip())


def print_surprise(console: "Console", pieces: Iterable[str], bits: Sequence[float]) -> None:
    """Print the text, of which each token has a piece, on the colours of their bits, and what the colours mean."""
    from rich.text import Text

    def style(n_bits: float) -> str:
        colours = [colour for least, colour in HEAT.items() if n_bits >= least]
        return f"black on color({colours[-1]})" if colours else ""

    text = Text()
    for piece, n_bits in zip(pieces, [0, *bits, 0], strict=True):  # the first has no bits, the last may be cut off
        text.append("".join("⏎\n" if c == "\n" else visible(c) for c in piece), style(n_bits))
    console.print(text)
    legend = Text("\nbits: ")
    for least in HEAT:
        legend.append(f" {least} and more ", style(least)).append(" ")
    console.print(legend)


def need_matplotlib() -> None:
    """Raise ImportError, with what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib: pip install matplotlib ({error})") from error


def drawable(label: str) -> str:
    """`label` as a picture can have it: short, and what matplotlib's font lacks, as Chinese, in escapes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    text = "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in label)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def label_axis(ax: "Axes", axis: str, labels: Sequence[str], inches: float, **options) -> None:
    """Put tokens on the x or y axis, which is so many inches long: all, or as many of them as there is room for."""
    places = range(0, len(labels), math.ceil(LABEL * len(labels) / inches))
    set_ticks = ax.set_xticks if axis == "x" else ax.set_yticks
    set_ticks(places, [drawable(labels[i]) for i in places], fontsize=8, parse_math=False, **options)


def attention_figure(weights: Array, labels: Sequence[str], title: str, heads: Sequence[int]) -> "Figure":
    """Attention maps as small multiples, or a single one large: `weights` [n_maps, n_seq, n_seq] are those of `heads`.

    What a position must not see is grey. The colours follow the square root of the weights, or small ones would be
    invisible. Raises ImportError without matplotlib.
    """
    need_matplotlib()
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    n_maps, n_seq = weights.shape[:2]
    inches = min(max((CELL if n_maps > 1 else LARGE_CELL) * n_seq, LEAST_MAP), MOST_MAP)
    n_columns = math.ceil(math.sqrt(n_maps))
    n_rows = math.ceil(n_maps / n_columns)
    figure = Figure((n_columns * inches + 2, n_rows * (inches + 0.3) + 1.2), layout="constrained")
    scale = max(1, figure.get_figwidth() / 14)  # a large picture is looked at from afar
    figure.suptitle(title, parse_math=False, fontsize=12 * scale)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    unseen = np.triu(np.ones((n_seq, n_seq), bool), 1)
    for i, ax in enumerate(axes):
        if i >= n_maps:
            ax.set_axis_off()
            continue
        image = ax.imshow(np.ma.array(weights[i], mask=unseen), cmap="viridis", norm=PowerNorm(0.5, 0, 1))
        ax.set_facecolor("0.9")
        ax.set_title(f"head {heads[i]}" if n_maps > 1 else "", fontsize=9 * scale)
        label_axis(ax, "x", labels if i + n_columns >= n_maps else [""] * n_seq, inches, rotation=90)
        label_axis(ax, "y", labels if i % n_columns == 0 else [""] * n_seq, inches)
    figure.supylabel("the position that attends", fontsize=9 * scale)
    figure.supxlabel("the position that it attends to", fontsize=9 * scale)
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.6, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("attention weight", fontsize=9 * scale)
    bar.ax.tick_params(labelsize=8 * scale)
    return figure


def logit_lens_figure(lens: dict[str, Array], labels: Sequence[str], predictions: Array, title: str) -> "Figure":
    """What each layer would predict and how likely, and below it the rank of the last layer's prediction.

    `lens` is that of `lens.logit_lens` for one text, `labels` are its tokens, `predictions` the text of lens["ids"].
    """
    need_matplotlib()
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    start = max(len(labels) - MOST_LENS, 0)
    if start:
        title += f"; the last {MOST_LENS} of {len(labels)} positions"
    labels, predictions = labels[start:], predictions[:, start:]
    probabilities, ranks = lens["probabilities"][:, start:], lens["ranks"][:, start:]
    n_rows, n_seq = probabilities.shape
    width, height = LENS_CELL[0] * n_seq, LENS_CELL[1] * n_rows
    figure = Figure((max(width, 4) + 3, 2 * height + 3), layout="constrained")
    figure.suptitle(title, parse_math=False)
    rows = ["embedding", *(f"after block {i}" for i in range(n_rows - 1))]
    panels = (
        ("the likeliest token if this were the last layer", probabilities, Normalize(0, 1), "Blues", "its probability"),
        ("the rank of what the last layer finds likeliest", ranks, LogNorm(1, ranks.max() + 1), "Oranges_r", "rank"),
    )
    for ax, (name, values, norm, colours, meaning) in zip(figure.subplots(2, 1), panels, strict=True):
        image = ax.imshow(values, norm=norm, cmap=colours, aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(n_rows), rows, fontsize=7)
        label_axis(ax, "x", labels, width)
        figure.colorbar(image, ax=ax, label=meaning, pad=0.01, format="{x:g}")
        for (row, column), value in np.ndenumerate(values):
            text = shortened(value) if meaning == "rank" else drawable(predictions[row, column])
            red, green, blue, _ = image.cmap(norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color=ink, parse_math=False)
    figure.supxlabel("the text, a token at each position; what is predicted is the token after it", fontsize=9)
    return figure


def shortened(number: int) -> str:
    return str(number) if number < 10_000 else f"{number / 1000:.0f}k"


def save_figure(figure: "Figure", out: str) -> None:
    """Write a picture in the format that the ending of its name says, else as PNG; and say so."""
    with writing(out) as temporary:
        figure.savefig(temporary, format=Path(out).suffix[1:] or "png")


def save_page(data: dict, out: str) -> None:
    """Write the page of a report: its template with `data` in it, as JSON in which no text can end the script."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    with writing(out) as temporary:
        temporary.write_text(PAGE.read_text(encoding="utf-8").replace("{{data}}", text), encoding="utf-8")


@contextlib.contextmanager
def writing(out: str) -> Iterator[Path]:
    """`replacing`, for a file that the user has named: an OSError names it, and in the end a line says it is there."""
    try:
        with replacing(Path(out)) as temporary:
            yield temporary
    except OSError as error:
        raise OSError(f"{out} could not be written: {error.strerror or error}") from error
    print(f"wrote {out}")

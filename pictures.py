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

PAGE = Path(__file__).with_name("report.template.html")
PICTURES = (".png", ".svg", ".pdf")
SIGNS = {"\n": "⏎", "\t": "⇥"}
HEAT = {2: 194, 4: 229, 7: 222, 10: 215, 14: 209}  # bits of surprise from which on a token has this one of 256 colours
LABEL_SIZE = 8  # points
LABEL_HEIGHT, LONGEST_LABEL = 0.125, 0.7  # inches
CELL, LARGE_CELL = 0.16, 0.3  # inches of a token in one of several attention maps, and in a single one
LEAST_MAP, MOST_MAP = 2.2, 8  # inches of such a map
LENS_CELL = 0.62, 0.26  # inches: the width and height of a cell of a logit lens
MOST_LENS = 64  # its positions


def token_labels(ids: Iterable[int], encoder: Encoder) -> list[str]:
    """Each token as visible text: a space is `·`, a newline `⏎`, and a byte that is no whole character `\\xe2`."""
    texts = (encoder.token_bytes(int(i)).decode("utf-8", "backslashreplace") for i in ids)
    return ["".join(map(visible, text)).replace(" ", "·") for text in texts]


def visible(character: str) -> str:
    """`character`, or a sign for a newline and a tab, or the escape of others that do not print."""
    return character if character.isprintable() else SIGNS.get(character, ascii(character)[1:-1])


def stage_names(n_layer: int) -> list[str]:
    """What the rows of a logit lens are called: the residual stream before block 0, then after each block."""
    return ["embedding", *(f"after block {i}" for i in range(n_layer))]


def colour_console() -> "Console | None":
    """rich's console where it is installed, on a terminal that has colours, and without NO_COLOR; else None."""
    try:
        from rich.console import Console

        console = Console(highlight=False)
    except Exception:  # whatever is wrong with it, the text can be printed without
        return None
    return console if console.is_terminal and console.color_system and not console.no_color else None


def print_table(columns: dict[str, str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under the names of `columns`, each to be aligned "left" or "right"."""
    lines = [list(columns), *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    sides = ["<" if side == "left" else ">" for side in columns.values()]
    header, *texts = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )
    if console := colour_console():
        console.print(header, style="bold", markup=False, soft_wrap=True)
    else:
        print(header)
    print("\n".join(texts))


def print_surprise(console: "Console", pieces: Iterable[str], bits: Sequence[float]) -> None:
    """Print the text, of which each token has a piece, on the colours of their bits, and what the colours mean."""
    from rich.text import Text

    def style(n_bits: float) -> str:
        colours = [colour for least, colour in HEAT.items() if n_bits >= least]
        return f"black on color({colours[-1]})" if colours else ""

    text = Text()
    for piece, n_bits in zip(pieces, [0, *bits, 0], strict=True):  # the first has no bits, the last may be cut off
        text.append("".join(map(visible, piece)).replace("⏎", "⏎\n"), style(n_bits))
    console.print(text)
    legend = Text("\nbits: ")
    for least in HEAT:
        legend.append(f" {least} and more ", style(least)).append(" ")
    console.print(legend)


def need_matplotlib() -> None:
    """Raise ImportError, with what to install, if matplotlib cannot be used."""
    try:
        import matplotlib.figure
        import matplotlib.font_manager  # noqa: F401
    except Exception as error:  # it may also be there, but not fit the NumPy that is
        raise ImportError(f"pictures need matplotlib: pip install matplotlib ({error})") from error


def check_picture(out: str) -> None:
    """Raise, before the work begins, if a picture cannot be drawn, or not be written to `out`: see `check_out`."""
    if Path(out).suffix.lower() not in PICTURES:
        raise ValueError(f"the name of a picture must end in {', '.join(PICTURES)}, unlike {out!r}")
    check_out(out)
    need_matplotlib()
    import matplotlib

    matplotlib.rcdefaults()  # the user's own settings may need what is not there, such as LaTeX


def check_out(out: str) -> None:
    """Raise ValueError or OSError if `out` cannot be the name of a new file, or of a file to be replaced."""
    path = Path(out)
    if not path.name or (path.exists() and not path.is_file()):  # a device, say, must not be replaced
        raise ValueError(f"out must be the name of a file, not {out!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{out} could not be written: there is no directory {path.parent}")


def drawable(text: str, inches: float) -> str:
    """`text` for a picture: in escapes what matplotlib's font lacks, and cut to a width at the size of a label."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(LABEL_SIZE, 72)  # then a pixel, of which it counts 64ths, is a point

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


def label_axis(ax: "Axes", axis: str, labels: Sequence[str], inches: float, longest: float, **options) -> None:
    """Put tokens on the x or y axis, which is so many inches long: all, or as many of them as there is room for."""
    places = range(0, len(labels), math.ceil(LABEL_HEIGHT * len(labels) / inches))
    texts = [drawable(labels[i], longest) for i in places]
    (ax.set_xticks if axis == "x" else ax.set_yticks)(places, texts, fontsize=LABEL_SIZE, parse_math=False, **options)


def attention_figure(weights: Array, labels: Sequence[str], title: str, heads: Sequence[int] | None = None) -> "Figure":
    """Attention maps as small multiples, or a single one large.

    `weights` [n_maps, n_seq, n_seq] are those of `heads`, by default of 0, 1 and so on; `labels` are the tokens. What a
    position must not see is grey. The colours follow the square root of the weights, or small ones would be invisible.
    Raises ImportError without matplotlib.
    """
    need_matplotlib()
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    n_maps, n_seq = weights.shape[:2]
    heads = range(n_maps) if heads is None else heads
    inches = min(max((CELL if n_maps > 1 else LARGE_CELL) * n_seq, LEAST_MAP), MOST_MAP)
    n_columns = math.ceil(math.sqrt(n_maps))
    n_rows = math.ceil(n_maps / n_columns)
    figure = Figure((n_columns * inches + 2, n_rows * (inches + 0.3) + 1.2), layout="constrained")
    scale = max(1, figure.get_figwidth() / 14)  # a large picture is looked at from afar
    set_title(figure, title, scale)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    unseen = np.triu(np.ones((n_seq, n_seq), bool), 1)
    for i, ax in enumerate(axes):
        if i >= n_maps:
            ax.set_axis_off()
            continue
        image = ax.imshow(np.ma.array(weights[i], mask=unseen), cmap="viridis", norm=PowerNorm(0.5, 0, 1))
        ax.set_facecolor("0.9")
        ax.set_title(f"head {heads[i]}" if n_maps > 1 else "", fontsize=9 * scale)
        is_lowest, is_leftmost = i + n_columns >= n_maps, i % n_columns == 0
        label_axis(ax, "x", labels if is_lowest else [""] * n_seq, inches, LONGEST_LABEL, rotation=90)
        label_axis(ax, "y", labels if is_leftmost else [""] * n_seq, inches, LONGEST_LABEL)
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
    set_title(figure, title)
    longest = 0.9 * LENS_CELL[0]
    predictions = [[drawable(text, longest) for text in row] for row in predictions]
    numbers = [[str(n) if n < 10_000 else f"{n / 1000:.0f}k" for n in row] for row in ranks]
    panels = (
        ("the likeliest token if this were the last layer", predictions, probabilities, "its probability"),
        ("the rank of what the last layer finds likeliest", numbers, ranks, "rank"),
    )
    styles = (("Blues", Normalize(0, 1)), ("Oranges_r", LogNorm(1, max(ranks.max(), 10))))
    for ax, (name, texts, values, meaning), (colours, norm) in zip(figure.subplots(2, 1), panels, styles, strict=True):
        image = ax.imshow(values, norm=norm, cmap=colours, aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(n_rows), stage_names(n_rows - 1), fontsize=LABEL_SIZE)
        label_axis(ax, "x", labels, width, longest)
        figure.colorbar(image, ax=ax, label=meaning, pad=0.01, format="{x:g}").minorticks_off()
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(norm(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            options = {"ha": "center", "va": "center", "fontsize": LABEL_SIZE - 1, "color": ink, "parse_math": False}
            ax.text(column, row, texts[row][column], **options)
    figure.supxlabel("the text, a token at each position; what is predicted is the token after it", fontsize=9)
    return figure


def save_figure(figure: "Figure", out: str) -> None:
    """Write a picture in the format that the ending of its name says."""
    with writing(out) as temporary:
        figure.savefig(temporary, format=Path(out).suffix[1:])


def save_page(data: dict, out: str) -> None:
    """Write the page of a report: its template with `data` in it, as JSON in which no text can end the script."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    with writing(out) as temporary:
        temporary.write_text(PAGE.read_text(encoding="utf-8").replace("{{data}}", text), encoding="utf-8")


@contextlib.contextmanager
def writing(out: str) -> Iterator[Path]:
    """`replacing`, for a file that the user has named: an OSError names it, and in the end a line says it is there."""
    try:
        with replacing(Path(out).resolve()) as temporary:  # of a symbolic link, what it leads to
            yield temporary
    except OSError as error:
        raise OSError(f"{out} could not be written: {error.strerror or error}") from error
    print(f"wrote {out}")

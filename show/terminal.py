"""Text in a terminal: prompts and documents that are read, samples, tables, and colours if rich is installed."""

import codecs
import contextlib
import io
import itertools
import sys
import time
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from rich.console import Console

    from encoder import Encoder

PIECE = 1 << 20  # bytes of a text that are read at a time
FIRST_WORDS = 1 << 16  # characters; a word that is longer may be cut
SIGNS = {"\n": "⏎", "\t": "⇥"}
HEAT = {2: 194, 4: 229, 7: 222, 10: 215, 14: 209}  # least bits of surprise -> one of 256 colours


def standard_input(what: str) -> BinaryIO:
    """Standard input; an error calls what it should bring `what`."""
    if sys.stdin is None:
        raise ValueError(f"there is no {what} to read: standard input is closed")
    return sys.stdin.buffer


def is_stream(path: str) -> bool:
    """Whether a document can be read only once, as from standard input or a pipe."""
    return path == "-" or Path(path).is_fifo() or Path(path).is_char_device()


def document_pieces(path: str, errors: str = "strict") -> Iterator[str]:
    """Yield the text in a file, or in standard input for `-`, in pieces, with "\n" at the end of each line.

    Raises ValueError if it is empty, and UnicodeError, with the place, if it is not UTF-8 and `errors` is "strict".
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors), translate=True)
    n_bytes, line, is_empty, data = 0, 1, True, None
    try:
        with contextlib.nullcontext(standard_input("text")) if path == "-" else open(path, "rb") as file:
            if path != "-" and Path(path).is_char_device() and not file.isatty():
                raise OSError(0, "it is a device, and has no end")
            while data != b"":
                data = file.read(PIECE)
                piece = decoder.decode(data, final=not data)
                piece = piece.removeprefix("\ufeff") if is_empty else piece
                n_bytes, line, is_empty = n_bytes + len(data), line + data.count(b"\n"), is_empty and not piece
                yield piece
    except OSError as error:
        raise OSError(f"{path or 'a file without a name'} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        held, start = error.object, error.start  # held: the beginning of a character, if any, and `data`
        place = f"offset {n_bytes + len(data) - len(held) + start:,}, in line {line + held.count(10, 0, start):,}"
        wrong = f"byte {held[start]:#x} at {place}"
        raise UnicodeError(f"{path} is not a text in UTF-8 ({wrong}): convert it") from error
    if is_empty:
        raise ValueError(f"{path} is empty")


def read_document(path: str, errors: str = "strict") -> str:
    """The text of `document_pieces` as one."""
    try:
        return "".join(document_pieces(path, errors))
    except MemoryError as error:
        raise OSError(f"{path} does not fit into memory") from error


def prompt_ids(prompt: str, encoder: "Encoder", n_ctx: int = sys.maxsize) -> list[int]:
    """The token ids of a prompt; `-` reads it from standard input, and an empty one becomes <|endoftext|>.

    Of more than n_ctx only the last n_ctx are given, and a line says so: no more of the text is held than they need.
    """
    data = iter(lambda: standard_input("prompt").read(PIECE), b"")
    pieces = codecs.iterdecode(data, "utf-8", "replace") if prompt == "-" else [prompt]
    # The first words may be cut wrongly, the others are those of the whole text.
    most = n_ctx * max(map(len, encoder.encoder)) + FIRST_WORDS
    text, n_characters = "", 0
    for piece in pieces:
        text, n_characters = (text + piece)[-most:], n_characters + len(piece)
    if not text and encoder.bos_id is None:
        raise ValueError("the prompt is empty, and this model has no <|endoftext|> to start from")
    ids = encoder.encode(text) or [encoder.bos_id]
    if len(ids) > n_ctx or len(text) < n_characters:
        used = f"only its last {min(len(ids), n_ctx):,} tokens are used"
        print(f"the prompt is longer than the model's context: {used}", file=sys.stderr)
    return ids[-n_ctx:]


def progress(items: Iterable[Sequence], unit: str, total: Callable[[], int | None]) -> Iterator[Sequence]:
    """Yield `items`, and show their lengths, added up, of the total: a bar on a terminal, elsewhere a line a minute."""
    from tqdm import tqdm  # late: most runs show none

    is_terminal, last = bool(sys.stderr and sys.stderr.isatty()), time.monotonic()
    unseen = {} if is_terminal else {"file": io.StringIO(), "mininterval": 60, "maxinterval": 60, "ncols": 0}
    with tqdm(unit=unit, unit_scale=True, leave=False, **unseen) as bar:
        for item in items:
            yield item
            bar.total = total()
            bar.update(len(item))
            if not is_terminal and (now := time.monotonic()) - last >= 60:
                last = now
                print(bar, file=sys.stderr, flush=True)


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Yield `pieces` of text up to `stop`, which may span several: what could be its beginning is held back.

    Of "to be o" before the stop text "or not", "o" waits until the next piece decides.
    """
    held = ""
    for piece in pieces:
        text, found, _ = (held + piece).partition(stop)
        if found:
            yield text
            return
        n_sure = len(text) - next(n for n in range(len(stop) - 1, -1, -1) if text.endswith(stop[:n]))
        yield text[:n_sure]
        held = text[n_sure:]
    yield held


def print_samples(
    steps: Generator, encoder: "Encoder", n_steps: int, n_samples: int, stop: str | None, eot_id: int | None
) -> None:
    """Print the text of each sample, the first as it is made, up to `stop` or `eot_id`.

    `steps` yields one id a sample, as `gpt2.stream` does, n_steps times at most. If standard error is a terminal, it
    shows the speed, and a bar if the text goes elsewhere.
    """
    if sys.stderr.isatty() and not sys.stdout.isatty():
        from tqdm import tqdm  # late: most runs show the text itself

        steps = iter(tqdm(steps, total=n_steps, unit="token", leave=False))
    start, made = time.perf_counter(), []
    more = (made.append(step) or step for step in steps)
    for sample in range(n_samples):
        if sample > 0:
            print("-" * 40)
        ids = itertools.takewhile(lambda i: i != eot_id, map(itemgetter(sample), itertools.chain(made, more)))
        pieces = encoder.decode_stream(ids)
        for piece in until(pieces, stop) if stop else pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    steps.close()  # and with it the bar
    if sys.stderr.isatty():
        n_tokens, seconds = n_samples * len(made), time.perf_counter() - start
        print(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def token_labels(ids: Iterable[int], encoder: "Encoder") -> list[str]:
    """Each token as visible text: a space is `·`, a newline `⏎`, and a byte that is no whole character `\\xe2`."""
    texts = (encoder.token_bytes(int(i)).decode("utf-8", "backslashreplace") for i in ids)
    return [visible(text).replace(" ", "·") for text in texts]


def visible(text: str) -> str:
    """`text` with signs for newlines and tabs, and with escapes for other characters that do not print."""
    return "".join(c if c.isprintable() else SIGNS.get(c, ascii(c)[1:-1]) for c in text)


def colour_console() -> "Console | None":
    """rich's console, or None where rich is not installed, the terminal has no colours, or NO_COLOR is set."""
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
    signs = {"left": "<", "right": ">"}
    form = "  ".join(f"{{:{signs[side]}{width}}}" for side, width in zip(columns.values(), widths, strict=True))
    header, *texts = (form.format(*line).rstrip() for line in lines)
    if console := colour_console():
        console.print(header, style="bold", markup=False, soft_wrap=True)
    else:
        print(header)
    print("\n".join(texts))


def print_surprise(console: "Console", pieces: Iterable[str], bits: Sequence[float]) -> None:
    """Print the text, a piece for each token, on the colours of their bits, and what the colours mean."""
    from rich.text import Text

    text, legend = Text(), Text("\nbits: ")
    styles = ["", *(f"black on color({colour})" for colour in HEAT.values())]
    for piece, n_bits in zip(pieces, [0, *bits, 0], strict=True):  # the first has no bits, the last may be cut off
        text.append(visible(piece).replace("⏎", "⏎\n"), styles[bisect(list(HEAT), n_bits)])
    for least, style in zip(HEAT, styles[1:], strict=True):
        legend.append(f" {least} and more ", style).append(" ")
    console.print(text)
    console.print(legend)

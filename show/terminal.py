"""Text in a terminal: reading prompts and documents, printing samples, tables and colours."""

import codecs
import contextlib
import io
import itertools
import os
import sys
import time
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from encoder import Encoder

PIECE = 1 << 20  # bytes of a text that are read at a time
LONGEST_WORD = 1 << 16  # characters; a longer word may be cut in two where the start of a long prompt is dropped
SIGNS = {"\n": "⏎", "\t": "⇥"}
HEAT = {2: 194, 4: 229, 7: 222, 10: 215, 14: 209}  # from this many bits of surprise -> a terminal's colour, of 256


def standard_input(content: str) -> BinaryIO:
    """Standard input as bytes; if it is closed, a ValueError says that `content` is missing."""
    if sys.stdin is None:
        raise ValueError(f"there is no {content} to read: standard input is closed")
    return sys.stdin.buffer


def is_stream(path: str) -> bool:
    """Whether a document can be read only once, such as standard input or a pipe."""
    return path == "-" or Path(path).is_fifo() or Path(path).is_char_device()


def document_pieces(path: str, errors: str = "strict") -> Iterator[str]:
    """Yield the text in a file, or in standard input for `-`, in pieces. All line ends become newline characters.

    Raises ValueError if it is empty, OSError if it cannot be read, and by default UnicodeError where it is not UTF-8.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors), translate=True)
    n_bytes, n_lines, is_empty, data = 0, 1, True, None
    try:
        with contextlib.nullcontext(standard_input("text")) if path == "-" else open(path, "rb") as file:
            if path != "-" and Path(path).is_char_device() and not file.isatty():
                raise OSError(0, "it is a device without an end")
            while data != b"":
                data = file.read(PIECE)
                n_bytes, n_lines = n_bytes + len(data), n_lines + data.count(b"\n")
                piece = decoder.decode(data, final=not data)
                piece = piece.removeprefix("\ufeff") if is_empty else piece
                is_empty = is_empty and not piece
                yield piece
    except OSError as error:
        raise OSError(f"{path or 'a file without a name'} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        wrong = error.object[error.start :]
        place = f"offset {n_bytes - len(wrong):,}, in line {n_lines - wrong.count(10):,}"
        raise UnicodeError(f"{path} is not UTF-8 text (byte {wrong[0]:#x} at {place}): convert it") from error
    if is_empty:
        raise ValueError(f"{path} is empty")


def prompt_ids(prompt: str, encoder: "Encoder", n_ctx: int = sys.maxsize) -> list[int]:
    """The last n_ctx token ids of a prompt; a line on standard error says if there are more.

    `-` reads standard input, and keeps no more of it than those tokens need. An empty prompt becomes <|endoftext|>.
    """
    text, is_cut = prompt, False
    if prompt == "-":
        text, most = "", n_ctx * max(map(len, encoder.encoder)) + LONGEST_WORD
        data = iter(lambda: standard_input("prompt").read(PIECE), b"")
        for piece in codecs.iterdecode(data, "utf-8", "replace"):
            is_cut = is_cut or len(text) + len(piece) > most
            text = (text + piece)[-most:]
    ids = encoder.encode(text) or ([] if encoder.bos_id is None else [encoder.bos_id])
    if not ids:
        raise ValueError("the prompt is empty, and this model has no <|endoftext|> to start from: type a prompt")
    if is_cut or len(ids) > n_ctx:
        used = f"only its last {min(len(ids), n_ctx):,} tokens are used"
        print(f"the prompt is longer than the model's context: {used}", file=sys.stderr)
    return ids[-n_ctx:]


def progress(items: Iterable[Sized], unit: str, total: Callable[[], int | None]) -> Generator:
    """Yield `items` and show the sum of their lengths out of `total`: on a terminal as a bar, else a line a minute."""
    from tqdm import tqdm  # imported late: most runs show no progress

    is_terminal = bool(sys.stderr and sys.stderr.isatty())
    lines = {} if is_terminal else {"file": io.StringIO(), "mininterval": 60, "ncols": 0}
    with tqdm(unit=unit, unit_scale=True, leave=False, miniters=1, **lines) as bar:
        for item in items:
            yield item
            bar.total = total()
            if bar.update(len(item)) and not is_terminal:
                print(bar, file=sys.stderr, flush=True)


def text_before(stop: str, pieces: Iterable[str]) -> Iterator[str]:
    """Yield `pieces` of text up to the stop text, which may span several pieces."""
    held = ""
    for piece in pieces:
        text, found, _ = (held + piece).partition(stop)
        if found:
            yield text
            return
        # Hold back an end that could be the start of `stop`, such as the "o" of "to be o" if `stop` is "or not".
        held = next(stop[:n] for n in range(len(stop) - 1, -1, -1) if text.endswith(stop[:n]))
        yield text.removesuffix(held)
    yield held


def print_samples(
    steps: Generator, encoder: "Encoder", n_steps: int, n_samples: int, stop: str | None, eot_id: int | None
) -> None:
    """Print the text of each sample up to `stop` or `eot_id`, the first one while it is generated.

    `steps` yields a list with one id per sample, as `gpt2.stream` does, at most n_steps times.
    """
    is_terminal, start = sys.stderr.isatty(), time.perf_counter()
    if is_terminal and not sys.stdout.isatty():  # the text goes elsewhere, so the terminal shows a bar
        steps = progress(steps, "token", lambda: n_steps * n_samples)
    kept: list[list[int]] = []  # the steps that were made for an earlier sample
    new = (kept.append(step) or step for step in steps)  # type: ignore[func-returns-value]
    for sample in range(n_samples):
        if sample > 0:
            print("-" * 40)
        ids = map(itemgetter(sample), itertools.chain(kept, new))
        pieces = encoder.decode_stream(itertools.takewhile(lambda i: i != eot_id, ids))
        for piece in text_before(stop, pieces) if stop else pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    steps.close()  # this also removes the bar
    if is_terminal:
        n_tokens, seconds = n_samples * len(kept), time.perf_counter() - start
        print(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def token_labels(ids: Iterable[int], encoder: "Encoder") -> list[str]:
    """Each token as visible text: a space is `·`, a newline `⏎`, and a byte that is not a whole character `\\xe2`."""
    texts = (encoder.token_bytes(int(i)).decode("utf-8", "backslashreplace") for i in ids)
    return [visible(text).replace(" ", "·") for text in texts]


def visible(text: str) -> str:
    """`text` with signs for newlines and tabs, and with escapes for other characters that do not print."""
    return "".join(c if c.isprintable() else SIGNS.get(c, ascii(c)[1:-1]) for c in text)


def has_colours() -> bool:
    """Whether standard output is a terminal with colours; NO_COLOR turns them off, and FORCE_COLOR is for a pager."""
    is_terminal = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    return bool(is_terminal and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR"))


def print_table(columns: dict[str, str], rows: Iterable[Sequence]) -> None:
    """Print rows under the names of `columns`, in the format of each: "s" is text on the left, others numbers."""
    lines = [[*columns], *([format(*cell) for cell in zip(row, columns.values(), strict=True)] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    cells = [f"{{:{'<' if form == 's' else '>'}{n}}}" for form, n in zip(columns.values(), widths, strict=True)]
    header, *texts = ("  ".join(cells).format(*line).rstrip() for line in lines)
    print(f"\x1b[1m{header}\x1b[0m" if has_colours() else header, *texts, sep="\n")


def print_surprise(pieces: Iterable[str], bits: Iterable[float]) -> None:
    """Print the text, one piece per token, each in the colour of its bits, and below it what the colours mean."""
    styles = ["", *(f"\x1b[30;48;5;{colour}m" for colour in HEAT.values())]
    for piece, n_bits in zip(pieces, [0, *bits, 0], strict=True):  # the last piece is what decode_stream held back
        style, text = styles[bisect(list(HEAT), n_bits)], visible(piece)
        print(f"{style}{text}\x1b[0m" if style and text else text, end="\n" if "⏎" in text else "")
    legend = (f"{style} {least} and more \x1b[0m" for least, style in zip(HEAT, styles[1:], strict=True))
    print("\n\nbits:", *legend)

"""Text in a terminal: prompts and documents that are read, samples, tables, and colours if rich is installed."""

import itertools
import sys
import time
from bisect import bisect
from collections.abc import Generator, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from encoder import Encoder

SIGNS = {"\n": "⏎", "\t": "⇥"}
HEAT = {2: 194, 4: 229, 7: 222, 10: 215, 14: 209}  # least bits of surprise -> one of 256 colours


def read_standard_input(what: str) -> bytes:
    """All of standard input; an error calls it `what`."""
    if sys.stdin is None:
        raise ValueError(f"there is no {what} to read: standard input is closed")
    return sys.stdin.buffer.read()


def read_document(path: str, errors: str = "strict") -> str:
    """The text in a file, or in standard input for `-`, with "\\n" at the end of each line.

    Raises ValueError if it is empty, and UnicodeError, with the place, if it is not UTF-8 and `errors` is "strict".
    """
    try:
        data = read_standard_input("text") if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8", errors).removeprefix("\ufeff")
    except OSError as error:
        raise OSError(f"{path or 'a file without a name'} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte {data[error.start]:#x} at offset {error.start:,}, in line {line:,}"
        raise UnicodeError(f"{path} is not a text in UTF-8 ({place}): convert it") from error
    if not text:
        raise ValueError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prompt_ids(prompt: str, encoder: "Encoder") -> list[int]:
    """The token ids of a prompt; `-` reads it from standard input, and an empty one becomes <|endoftext|>."""
    if prompt == "-":
        prompt = read_standard_input("prompt").decode("utf-8", "replace")
    if not prompt and encoder.bos_id is None:
        raise ValueError("the prompt is empty, and this model has no <|endoftext|> to start from")
    return encoder.encode(prompt) or [encoder.bos_id]


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
    start = time.perf_counter()
    *copies, made = itertools.tee(steps, n_samples + 1)  # each sample reads all steps; `made` counts them
    for sample, copy in enumerate(copies):
        if sample > 0:
            print("-" * 40)
        ids = itertools.takewhile(lambda i: i != eot_id, map(itemgetter(sample), copy))
        pieces = encoder.decode_stream(ids)
        for piece in until(pieces, stop) if stop else pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    steps.close()  # and with it the bar
    if sys.stderr.isatty():
        n_tokens, seconds = n_samples * len(list(made)), time.perf_counter() - start
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

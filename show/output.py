"""Files that the user names: checked before the work starts, and never half-written; and the page of a report."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from store.files import replacing


def check_out(out: str) -> None:
    """Raise ValueError or OSError unless `out` can be the name of a new file, or of a file to replace."""
    path = Path(os.path.realpath(out))
    with contextlib.suppress(FileNotFoundError):  # other errors say what is wrong with the name
        if not os.path.basename(out) or not stat.S_ISREG(os.stat(path).st_mode):  # never replace a device or a pipe
            raise ValueError(f"out must be the name of a file, not {out!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{out} could not be written: there is no directory {path.parent}")


@contextlib.contextmanager
def writing(out: str) -> Iterator[Path]:
    """`store.files.replacing` for a file that the user names: an OSError names it, and success prints a line."""
    try:
        with replacing(Path(os.path.realpath(out))) as temporary:  # a symbolic link stays; its target is replaced
            yield temporary
    except OSError as error:
        raise OSError(f"{out} could not be written: {error.strerror or error}") from error
    print(f"wrote {out}")


def save_page(data: dict, out: str) -> None:
    """Write the template with `data`, which may hold arrays, as JSON in which no text can end the script."""
    text = json.dumps(data, separators=(",", ":"), default=lambda array: array.tolist()).replace("<", "\\u003c")
    page = Path(__file__).with_name("page.template.html").read_text(encoding="utf-8")
    with writing(out) as temporary:
        temporary.write_text(page.replace("{{data}}", text), encoding="utf-8")

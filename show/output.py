"""Files that the user names: checked before the work begins, never half-written; and the page of a report."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from store.files import replacing

PAGE = Path(__file__).with_name("page.template.html")


def check_out(out: str) -> None:
    """Raise ValueError or OSError unless `out` can be the name of a new file, or of a file to replace."""
    path = Path(os.path.realpath(out))
    with contextlib.suppress(FileNotFoundError):  # other errors say what is wrong with the name
        if not os.path.basename(out) or not stat.S_ISREG(os.stat(path).st_mode):  # never replace a device or a pipe
            raise ValueError(f"out must be the name of a file, not {out!r}")
    for parent in (Path(out).parent, path.parent):  # a symbolic link may lead elsewhere
        if not parent.is_dir():
            raise FileNotFoundError(f"{out} could not be written: there is no directory {parent}")


@contextlib.contextmanager
def writing(out: str) -> Iterator[Path]:
    """`replacing`, with an OSError that names `out`, and a line on standard output when it is written."""
    try:
        with replacing(Path(os.path.realpath(out))) as temporary:  # a symbolic link stays, and its target is replaced
            yield temporary
    except OSError as error:
        raise OSError(f"{out} could not be written: {error.strerror or error}") from error
    print(f"wrote {out}")


def save_page(data: dict, out: str) -> None:
    """Write the template with `data` in it, as JSON in which no text can end the script."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    with writing(out) as temporary:
        temporary.write_text(PAGE.read_text(encoding="utf-8").replace("{{data}}", text), encoding="utf-8")

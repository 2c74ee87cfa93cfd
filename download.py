"""Fetch files so that they are there whole, or not at all."""

from pathlib import Path

import requests
from tqdm import tqdm

from utils import replacing

TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 20


def download(url: str, path: Path, n_bytes: int | None = None) -> None:
    """Fetch `url` to `path`, with a bar on standard error if that is a terminal.

    The file appears under its name when it has its whole length: what the server announced and, if given, `n_bytes`.
    Raises OSError, with the URL, for whatever goes wrong; an older file at `path` then stays as it was.
    """
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}) as response:
            response.raise_for_status()
            length = response.headers.get("Content-Length", "")
            announced = int(length) if length.isdecimal() else None
            if None not in (announced, n_bytes) and announced != n_bytes:
                raise OSError(f"{url} has {announced:,} bytes, but hparams.json implies {n_bytes:,}")
            with replacing(path) as temporary:
                write(response, temporary, path.name, announced or n_bytes)
    except requests.RequestException as error:
        reason = getattr(error.args[0], "reason", error) if error.args else error  # what is below layers of the same
        reason = str(reason).partition(" for url")[0]
        raise OSError(f"could not download {url}: {reason}; the same command tries again") from error


def write(response: requests.Response, path: Path, name: str, n_bytes: int | None) -> None:
    """Write the body of `response` to `path`; OSError if that ends before, or goes on after, n_bytes."""
    bar = tqdm(total=n_bytes, desc=name, unit="B", unit_scale=True, disable=None)
    with bar, open(path, "wb") as file:
        for chunk in response.iter_content(CHUNK):
            bar.update(file.write(chunk))
    if n_bytes is not None and path.stat().st_size != n_bytes:
        raise OSError(f"{response.url} ended after {path.stat().st_size:,} of {n_bytes:,} bytes")

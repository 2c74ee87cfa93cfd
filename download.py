"""Fetch files that can be trusted: resumed where they broke off, verified, and there whole or not at all.

Until a file is complete it is `name.part`, and `name.part.json` beside it remembers what the server said of it: its
length, its MD5, and the ETag or date that tell whether it is still the same file when the download goes on.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import requests
from requests.exceptions import ChunkedEncodingError, ConnectionError, Timeout
from tqdm import tqdm
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ProtocolError
from urllib3.util import Retry

from utils import publish

TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 16
# At once, then after 1, 2, 4 and 8 seconds, and up to one more so that a class does not come back at the same moment.
RETRY = Retry(5, backoff_factor=0.5, backoff_jitter=1, status_forcelist=range(500, 600))
LONGEST_WAIT = 120  # seconds
VALIDATORS = ("ETag", "Last-Modified")


def download(
    url: str, path: Path, n_bytes: int | None = None, check: Callable[[Path], object] = lambda _: None
) -> None:
    """Fetch `url` to `path`, with a bar on standard error if that is a terminal.

    It takes its name when it has the length and MD5 that the server announced, `n_bytes` if given, and `check`, called
    with the path of the complete file, has not raised ValueError; else it is removed and fetched once more. Raises
    OSError, with the URL and what is kept, for whatever goes wrong; an older file at `path` then stays as it was.
    """
    part = part_of(path)
    try:
        try:
            fetch_checked(url, part, n_bytes, check)
        except ValueError as error:
            print(f"{url}: {error}; it is removed, and downloaded once more", file=sys.stderr)
            try:
                fetch_checked(url, part, n_bytes, check)
            except ValueError as error:
                raise OSError(f"{error}, twice") from error
        publish(part, path)
        record_of(part).unlink(missing_ok=True)
    except OSError as error:  # those of requests are of this kind too
        kept = f"{size(part):,} bytes are kept, and the same command goes on from there"
        if not size(part) or not validator(part):
            drop(part)
            kept = "nothing is kept, and the same command tries again"
        raise OSError(f"could not download {url}: {reason(error)}; {kept}") from error


def fetch_checked(url: str, part: Path, n_bytes: int | None, check: Callable[[Path], object]) -> None:
    """`fetch`; ValueError, and nothing left, if what came is not the file that was asked for."""
    try:
        fetch(url, part, n_bytes)
        for length in (length_of(part), n_bytes):
            compare_lengths(size(part), length)
        md5 = read_record(part).get("Content-MD5", "")
        if len(md5) == 24 and md5 != base64.b64encode(digest(part, "md5")).decode():
            raise ValueError("it does not have the MD5 that the server announced")
        check(part)
    except requests.RequestException as error:  # of which some are ValueErrors
        raise OSError(reason(error)) from error
    except ValueError:
        drop(part)
        raise


def compare_lengths(found: int | None, expected: int | None) -> None:
    if None not in (found, expected) and found != expected:
        raise ValueError(f"it has {found:,} bytes, where {expected:,} are expected")


def fetch(url: str, part: Path, n_bytes: int | None) -> None:
    """Complete `part`, however often the connection breaks; as long as bytes arrive, the tries are not counted."""
    retry, most = RETRY, size(part)
    while not part.is_file() or n_missing(part, None) != 0:
        response = None
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT, headers=ask(part)) as response:
                # urllib3's Retry as the rule, but not within its own adapter: there it ends where the body begins.
                if retry.is_retry("GET", response.status_code, "Retry-After" in response.headers):
                    problem = f"{response.status_code} {response.reason}"
                else:
                    problem = receive(response, part, n_bytes)
                    if not problem:
                        return
        except (ConnectionError, Timeout, ChunkedEncodingError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):  # it does not get better
                raise
            problem = reason(error)
        if size(part) > most:
            retry, most = RETRY, size(part)
        retry = wait(retry, response, problem)


def wait(retry: Retry, response: requests.Response | None, problem: str) -> Retry:
    """Wait as long as the server asks, else longer each time; what is left of `retry`, or OSError if nothing is."""
    try:
        retry = retry.increment(error=HTTPError(problem))
    except MaxRetryError:
        raise OSError(problem) from None
    seconds = retry.get_backoff_time()
    if response is not None:
        with contextlib.suppress(InvalidHeader):
            seconds = retry.get_retry_after(response) or seconds
    if seconds > LONGEST_WAIT:
        raise OSError(f"{problem}; the server asks to wait {seconds:,.0f} seconds")
    if seconds and sys.stderr.isatty():
        print(f"{problem}; trying again in {seconds:.0f} s", file=sys.stderr)
    time.sleep(seconds)
    return retry


def ask(part: Path) -> dict[str, str]:
    """The headers that ask for what `part` lacks, if the server's file is still the same; else for all of it."""
    headers = {"Accept-Encoding": "identity"}
    if size(part) and validator(part):
        headers |= {"Range": f"bytes={size(part)}-", "If-Range": validator(part)}  # RFC 9110, section 13.1.5
    return headers


def receive(response: requests.Response, part: Path, n_bytes: int | None) -> str:
    """Append the body of `response` to `part`; what went wrong, if another try may mend it, else ""."""
    headers, status = response.headers, response.status_code
    if (status == 206 and not continues(headers, part)) or (status == 416 and size(part)):
        drop(part)
        return "the file has changed since its download began"
    response.raise_for_status()
    if status not in (200, 206):
        raise OSError(f"the server answers {status} {response.reason}")
    if headers.get("Content-Type", "").startswith("text/html"):
        raise OSError("the answer is a web page and not the file; perhaps this network wants you to log in first")
    if status == 200:
        drop(part)
        encoded = headers.get("Content-Encoding", "identity") != "identity"  # then they describe something else
        remembered = [] if encoded else [*VALIDATORS, "Content-Length", "Content-MD5"]
        record = {name: headers[name] for name in remembered if name in headers}
        record_of(part).write_text(json.dumps(record), encoding="utf-8")
    length = length_of(part)
    compare_lengths(length, n_bytes)
    bar = tqdm(
        total=length or n_bytes, initial=size(part), desc=part.stem, unit="B", unit_scale=True, disable=None
    )  # fmt: skip
    with bar, open(part, "ab") as file:
        for chunk in response.iter_content(CHUNK):
            bar.update(file.write(chunk))
    n_more = n_missing(part, n_bytes) or 0
    return f"it ended after {size(part):,} of {size(part) + n_more:,} bytes" if n_more > 0 else ""


def continues(headers: dict[str, str], part: Path) -> bool:
    """Whether an answer of part of a file is what `part` lacks, and of the same file."""
    known = read_record(part)
    same = all(headers.get(name, known.get(name)) == known.get(name) for name in VALIDATORS)
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not (same and found and int(found[1]) == size(part)):
        return False
    return found[2] in ("*", known.get("Content-Length", found[2]))


def digest(path: Path, algorithm: str) -> bytes:
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
    return hashed.digest()


def reason(error: OSError) -> str:
    """What `error` is about, in one line, without the layers of requests and urllib3 around it."""
    while isinstance(inner := getattr(error, "reason", None), Exception) or (
        error.args and isinstance(inner := error.args[0], Exception)
    ):
        error = inner
    text = error.args[0] if isinstance(error, ProtocolError) else getattr(error, "strerror", None) or str(error)
    return " ".join(text.partition(" for url")[0].split())


def part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def record_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def read_record(part: Path) -> dict[str, str]:
    """The headers that were remembered with `part`; none if they are lost or damaged."""
    try:
        record = json.loads(record_of(part).read_text(encoding="utf-8"))
        return {name: value for name, value in record.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def validator(part: Path) -> str | None:
    """What an unchanged file still has: an ETag (unless weak, which does not promise the same bytes), else a date."""
    known = read_record(part)
    return known["ETag"] if known.get("ETag", "").startswith('"') else known.get("Last-Modified")


def length_of(part: Path) -> int | None:
    """The length that the server announced for the whole file."""
    length = read_record(part).get("Content-Length", "")
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def n_missing(part: Path, n_bytes: int | None) -> int | None:
    """How many bytes `part` lacks, if the server or `n_bytes` says how long the file is."""
    length = n_bytes if length_of(part) is None else length_of(part)
    return None if length is None else length - size(part)


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    record_of(part).unlink(missing_ok=True)

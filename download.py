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

from files import publish

TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 16
# At once, then after 1, 2, 4 and 8 seconds, and up to one more so that a class does not come back at the same moment.
RETRY = Retry(5, backoff_factor=0.5, backoff_jitter=1, status_forcelist=range(500, 600))
LONGEST_WAIT = 120  # seconds
VALIDATORS = ("ETag", "Last-Modified")
REMEMBERED = (*VALIDATORS, "Content-Length", "Content-MD5")


class WrongFileError(Exception):
    """What has come is complete, but not what was asked for."""


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
        for last in (False, True):
            try:
                fetch_checked(url, part, n_bytes, check)
                break
            except WrongFileError as error:
                if last:
                    raise OSError(f"{error}, twice") from error
                print(without_password(f"{url}: {error}; it is removed, and downloaded once more"), file=sys.stderr)
        publish(part, path)
        record_of(part).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # those of requests are OSErrors too, but for some odd addresses
        kept = f"{size(part):,} bytes are kept, and the same command goes on from there"
        if not size(part) or not validator(part):
            drop(part)
            kept = "nothing is kept, and the same command tries again"
        raise OSError(without_password(f"could not download {url}: {reason(error)}; {kept}")) from error


def fetch_checked(url: str, part: Path, n_bytes: int | None, check: Callable[[Path], object]) -> None:
    """`fetch`; WrongFileError, and nothing left, if what came is not the file that was asked for."""
    try:
        fetch(url, part, n_bytes)
        compare_lengths(size(part), n_bytes)
        md5 = read_record(part).get("Content-MD5", "")
        if len(md5) == 24 and md5 != base64.b64encode(digest(part, "md5")).decode():
            raise WrongFileError("it does not have the MD5 that the server announced")
        try:
            check(part)
        except ValueError as error:
            raise WrongFileError(error) from error
    except WrongFileError:
        drop(part)
        raise


def compare_lengths(found: int | None, expected: int | None) -> None:
    if None not in (found, expected) and found != expected:
        raise WrongFileError(f"it has {found:,} bytes, where {expected:,} are expected")


def fetch(url: str, part: Path, n_bytes: int | None) -> None:
    """Complete `part`, however often the connection breaks; as long as bytes arrive, the tries are not counted."""
    retry, most = RETRY, size(part)
    while not part.is_file() or size(part) != length_of(part):
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
        with contextlib.suppress(InvalidHeader, ValueError, OverflowError):  # of a header that makes no sense
            seconds = retry.get_retry_after(response) or seconds
    if seconds > LONGEST_WAIT:
        raise OSError(f"{problem}; the server asks to wait {seconds:,.0f} seconds")
    if seconds and sys.stderr and sys.stderr.isatty():
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
    whole = whole_length(headers, part) if status == 206 else None
    if (status == 206 and whole is None) or (status == 416 and size(part)):
        drop(part)
        return "the file has changed since its download began"
    response.raise_for_status()
    if status not in (200, 206):
        raise OSError(f"the server answers {status} {response.reason}")
    if headers.get("Content-Type", "").lower().startswith("text/html"):
        raise OSError("the answer is a web page and not the file; perhaps this network wants you to log in first")
    record = {}
    if status == 206:
        record = read_record(part) | {"Content-Length": whole}
    else:
        drop(part)
        if headers.get("Content-Encoding", "identity") == "identity":  # else they describe something else
            record = {name: headers[name] for name in REMEMBERED if name in headers}
    record_of(part).write_text(json.dumps(record), encoding="utf-8")
    compare_lengths(length_of(part), n_bytes)
    length = n_bytes if length_of(part) is None else length_of(part)
    bar = tqdm(
        total=length,
        initial=size(part),
        desc=part.stem,
        unit="B",
        unit_scale=True,
        disable=None if sys.stderr else True,
    )
    with bar, open(part, "ab") as file:
        for chunk in response.iter_content(CHUNK):
            bar.update(file.write(chunk))
    if length is not None and size(part) < length:
        return f"it ended after {size(part):,} of {length:,} bytes"
    return ""


def whole_length(headers: dict[str, str], part: Path) -> str | None:
    """Of an answer with part of a file the length of the whole; None unless that is what `part` lacks."""
    known = read_record(part)
    same = all(headers.get(name, known.get(name)) == known.get(name) for name in VALIDATORS)
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not (same and found and int(found[1]) == size(part)):
        return None
    length = known.get("Content-Length")
    if found[2] == "*":
        return length
    return found[2] if length in (None, found[2]) else None


def digest(path: Path, algorithm: str) -> bytes:
    hashed = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
    return hashed.digest()


def reason(error: Exception) -> str:
    """What `error` is about, in one line, without the layers of requests and urllib3 around it."""
    while isinstance(inner := getattr(error, "reason", None), Exception) or (
        error.args and isinstance(inner := error.args[0], Exception)
    ):
        error = inner
    text = error.args[0] if isinstance(error, ProtocolError) else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.partition(" for url")[0].split())
    return "".join(character if character.isprintable() else "?" for character in text)  # servers choose some of it


def without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


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


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    record_of(part).unlink(missing_ok=True)

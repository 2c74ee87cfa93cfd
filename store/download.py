"""Download files that can be trusted: resumed where they broke off, verified, and there whole or not at all.

Until a file is complete it is `name.part`. `name.part.json` beside it has what the server said of the file: its length,
its MD5, and the ETag or date that tell whether it is still the same file when the download is resumed.
"""

import base64
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import requests
from requests.exceptions import ConnectionError, Timeout
from tqdm import tqdm
from urllib3.exceptions import DecodeError, HTTPError, InvalidHeader, ProtocolError, ReadTimeoutError, SSLError
from urllib3.util import Retry

from store.files import digest, no_follow, open_regular, publish, write_text

TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 16
# At once, then after 1, 2, 4 and 8 seconds, each up to one longer: a class must not come back at the same moment.
RETRY = Retry(5, backoff_factor=0.5, backoff_jitter=1, status_forcelist=range(500, 600))
LONGEST_WAIT = 120  # seconds
VALIDATORS = ("ETag", "Last-Modified")
REMEMBERED = (*VALIDATORS, "Content-Length", "Content-MD5")
HOOKS = {"response": lambda r, **_: r.close() if r.is_redirect else None}  # requests would read it, however long it is


class WrongFileError(Exception):
    """The file is complete, but not the one that was asked for."""


def download(
    url: str, path: Path, n_bytes: int | None = None, check: Callable[[Path], None] = lambda _: None, most: int = 2**27
) -> None:
    """Download `url` to `path`, with a bar on standard error if that is a terminal.

    The file must have the length and MD5 that the server announced, `n_bytes` if given, and else at most `most` bytes;
    `check`, called with the path of the complete file, must not raise ValueError. Otherwise it is removed and, unless
    it does not end, downloaded once more. OSError says the URL and what is kept; an older file at `path` then stays.
    """
    part = part_of(path)
    try:
        if part.is_symlink():  # this module makes none
            drop(part)
        try:
            fetch_checked(url, part, n_bytes, most, check)
        except WrongFileError as error:
            print(without_password(f"{url}: {error}; it is removed, and downloaded once more"), file=sys.stderr)
            drop(part)
            fetch_checked(url, part, n_bytes, most, check)
        publish(part, path)
        record_of(part).unlink(missing_ok=True)
    except (OSError, ValueError, HTTPError, WrongFileError) as error:  # ValueError: requests, for some odd addresses
        is_wrong = isinstance(error, WrongFileError)
        problem = reason(error) + (", twice" if is_wrong else "")
        kept = f"{size(part):,} bytes are kept, and the same command goes on from there"
        if is_wrong or not size(part) or not validator(part):
            drop(part)
            kept = "nothing is kept, and the same command tries again"
        raise OSError(without_password(f"could not download {url}: {problem}; {kept}")) from error


def fetch_checked(url: str, part: Path, n_bytes: int | None, most: int, check: Callable[[Path], None]) -> None:
    """`fetch`, then raise WrongFileError if `part` is not the file that was asked for."""
    fetch(url, part, n_bytes, most)
    compare_lengths(size(part), n_bytes)
    md5 = read_record(part).get("Content-MD5", "")
    if len(md5) == 24 and md5 != base64.b64encode(digest(part, "md5")).decode():
        raise WrongFileError("it does not have the MD5 that the server announced")
    try:
        check(part)
    except ValueError as error:
        raise WrongFileError(error) from error


def compare_lengths(found: int | None, expected: int | None) -> None:
    if None not in (found, expected) and found != expected:
        raise WrongFileError(f"it has {found:,} bytes, where {expected:,} are expected")


def fetch(url: str, part: Path, n_bytes: int | None, most: int) -> None:
    """Complete `part`, however often the connection breaks. Tries after which there are more bytes do not count."""
    retry, longest = RETRY, size(part)
    while not part.is_file() or size(part) != length_of(part):
        headers, response = {"Accept-Encoding": "identity"}, None
        if size(part) and validator(part):  # ask for the rest; for all of it if the file has changed
            headers |= {"Range": f"bytes={size(part)}-", "If-Range": validator(part)}  # RFC 9110, section 13.1.5
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers, hooks=HOOKS) as response:
                # Retry's rules are applied here and not by requests, which does not retry once the body has begun.
                if retry.is_retry("GET", response.status_code, "Retry-After" in response.headers):
                    raise ConnectionError(f"{response.status_code} {response.reason}")
                receive(response, part, n_bytes, most)
                return
        except (ConnectionError, Timeout, ProtocolError, ReadTimeoutError, SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):  # it does not get better
                raise
            if size(part) > longest:
                retry, longest = RETRY, size(part)
            retry = wait(retry, response, reason(error))


def wait(retry: Retry, response: requests.Response | None, problem: str) -> Retry:
    """Wait as long as the server asks, else longer each time. Returns the `retry` that is left, or raises OSError."""
    if not retry.total:
        raise OSError(problem)
    retry = retry.increment()
    seconds = retry.get_backoff_time()
    if response is not None:
        with contextlib.suppress(InvalidHeader, ValueError, OverflowError):  # the header may make no sense
            seconds = retry.get_retry_after(response) or seconds
    if seconds > LONGEST_WAIT:
        raise OSError(f"{problem}; the server asks to wait {seconds:,.0f} seconds")
    if seconds and sys.stderr and sys.stderr.isatty():
        print(f"{problem}; trying again in {seconds:.0f} s", file=sys.stderr)
    time.sleep(seconds)
    return retry


def receive(response: requests.Response, part: Path, n_bytes: int | None, most: int) -> None:
    """Append the body of `response` to `part`; ConnectionError if another try may help, else OSError."""
    headers, status = response.headers, response.status_code
    whole = whole_length(headers, part) if status == 206 else None
    if (status == 206 and whole is None) or (status == 416 and size(part)):
        drop(part)
        raise ConnectionError("the file has changed since its download began")
    response.raise_for_status()
    if status not in (200, 206):
        raise OSError(f"the server answers {status} {response.reason}")
    if headers.get("Content-Type", "").lower().startswith("text/html"):
        raise OSError("the answer is a web page and not the file; perhaps this network wants you to log in first")
    if status == 206:
        record = read_record(part) | {"Content-Length": whole}
    else:
        drop(part)
        names = REMEMBERED if headers.get("Content-Encoding", "identity") == "identity" else ()  # else of a packed file
        record = {name: headers[name] for name in names if name in headers}
    if record != read_record(part):  # else each break of the connection would wait for the disk
        write_text(record_of(part), json.dumps(record))
    compare_lengths(length_of(part), n_bytes)
    length = length_of(part) or n_bytes
    limit = n_bytes or min(length or most, most)
    options = {"desc": part.stem, "unit": "B", "unit_scale": True, "disable": None if sys.stderr else True}
    with tqdm(total=length, initial=size(part), **options) as bar, open(part, "ab", opener=no_follow) as file:
        while piece := response.raw.read1(CHUNK, decode_content=True):  # all that arrives, also just before a break
            if file.tell() + len(piece) > limit:
                record_of(part).unlink(missing_ok=True)  # so that nothing is kept
                raise OSError(f"it does not end after {limit:,} bytes, the most that it should have")
            bar.update(file.write(piece))
    if length and size(part) < length:
        raise ConnectionError(f"it ended after {size(part):,} of {length:,} bytes")


def whole_length(headers: dict[str, str], part: Path) -> str | None:
    """The length of the whole file in an answer with a part of it; None unless that is just what `part` lacks."""
    known = read_record(part)
    same = all(headers.get(name, known.get(name)) == known.get(name) for name in VALIDATORS)
    found = re.fullmatch(rf"bytes {size(part)}-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    lengths = {found[1], known.get("Content-Length")} - {"*", None} if same and found else set()
    return lengths.pop() if len(lengths) == 1 else None


def reason(error: Exception) -> str:
    """What `error` is about, in one line, without the layers of requests and urllib3 around it."""
    while inner := [e for e in (getattr(error, "reason", None), *error.args[:1]) if isinstance(e, Exception)]:
        error = inner[0]
    text = error.args[0] if isinstance(error, (ProtocolError, DecodeError)) else str(error)
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
    """The headers that came with `part`; none if they are lost or damaged."""
    try:
        with open_regular(record_of(part), 2**16) as file:
            return {name: text for name, text in json.load(file).items() if re.fullmatch("[!-~][ -~]{,999}", text)}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def validator(part: Path) -> str | None:
    """What tells that a file is unchanged: its ETag (a weak one does not promise the same bytes), else its date."""
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

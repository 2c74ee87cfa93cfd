"""Download files that can be trusted: resumed after a break, verified, and visible only when they are complete.

Until then a file is called `name.part`, and `name.part.json` records the headers that came with it.
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
from tqdm import tqdm
from urllib3.exceptions import DecodeError, HTTPError, InvalidHeader, ProtocolError, ReadTimeoutError, SSLError
from urllib3.util import Retry

from store.files import MAX_TABLE_BYTES, digest, no_follow, open_regular, publish, write_text

TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
CHUNK = 1 << 16
# Retry at once, then after 1, 2, 4 and 8 seconds, plus up to one second so that a whole class does not return together.
RETRY = Retry(5, backoff_factor=0.5, backoff_jitter=1, status_forcelist=range(500, 600))
LONGEST_WAIT = 120  # seconds
RECORDED = ("ETag", "Last-Modified", "Content-Length", "Content-MD5")
HOOKS = {"response": lambda r, **_: r.close() if r.is_redirect else None}  # otherwise requests reads the whole body
# The name comes last because tqdm cuts off what does not fit: a narrow terminal must show the time left.
BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}] {desc}"

Check = Callable[[Path], str | None]  # returns what is wrong with a file, if anything


class PartialFile:
    """What has arrived so far of a file that is downloaded to `path`, and the headers that came with it."""

    def __init__(self, path: Path, n_bytes: int = 0) -> None:
        self.path, self.record_path = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
        self.n_bytes = n_bytes  # the length that the file must have, or 0 if it is unknown
        self.record: dict[str, str] = {}
        with contextlib.suppress(Exception), open_regular(self.record_path, 2**16) as file:  # damaged: no record
            self.record = {name: text for name, text in json.load(file).items() if re.fullmatch("[!-~][ -~]*", text)}

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def length(self) -> int | None:
        length = self.record.get("Content-Length", "")  # of the whole file, as the server announced it
        return int(length) if re.fullmatch("[0-9]{1,18}", length) else None

    @property
    def validator(self) -> str | None:
        """What tells whether the file has changed: its strong ETag (a weak one allows other bytes), else its date."""
        return self.record.get("ETag" if self.record.get("ETag", "").startswith('"') else "Last-Modified")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.record_path.unlink(missing_ok=True)
        self.record = {}


def download(url: str, path: Path, n_bytes: int = 0, check: Check = lambda _: None) -> None:
    """Download `url` to `path`, with a progress bar if standard error is a terminal.

    The file must have the length and MD5 that the server announced, and `n_bytes` if given, else at most 32 MB.
    `check` is called with the path of the complete file and returns what is wrong with it, if anything. A wrong file is
    removed and downloaded once more. Raises OSError with the URL and what is kept; an older file at `path` then stays.
    """
    part = PartialFile(path, n_bytes)
    try:
        if part.path.is_symlink():  # somebody else made it
            part.remove()
        if problem := fetch(url, part, check):
            print(one_line(f"{url}: {problem}; it is removed and downloaded once more"), file=sys.stderr)
            part.remove()
            if problem := fetch(url, part, check):
                part.remove()
                raise OSError(f"{problem}, twice")
        publish(part.path, path)
        part.remove()
    except (OSError, ValueError, HTTPError) as error:  # requests raises ValueError for some odd URLs
        kept = f"{part.size:,} bytes are kept, and the same command resumes there"
        if not part.size or not part.validator:
            part.remove()
            kept = "nothing is kept, and the same command tries again"
        raise OSError(one_line(f"could not download {url}: {reason(error)}; {kept}")) from error


def fetch(url: str, part: PartialFile, check: Check) -> str | None:
    """Complete `part`, however often the connection breaks. Returns what is wrong with the file, if anything."""
    retry, longest = RETRY, part.size
    while not (part.path.is_file() and part.size == part.length and part.n_bytes in (0, part.length)):
        headers, response = {"Accept-Encoding": "identity"}, None
        if part.size and part.validator:  # ask for the rest, or for the whole file if it has changed
            headers |= {"Range": f"bytes={part.size}-", "If-Range": part.validator}  # RFC 9110, section 13.1.5
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers, hooks=HOOKS) as response:
                # Apply Retry's rules here, because requests does not retry once the body has started.
                if retry.is_retry("GET", response.status_code, "Retry-After" in response.headers):
                    raise requests.ConnectionError(f"{response.status_code} {response.reason}")
                if problem := receive(response, part):
                    return problem
                break
        except (requests.ConnectionError, requests.Timeout, ProtocolError, ReadTimeoutError, SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):  # another try would not help
                raise
            if part.size > longest:  # only tries that bring no more bytes are counted
                retry, longest = RETRY, part.size
            problem = reason(error)
            retry = retry.increment(error=OSError(problem))  # raises MaxRetryError, with this reason, if none is left
            seconds = retry.get_backoff_time()
            if response is not None:
                with contextlib.suppress(InvalidHeader, ValueError, OverflowError):  # the header may be nonsense
                    seconds = retry.get_retry_after(response.raw) or seconds
            if seconds > LONGEST_WAIT:
                raise OSError(f"{problem}; the server asks to wait {seconds:,.0f} seconds") from error
            if seconds and sys.stderr:
                print(one_line(f"{url}: {problem}; trying again in {seconds:.0f} s"), file=sys.stderr)
            time.sleep(seconds)
    md5 = part.record.get("Content-MD5", "")
    if len(md5) == 24 and md5 != base64.b64encode(digest(part.path, "md5")).decode():
        return "it does not have the MD5 that the server announced"
    return check(part.path)


def receive(response: requests.Response, part: PartialFile) -> str | None:
    """Append the body of `response` to `part`. Returns what is wrong, or raises ConnectionError if a retry may help."""
    headers, status, record = response.headers, response.status_code, {}
    if status == 206:  # the body must be exactly what `part` lacks, and of the same file
        known, total = part.record, rf"{part.length}|\*" if part.length else "[0-9]{1,18}"
        found = re.fullmatch(rf"bytes {part.size}-\d+/({total})", headers.get("Content-Range", ""))
        if found and all(headers.get(name, known.get(name)) == known.get(name) for name in ("ETag", "Last-Modified")):
            record = known | {"Content-Length": str(part.length or found[1])}
    elif headers.get("Content-Encoding", "identity") == "identity":  # else the headers describe a compressed file
        record = {name: headers[name] for name in RECORDED if name in headers}
    if (status == 206 and not record) or (status == 416 and part.size):
        part.remove()
        raise requests.ConnectionError("the file has changed since its download started")
    if status not in (200, 206):
        raise OSError(f"the server answers {status} {response.reason}")
    if headers.get("Content-Type", "").lower().startswith("text/html"):
        raise OSError("the answer is a web page and not the file; perhaps this network wants you to log in first")
    if status == 200:
        part.remove()
    if record != part.record:  # each write waits for the disk
        write_text(part.record_path, json.dumps(record))
        part.record = record
    length = part.length or part.n_bytes
    if length and part.n_bytes not in (0, length):
        return f"it has {length:,} bytes, where {part.n_bytes:,} are expected"
    limit = part.n_bytes or min(length or MAX_TABLE_BYTES, MAX_TABLE_BYTES)
    options = {"unit": "B", "unit_scale": True, "disable": None if sys.stderr else True}
    bar = tqdm(desc=part.path.stem, total=length, initial=part.size, bar_format=BAR if length else None, **options)
    with bar, open(part.path, "ab", opener=no_follow) as file:
        while piece := response.raw.read1(CHUNK, decode_content=True):  # it returns what came before a break
            if file.tell() + len(piece) > limit:
                part.record = {}  # so that nothing is kept
                raise OSError(f"it does not end after {limit:,} bytes, the most that it should have")
            bar.update(file.write(piece))
    if length and part.size < length:
        raise requests.ConnectionError(f"it ended after {part.size:,} of {length:,} bytes")
    return None


def reason(error: BaseException) -> str:
    """What `error` says, without the layers of requests and urllib3 around it."""
    while inner := [e for e in (getattr(error, "reason", None), *error.args[:1]) if isinstance(e, Exception)]:
        error = inner[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return error.args[0] if isinstance(error, (ProtocolError, DecodeError)) else str(error)


def one_line(text: str) -> str:
    """`text` on one line, without passwords in URLs. Terminal escapes become "?": servers choose some of the text."""
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))
    return "".join(character if character.isprintable() else "?" for character in text)

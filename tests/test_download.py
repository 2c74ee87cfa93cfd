"""Downloads under fault: each case is what exists before, what the server does, and what must be true afterwards."""

import gzip
import json
import os
import re
import ssl
import struct
import sys
import time
from pathlib import Path

import pytest
import requests
import urllib3

from helpers.faulty_server import Answer, Server, faulty_server, md5_header
from store import download as module
from store.download import RETRY, PartialFile, download

BODY = bytes(range(256)) * 10_000
N = len(BODY)
HALF = 20 * module.CHUNK
OTHER = BODY[::-1]


@pytest.fixture
def server():
    with faulty_server() as server:
        server.files["/file"] = BODY
        yield server


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "file"


@pytest.fixture
def waits(monkeypatch):
    """The seconds of each wait, which is skipped."""
    seconds = []
    monkeypatch.setattr(module.time, "sleep", seconds.append)
    return seconds


def fetch(server, path, n_bytes=N):
    download(f"{server.url}/file", path, n_bytes)
    assert path.read_bytes() == BODY


def interrupt(path, body=BODY, n=HALF, validator="ETag", record=None, **headers):
    """Leave what a download to `path` leaves if it is interrupted after n bytes of `body`."""
    server, part = Server(), PartialFile(path)
    server.validator = validator
    headers = server.validators(body) | {"Content-Length": str(len(body))} | headers
    part.path.write_bytes(body[:n])
    part.record_path.write_text(json.dumps(headers) if record is None else record)


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


CUT, UNANNOUNCED = Answer(stop_after=HALF), {"Content-Length": None}
GZIP, CHUNKED = {"Content-Encoding": "gzip"}, UNANNOUNCED | {"Transfer-Encoding": "chunked"}
BOMB = Answer(body=100 * gzip.compress(bytes(3 * 10**6)), headers=GZIP)
ENDLESS = Answer(headers=UNANNOUNCED, then="repeat")


@pytest.mark.parametrize("validator", ["ETag", "Last-Modified", "weak", ""])
@pytest.mark.parametrize("answers", [
    [], [Answer(headers=UNANNOUNCED)], [CUT], [Answer(stop_after=0)], [Answer(stop_after=HALF, then="reset")],
    [CUT, Answer(stop_after=1000), Answer(stop_after=0)], [CUT, Answer(ignore_range=True)],
    [Answer(status=500), Answer(status=500)], [CUT, Answer(status=502), Answer(status=599)], [CUT, Answer(status=416)],
    [Answer(status=503, headers={"Retry-After": "1"})], [Answer(status=429, headers={"Retry-After": "2"})],
    [Answer(headers={"Content-Length": str(N + 100)})], [Answer(headers={"Content-Length": str(N - 100)})],
    [Answer(body=OTHER, headers=md5_header(BODY))], [Answer(stop_after=HALF, headers=UNANNOUNCED)],
    [Answer(status=302, headers={"Location": "/file"})], [CUT, Answer(status=302, headers={"Location": "/file"})],
], ids=repr)  # fmt: skip
def test_a_file_arrives_whole_and_alone(server, path, waits, validator, answers):
    server.validator, server.answers = validator, list(answers)
    path.write_bytes(b"an older file")
    fetch(server, path)
    assert (names(path), server.answers) == (["file"], [])


@pytest.mark.parametrize("redirect", [{}, {"status": 302, "headers": {"Location": "/file"}}], ids=repr)
def test_a_connection_that_stalls_is_dropped_and_the_download_resumes(server, path, waits, monkeypatch, redirect):
    assert module.TIMEOUT == (10, 60), "seconds to connect, and to wait for the next bytes"
    monkeypatch.setattr(module, "TIMEOUT", (1, 0.2))
    server.answers = [Answer(stop_after=HALF, then="stall", **redirect)]
    fetch(server, path)
    assert (server.ranges(), waits) == (([None, None], []) if redirect else ([None, f"bytes={HALF}-"], [0]))


@pytest.mark.parametrize("step", [1000, 100_000])
def test_as_long_as_bytes_arrive_it_resumes_after_the_last_of_them(server, path, waits, step):
    steps = range(step, 21 * step, step)
    server.answers = [Answer(stop_after=step) for _ in steps]
    fetch(server, path)
    assert server.ranges() == [None, *(f"bytes={n}-" for n in steps)]
    assert len(steps) > RETRY.total and not any(waits), "the first try after progress is at once"


@pytest.mark.parametrize(("answer", "n_bytes"), [
    (ENDLESS, 0), (ENDLESS, 10**6), (BOMB, 0), (BOMB, 10**6), (Answer(body=bytes(2**25 + 1)), 0),
    (Answer(body=b"10000\r\n" + bytes(2**16) + b"\r\n", headers=CHUNKED, then="repeat"), 0),
], ids=repr)  # fmt: skip
def test_a_body_without_an_end_is_refused_at_the_largest_allowed_length(server, path, monkeypatch, answer, n_bytes):
    sizes, remove, limit = [], PartialFile.remove, n_bytes or 2**25
    monkeypatch.setattr(PartialFile, "remove", lambda part: (sizes.append(part.size), remove(part)))
    server.answers = [answer]
    with pytest.raises(OSError, match=f"it does not end after {limit:,} bytes, .*; nothing is kept"):
        download(f"{server.url}/file", path, n_bytes)
    assert limit - module.CHUNK <= max(sizes) <= limit
    assert (names(path), len(server.requests)) == ([], 1)


@pytest.mark.parametrize(("validator", "answers", "second"), [
    ("ETag", [Answer(stop_after=HALF, headers=UNANNOUNCED)], f"bytes={HALF}-"),
    ("ETag", [CUT, Answer(ignore_range=True)], f"bytes={HALF}-"), ("weak", [CUT], None), ("", [CUT], None),
])  # fmt: skip
def test_the_rest_is_requested_only_if_the_file_is_surely_unchanged(server, path, waits, validator, answers, second):
    server.validator, server.answers = validator, list(answers)
    fetch(server, path)
    assert server.ranges() == [None, second]


def test_a_file_of_unknown_length_starts_over(server, path, waits):  # it could lack the end
    interrupt(path, record=json.dumps(server.validators(BODY)))
    headers = {"Content-Range": f"bytes {HALF}-{HALF + 9}/*", "Content-Length": "10"}
    server.answers = [Answer(headers=headers, stop_after=10)]
    fetch(server, path, 0)
    assert server.ranges() == [f"bytes={HALF}-", None]


def test_a_compressed_response_is_unpacked(server, path, waits):
    server.answers = [Answer(body=gzip.compress(BODY), headers=GZIP | md5_header(b"x"))]
    fetch(server, path)
    assert [headers["Accept-Encoding"] for _, headers in server.requests] == ["identity"]


@pytest.mark.parametrize(("validator", "n", "ranges"), [
    ("ETag", HALF, [f"bytes={HALF}-"]), ("Last-Modified", HALF, [f"bytes={HALF}-"]), ("ETag", N, []),
])  # fmt: skip
def test_a_partial_file_is_resumed_and_a_complete_one_is_not_requested(server, path, validator, n, ranges):
    server.validator = validator
    interrupt(path, n=n, validator=validator)
    fetch(server, path)
    assert (server.ranges(), names(path)) == (ranges, ["file"])


BEFORE = {
    "another file": lambda path: interrupt(path, OTHER), "an empty part": lambda path: interrupt(path, n=0),
    "another file of another length": lambda path: interrupt(path, OTHER[:-5]),
    "another file, and complete": lambda path: interrupt(path, OTHER, n=N, **md5_header(BODY)),
    "too long": lambda path: interrupt(path, BODY + b"more", n=N + 2),
    "no record": lambda path: (interrupt(path), PartialFile(path).record_path.unlink()),
    "no part": lambda path: (interrupt(path), PartialFile(path).path.unlink()),
    "no part, and nothing expected": lambda path: (interrupt(path, b""), PartialFile(path).path.unlink()),
    "no validator": lambda path: interrupt(path, record="{}"), "no JSON": lambda path: interrupt(path, record="{"),
    "a record of the wrong type": lambda path: interrupt(path, record="[1]"),
    "a record of wrong values": lambda path: interrupt(path, record='{"ETag": 3, "Content-Length": "x"}'),
    "a record that is no header": lambda path: interrupt(path, record='{"Last-Modified": "\\u4e2d"}'),
    "a record that is a pipe": lambda path: (Path(f"{path}.part").write_bytes(BODY), os.mkfifo(f"{path}.part.json")),
    "a record without end": lambda path: (interrupt(path), os.truncate(f"{path}.part.json", 2**35)),
}  # fmt: skip


@pytest.mark.parametrize("answers", [[], [Answer(ignore_range=True)], [Answer(ignore_condition=True)]], ids=repr)
@pytest.mark.parametrize("before", BEFORE)
def test_what_is_left_of_another_file_is_never_resumed(server, path, waits, before, answers):
    BEFORE[before](path)
    server.answers = list(answers)
    fetch(server, path)
    assert names(path) == ["file"]


@pytest.mark.parametrize("links", [["file.part"], ["file.part.json"], ["file.part", "file.part.json"]])
@pytest.mark.parametrize(("n", "length"), [(0, ""), (HALF, ""), (N, str(N))])
def test_the_target_of_a_link_in_place_of_a_part_or_record_stays_unchanged(server, path, tmp_path, links, n, length):
    interrupt(path, n=n, **{"Content-Length": length})
    victims = {f"victim.{link}": (tmp_path / link).read_bytes() for link in links}
    for link in links:
        (tmp_path / link).rename(tmp_path / f"victim.{link}").with_name(link).symlink_to(f"victim.{link}")
    fetch(server, path)
    assert {name: (tmp_path / name).read_bytes() for name in victims} == victims
    assert not any(left.is_symlink() for left in tmp_path.iterdir())


def test_a_part_that_becomes_a_link_meanwhile_is_not_written(server, path, monkeypatch):
    interrupt(path)
    PartialFile(path).path.rename(f"{path}.victim").with_name("file.part").symlink_to(f"{path}.victim")
    monkeypatch.setattr(module.Path, "is_symlink", lambda path: False)
    with pytest.raises(OSError, match=r"file\.part: Too many levels of symbolic links"):
        fetch(server, path)


@pytest.mark.parametrize(
    "content_range", ["bytes 0-9/10", f"bytes {HALF - 1}-{N - 1}/{N}", f"bytes {HALF}-{N - 1}/{N + 1}", "garbage", None]
)
def test_a_range_other_than_the_one_requested_is_not_used(server, path, waits, content_range):
    interrupt(path)
    server.answers = [Answer(headers={"Content-Range": content_range})]
    fetch(server, path)
    assert server.ranges() == [f"bytes={HALF}-", None]


def test_a_narrow_terminal_shows_what_has_arrived_and_the_time_left(server, path, monkeypatch):
    path = path.with_name("model.ckpt.data-00000-of-00001")
    interrupt(path)
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with open(theirs, "w") as terminal, open(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        fetch(server, path)
        first, *_, last = lines = screen.read(2**16).decode().split("\r")[1:-1]
    assert first.startswith(" 51%|") and "| 1.31M/2.56M [? left" in first and last.startswith("100%|")
    assert all(re.search(r"[0-9?] left, .*\] model\.", line) and len(line) <= 60 for line in lines), lines


@pytest.mark.parametrize("before", [None, b"an older file"])
@pytest.mark.parametrize(("answer", "complaint", "n_requests"), [
    (Answer(status=404), "404", 1), (Answer(status=429), "429", 1), (Answer(status=416), "416", 1),
    (Answer(status=204, body=b""), "204", 1), (Answer(status=429, headers={"Retry-After": "3"}), "429", 6),
    (Answer(status=503, headers={"Retry-After": "100000"}), "503.*asks to wait 21,600|100,000", 1),
    (Answer(stop_after=0), "IncompleteRead|ended after 0", 6),
    (Answer(body=BODY[:10]), "it has 10 bytes, where 2,560,000 are expected, twice", 2),
    (Answer(headers={"Content-Type": "Text/HTML; charset=utf-8"}), "web page.*log in", 1),
    (Answer(status=302, headers={"Location": "/file"}), "redirects", 31),
    (Answer(body=BODY + b"x", headers=UNANNOUNCED), "it does not end after 2,560,000 bytes", 1),
    (Answer(body=b"none", headers=CHUNKED), "IncompleteRead", 6), (Answer(headers=GZIP), "file: Received.*gzip", 1),
    (Answer(body=OTHER, headers=md5_header(BODY)), "it does not have the MD5 .*, twice", 2),
    (Answer(body=b"", headers=UNANNOUNCED), "ended after 0 of 2,560,000", 6),
], ids=repr)  # fmt: skip
def test_a_failed_download_is_one_line_and_leaves_nothing(server, path, waits, answer, complaint, n_requests, before):
    server.answers = [answer] * 40
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match=complaint) as raised:
        download(f"{server.url}/file", path, N)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"could not download {server.url}/file: ")
    assert line.endswith("nothing is kept, and the same command tries again")
    assert (path.read_bytes() if path.exists() else None) == before
    assert (names(path), len(server.requests)) == (["file"] if before else [], n_requests)


@pytest.mark.parametrize(("validator", "kept"), [
    ("ETag", f"{HALF:,} bytes are kept, and the same command resumes there"), ("", "nothing is kept"),
])  # fmt: skip
def test_what_has_arrived_is_kept_if_it_can_be_resumed_and_the_error_says_so(server, path, waits, validator, kept):
    server.validator, server.answers = validator, [CUT, *[Answer(status=503)] * 6]
    with pytest.raises(OSError, match=rf"503.*; {kept}"):
        fetch(server, path)
    assert names(path) == (["file.part", "file.part.json"] if validator else [])
    fetch(server, path)
    assert server.ranges()[-1] == (f"bytes={HALF}-" if validator else None)


def test_an_unreachable_server_is_an_error_with_the_url(path, waits):
    url = "http://127.0.0.1:9/124M/hparams.json"
    with pytest.raises(OSError, match=f"{url}.*refused"):
        download(url, path)
    assert len(waits) == RETRY.total


@pytest.mark.parametrize("url", ["file:///etc/passwd", "nonsense", "http://"])
def test_a_mirror_with_an_invalid_address_is_refused_at_once(path, waits, url):
    with pytest.raises(OSError, match=r"could not download (?!.*twice)"):
        download(f"{url}/124M/hparams.json", path)
    assert waits == []


def test_a_certificate_that_cannot_be_trusted_is_refused_at_once(path, waits, monkeypatch):
    def get(url, **options):
        ours = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
        ours.reason = "CERTIFICATE_VERIFY_FAILED"  # as the module ssl sets it
        theirs = urllib3.exceptions.SSLError(ours)
        raise requests.exceptions.SSLError(urllib3.exceptions.MaxRetryError(None, url, theirs))

    monkeypatch.setattr(module.requests, "get", get)
    with pytest.raises(OSError, match=r"could not download https://a/b: .*self-signed certificate; nothing is kept"):
        download("https://a/b", path)
    assert waits == []


@pytest.mark.parametrize("location", ["http://[::1", "http://.invalid./x", f"http://{'a' * 64}.invalid/", "ftp://x/y"])
def test_a_redirect_to_an_invalid_address_is_refused_and_what_has_arrived_is_kept(server, path, waits, location):
    interrupt(path)
    server.answers = [Answer(status=302, headers={"Location": location})] * 6
    with pytest.raises(OSError, match=rf"file: (?!.*twice).*{HALF:,} bytes are kept"):
        fetch(server, path)


def test_neither_passwords_nor_terminal_escapes_are_printed(server, path, waits, capsys):
    url = server.url.replace("//", "//user:s3cret@") + "/file"
    server.answers = [Answer(body=OTHER, headers=md5_header(BODY)), Answer(status=404, reason="\x1b[31mred\x07")]
    with pytest.raises(OSError, match="404") as raised:
        download(url, path)
    shown = str(raised.value) + capsys.readouterr().err.strip()
    assert "s3cret" not in shown and shown.isprintable()


def test_a_process_without_standard_error_downloads_too(server, path, waits, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    server.answers = [Answer(status=503, headers={"Retry-After": "1"})]
    fetch(server, path, 0)


def test_what_the_check_refuses_is_removed_and_downloaded_once_more(server, path, capsys):
    server.answers, seen = [Answer(body=OTHER)], []

    def check(part):
        seen.append(part.read_bytes())
        return None if seen[-1] == BODY else "it is the other one"

    download(f"{server.url}/file", path, N, check)
    assert (seen, path.read_bytes()) == ([OTHER, BODY], BODY)
    notice = f"{server.url}/file: it is the other one; it is removed and downloaded once more\n"
    assert capsys.readouterr().err == notice


def test_an_md5_that_was_announced_holds_for_the_whole_file_also_after_a_resume(server, path, waits):
    server.answers = [Answer(stop_after=HALF, headers=md5_header(OTHER)), Answer(), Answer(headers=md5_header(BODY))]
    fetch(server, path, 0)
    assert server.ranges() == [None, f"bytes={HALF}-", None]
    server.answers = [Answer(headers={"Content-MD5": "??", "Content-Length": None})]
    fetch(server, path, 0)
    assert server.answers == [] and len(server.requests) == 4, "an MD5 that makes no sense is no reason to refuse"


def test_waits_grow_and_differ(server, path, waits):
    server.answers = [Answer(status=500) for _ in range(2 * (RETRY.total + 1))]
    for _ in range(2):
        with pytest.raises(OSError, match=r"could not download .*/file: 500"):
            fetch(server, path)
    first, second = waits[: RETRY.total], waits[RETRY.total :]
    assert first[0] == 0 and first[1:] != second[1:]
    assert all(2**n <= seconds <= 2**n + 1 for n, seconds in enumerate(first[1:]))


@pytest.mark.parametrize(("retry_after", "seconds"), [
    ("7", 7), ("0", 0), ("soon", 0), ("Mon, 01 Jan 99999999999 00:00:00 GMT", 0), ("9" * 5000, 0), ("-1", 0),
])  # fmt: skip
def test_the_server_may_say_how_long_to_wait_and_the_user_is_told(server, path, waits, capsys, retry_after, seconds):
    server.answers = [Answer(status=503, headers={"Retry-After": retry_after})]
    fetch(server, path)
    assert waits == [seconds]
    notice = f"{server.url}/file: 503 Service Unavailable; trying again in 7 s\n"
    assert capsys.readouterr().err == notice * (seconds == 7)


def test_a_date_to_come_back_at_is_honoured_too(server, path, waits):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    server.answers = [Answer(status=429, headers={"Retry-After": date})]
    download(f"{server.url}/file", path)
    assert 0 < waits[0] <= 30


def test_a_proxy_of_the_environment_is_used(server, path, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    for name, value in {"HTTP_PROXY": server.url, "http_proxy": server.url, "no_proxy": ""}.items():
        monkeypatch.setenv(name, value)
    download("http://models.invalid/file", path)
    assert (server.paths(), path.read_bytes()) == (["http://models.invalid/file"], BODY)

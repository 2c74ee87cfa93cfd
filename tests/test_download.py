"""Downloads under fault: each case is what is there before, what the server does, and what must hold after."""

import gzip
import json
import os
import ssl
import sys
import time

import pytest
import requests
import urllib3

from helpers.faulty_server import Answer, Server, faulty_server, md5_header
from store import download as module
from store.download import RETRY, download, drop, part_of, record_of, size, wait

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
    """How long it would have waited, each time."""
    seconds = []
    monkeypatch.setattr(module.time, "sleep", seconds.append)
    return seconds


def fetch(server, path, n_bytes=N, body=BODY):
    download(f"{server.url}/file", path, n_bytes)
    assert path.read_bytes() == body


def begin(path, body=BODY, n=HALF, validator="ETag", **record):
    """Leave at `path` what a download that was interrupted after n bytes of `body` leaves."""
    server = Server()
    server.validator = validator
    part_of(path).write_bytes(body[:n])
    write_record(path, json.dumps(server.validators(body) | {"Content-Length": str(len(body))} | record))


def write_record(path, text):
    record_of(part_of(path)).write_text(text)


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
def test_a_connection_that_stalls_is_given_up_and_the_file_goes_on(server, path, waits, monkeypatch, redirect):
    monkeypatch.setattr(module, "TIMEOUT", (1, 0.2))
    server.answers = [Answer(stop_after=HALF, then="stall", **redirect)]
    fetch(server, path)
    assert (server.ranges(), waits) == (([None, None], []) if redirect else ([None, f"bytes={HALF}-"], [0]))


def test_there_are_ten_seconds_to_connect_and_sixty_for_the_next_bytes(server, path, monkeypatch):
    given, get = [], module.requests.get
    monkeypatch.setattr(module.requests, "get", lambda url, **options: (given.append(options), get(url, **options))[1])
    download(f"{server.url}/file", path)
    assert [options["timeout"] for options in given] == [(10, 60)]


@pytest.mark.parametrize("step", [1000, 100_000])
def test_as_long_as_bytes_arrive_it_goes_on_after_the_last_of_them(server, path, waits, step):
    steps = range(step, 21 * step, step)
    server.answers = [Answer(stop_after=step) for _ in steps]
    fetch(server, path)
    assert server.ranges() == [None, *(f"bytes={n}-" for n in steps)]
    assert len(steps) > RETRY.total and not any(waits), "the first try after progress is at once"


@pytest.mark.parametrize(("answer", "end"), [
    (ENDLESS, {}), (ENDLESS, {"n_bytes": 10**6}), (BOMB, {}), (BOMB, {"n_bytes": 10**6}), (Answer(), {"most": 2**20}),
    (Answer(body=b"10000\r\n" + bytes(2**16) + b"\r\n", headers=CHUNKED, then="repeat"), {"most": 2**20}),
], ids=repr)  # fmt: skip
def test_a_body_without_an_end_is_refused_at_the_most_that_it_may_have(server, path, monkeypatch, answer, end):
    sizes, most = [], max(end.values(), default=2**27)
    monkeypatch.setattr(module, "drop", lambda part: (sizes.append(size(part)), drop(part)))
    server.answers = [answer]
    with pytest.raises(OSError, match=f"it does not end after {most:,} bytes, .*; nothing is kept"):
        download(f"{server.url}/file", path, **end)
    assert most - module.CHUNK <= max(sizes) <= most
    assert (names(path), len(server.requests)) == ([], 1)


@pytest.mark.parametrize(("validator", "answers", "second"), [
    ("ETag", [Answer(stop_after=HALF, headers=UNANNOUNCED)], f"bytes={HALF}-"),
    ("ETag", [CUT, Answer(ignore_range=True)], f"bytes={HALF}-"), ("weak", [CUT], None), ("", [CUT], None),
])  # fmt: skip
def test_the_rest_is_asked_for_only_if_the_file_is_surely_the_same(server, path, waits, validator, answers, second):
    server.validator, server.answers = validator, list(answers)
    fetch(server, path)
    assert server.ranges() == [None, second]


def test_where_nothing_says_how_long_the_file_is_it_starts_over(server, path, waits):  # it could lack the end
    begin(path)
    write_record(path, json.dumps(server.validators(BODY)))
    headers = {"Content-Range": f"bytes {HALF}-{HALF + 9}/*", "Content-Length": "10"}
    server.answers = [Answer(headers=headers, stop_after=10)]
    fetch(server, path, None)
    assert server.ranges() == [f"bytes={HALF}-", None]


def test_a_file_that_comes_compressed_is_the_file(server, path, waits):
    server.answers = [Answer(body=gzip.compress(BODY), headers=GZIP | md5_header(b"x"))]
    fetch(server, path)
    assert len(server.requests) == 1
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(("validator", "n", "ranges"), [
    ("ETag", HALF, [f"bytes={HALF}-"]), ("Last-Modified", HALF, [f"bytes={HALF}-"]), ("ETag", N, []),
])  # fmt: skip
def test_a_file_goes_on_where_it_stands_and_is_not_asked_for_when_complete(server, path, validator, n, ranges):
    server.validator = validator
    begin(path, n=n, validator=validator)
    fetch(server, path)
    assert (server.ranges(), names(path)) == (ranges, ["file"])


BEFORE = {
    "another file": lambda path: begin(path, OTHER), "an empty part": lambda path: begin(path, n=0),
    "another file of another length": lambda path: begin(path, OTHER[:-5]),
    "another file, and complete": lambda path: begin(path, OTHER, n=N, **md5_header(BODY)),
    "too long": lambda path: begin(path, BODY + b"more", n=N + 2),
    "no record": lambda path: (begin(path), record_of(part_of(path)).unlink()),
    "no part": lambda path: (begin(path), part_of(path).unlink()),
    "no part, and nothing expected": lambda path: (begin(path, b""), part_of(path).unlink()),
    "a record that is not JSON": lambda path: (begin(path), write_record(path, "{")),
    "a record of the wrong type": lambda path: (begin(path), write_record(path, "[1]")),
    "a record of wrong values": lambda path: (begin(path), write_record(path, '{"ETag": 3, "Content-Length": "x"}')),
    "a record that is no header": lambda path: (begin(path), write_record(path, '{"Last-Modified": "\\u4e2d"}')),
    "a record that is a pipe": lambda path: (part_of(path).write_bytes(BODY), os.mkfifo(record_of(part_of(path)))),
    "a record without end": lambda path: (begin(path), os.truncate(record_of(part_of(path)), 2**35)),
    "no validator": lambda path: (begin(path), write_record(path, "{}")),
}  # fmt: skip


@pytest.mark.parametrize("answers", [[], [Answer(ignore_range=True)], [Answer(ignore_condition=True)]], ids=repr)
@pytest.mark.parametrize("before", BEFORE)
def test_what_is_left_of_another_file_is_never_gone_on_with(server, path, waits, before, answers):
    BEFORE[before](path)
    server.answers = list(answers)
    fetch(server, path)
    assert names(path) == ["file"]


@pytest.mark.parametrize("links", [["file.part"], ["file.part.json"], ["file.part", "file.part.json"]])
@pytest.mark.parametrize(("n", "length"), [(0, ""), (HALF, ""), (N, str(N))])
def test_what_a_link_in_place_of_a_part_or_record_points_to_stays(server, path, tmp_path, links, n, length):
    begin(path, n=n, **{"Content-Length": length})
    victims = {f"victim.{link}": (tmp_path / link).read_bytes() for link in links}
    for link in links:
        (tmp_path / link).rename(tmp_path / f"victim.{link}").with_name(link).symlink_to(f"victim.{link}")
    fetch(server, path)
    assert {name: (tmp_path / name).read_bytes() for name in victims} == victims
    assert not any(left.is_symlink() for left in tmp_path.iterdir())


def test_a_part_that_becomes_a_link_meanwhile_is_not_written(server, path, monkeypatch):
    begin(path)
    part_of(path).rename(f"{path}.victim").with_name("file.part").symlink_to(f"{path}.victim")
    monkeypatch.setattr(module.Path, "is_symlink", lambda path: False)
    with pytest.raises(OSError, match=r"file\.part: Too many levels of symbolic links"):
        fetch(server, path)


@pytest.mark.parametrize(
    "content_range", ["bytes 0-9/10", f"bytes {HALF - 1}-{N - 1}/{N}", f"bytes {HALF}-{N - 1}/{N + 1}", "garbage", None]
)
def test_a_range_other_than_the_one_asked_for_is_not_taken(server, path, waits, content_range):
    begin(path)
    server.answers = [Answer(headers={"Content-Range": content_range})]
    fetch(server, path)
    assert server.ranges() == [f"bytes={HALF}-", None]


def test_the_bar_starts_where_the_file_stands(server, path, monkeypatch):
    bars, tqdm = [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **options: (bars.append(options), tqdm(**options))[1])
    begin(path)
    fetch(server, path)
    assert [(bar["initial"], bar["total"], bar["desc"]) for bar in bars] == [(HALF, N, "file")]


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
    assert set(names(path)) <= {"file"}
    assert len(server.requests) == n_requests


@pytest.mark.parametrize(("validator", "kept"), [
    ("ETag", f"{HALF:,} bytes are kept, and the same command goes on from there"), ("", "nothing is kept"),
])  # fmt: skip
def test_what_has_arrived_is_kept_if_it_can_go_on_and_the_error_says_so(server, path, waits, validator, kept):
    server.validator, server.answers = validator, [CUT, *[Answer(status=503)] * 6]
    with pytest.raises(OSError, match=rf"503.*; {kept}"):
        fetch(server, path)
    assert names(path) == (["file.part", "file.part.json"] if validator else [])
    fetch(server, path)
    assert server.ranges()[-1] == (f"bytes={HALF}-" if validator else None)


def test_no_server_is_an_error_with_the_url(path, waits):
    url = "http://127.0.0.1:9/124M/hparams.json"
    with pytest.raises(OSError, match=f"{url}.*refused"):
        download(url, path)
    assert len(waits) == RETRY.total


@pytest.mark.parametrize("url", ["file:///etc/passwd", "nonsense", "http://"])
def test_a_mirror_that_is_no_address_is_refused_at_once(path, waits, url):
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
def test_a_redirect_to_no_address_is_refused_and_what_is_there_is_kept(server, path, waits, location):
    begin(path)
    server.answers = [Answer(status=302, headers={"Location": location})] * 6
    with pytest.raises(OSError, match=rf"file: (?!.*twice).*{HALF:,} bytes are kept"):
        fetch(server, path)


def test_neither_passwords_nor_terminal_escapes_are_printed(server, path, waits, capsys):
    url = server.url.replace("//", "//user:s3cret@") + "/file"
    server.answers = [Answer(body=OTHER, headers=md5_header(BODY)), Answer(status=404, reason="\x1b[31mred\x07")]
    with pytest.raises(OSError, match="404") as raised:
        download(url, path)
    shown = str(raised.value) + capsys.readouterr().err.strip()
    assert "s3cret" not in shown
    assert shown.isprintable()


def test_a_process_without_standard_error_downloads_too(server, path, waits, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    server.answers = [Answer(status=503, headers={"Retry-After": "1"})]
    fetch(server, path, None)


def test_what_the_check_refuses_is_removed_and_fetched_once_more(server, path, capsys):
    server.answers = [Answer(body=OTHER)]
    seen = []

    def check(part):
        seen.append(part.read_bytes())
        if part.read_bytes() != BODY:
            raise ValueError("it is the other one")

    download(f"{server.url}/file", path, N, check)
    assert (seen, path.read_bytes()) == ([OTHER, BODY], BODY)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{server.url}/file: it is the other one; it is removed, and downloaded once more" in line


def test_an_md5_that_was_announced_holds_for_the_whole_file_also_when_it_goes_on(server, path, waits):
    server.answers = [Answer(stop_after=HALF, headers=md5_header(OTHER)), Answer(), Answer(headers=md5_header(BODY))]
    fetch(server, path, None)
    assert server.ranges() == [None, f"bytes={HALF}-", None]
    server.answers = [Answer(headers={"Content-MD5": "??", "Content-Length": None})]
    fetch(server, path, None)
    assert server.answers == [] and len(server.requests) == 4, "an MD5 that makes no sense is no reason to refuse"


def test_waits_grow_and_differ(waits):
    def series():
        retry, waits[:] = RETRY, []
        for _ in range(RETRY.total):
            retry = wait(retry, None, "a fault")
        with pytest.raises(OSError, match="a fault"):
            wait(retry, None, "a fault")
        return list(waits)

    first, second = series(), series()
    assert first[0] == 0 and first[1:] != second[1:]
    assert all(2**n <= seconds <= 2**n + 1 for n, seconds in enumerate(first[1:]))


@pytest.mark.parametrize(("retry_after", "seconds"), [
    ("7", 7), ("0", 0), ("soon", 0), ("Mon, 01 Jan 99999999999 00:00:00 GMT", 0), ("9" * 5000, 0), ("-1", 0),
])  # fmt: skip
def test_the_server_may_say_how_long(server, path, waits, monkeypatch, capsys, retry_after, seconds):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    server.answers = [Answer(status=503, headers={"Retry-After": retry_after})]
    fetch(server, path)
    assert waits == [seconds]
    assert ("503 Service Unavailable; trying again in 7 s" in capsys.readouterr().err) == (seconds == 7)


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

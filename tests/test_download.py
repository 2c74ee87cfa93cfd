import threading
from http.server import BaseHTTPRequestHandler

import pytest

from download import download
from helpers import serving

BODY = bytes(range(256)) * 10_000


@pytest.fixture
def server():
    """A server whose answer the test sets: status, headers and body."""

    class Handler(BaseHTTPRequestHandler):
        answer = (200, {"Content-Length": str(len(BODY))}, BODY)

        def do_GET(self):
            status, headers, body = Handler.answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        Handler.url = f"{url}/file"
        yield Handler


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "file"


@pytest.mark.parametrize("n_bytes", [None, len(BODY)])
@pytest.mark.parametrize("headers", [{"Content-Length": str(len(BODY))}, {}], ids=["announced", "not announced"])
def test_a_file_arrives_whole(server, path, headers, n_bytes):
    server.answer = (200, headers, BODY)
    download(server.url, path, n_bytes)
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("answer", "n_bytes", "complaint"),
    [
        ((404, {}, b"no"), None, "404"),
        ((500, {}, b"no"), None, "500"),
        ((200, {"Content-Length": str(len(BODY))}, BODY[:-1]), None, "2560000|1 more expected|IncompleteRead"),
        ((200, {}, BODY[:-1]), len(BODY), "ended after 2,559,999 of 2,560,000 bytes"),
        ((200, {}, BODY + b"x"), len(BODY), "ended after 2,560,001 of 2,560,000 bytes"),
        ((200, {"Content-Length": "10"}, BODY[:10]), len(BODY), "has 10 bytes, but .* 2,560,000"),
        ((200, {}, b""), len(BODY), "ended after 0"),
    ],
)
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_file_that_is_not_whole_never_appears(server, path, answer, n_bytes, complaint, before):
    server.answer = answer
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match=complaint) as raised:
        download(server.url, path, n_bytes)
    assert server.url in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (path.read_bytes() if path.exists() else None) == before
    assert {file.name for file in path.parent.iterdir()} <= {"file"}


def test_no_server_is_an_error_with_the_url(path):
    url = "http://127.0.0.1:9/124M/hparams.json"
    with pytest.raises(OSError, match=url):
        download(url, path)


def test_a_connection_that_stalls_is_given_up(server, path, monkeypatch):
    monkeypatch.setattr("download.TIMEOUT", (1, 0.2))
    server.answer = (200, {"Content-Length": str(len(BODY))}, BODY[:1000])
    over = threading.Event()
    monkeypatch.setattr(server, "finish", lambda self: over.wait(5))
    with pytest.raises(OSError, match=r"could not download .*timed out"):
        download(server.url, path)
    over.set()
    assert not path.exists()

"""A web server for the tests. It serves files correctly or, if told so, late, cut short, changed or not at all."""

import base64
import contextlib
import hashlib
import http.server
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from helpers.processes import serving


@dataclass
class Answer:
    """How one request is answered: correctly, unless a field says otherwise."""

    status: int = 0  # instead of the right status
    reason: str | None = None  # the words after the status
    headers: dict[str, str] = field(default_factory=dict)  # in addition to the usual ones; None leaves one out
    body: bytes | None = field(default=None, repr=False)  # instead of the file's bytes
    stop_after: int | None = None  # bytes of the body; then the connection is closed
    then: str = "close"  # or "stall", "reset", or "repeat" the body up to 256 MB
    ignore_range: bool = False
    ignore_condition: bool = False  # send the range even if the file has changed


@dataclass
class Server:
    """Answers requests for `files` with the next of `answers`, correctly if there is none; records the `requests`."""

    files: dict[str, bytes] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    validator: str = "ETag"  # or "weak", "Last-Modified" or "": what tells that a file has changed
    pause: float = 0.0  # seconds, in the middle of each answer
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def validators(self, body: bytes) -> dict[str, str]:
        digest = hashlib.md5(body).hexdigest()
        day = 1 + int(digest, 16) % 28  # a date that changes with the content
        date = {"Last-Modified": f"Mon, {day:02} Jan 2024 00:00:00 GMT"}
        return {"ETag": {"ETag": f'"{digest}"'}, "weak": {"ETag": f'W/"{digest}"'}, "": {}}.get(self.validator, date)


def make_handler(server: Server) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.requests.append((self.path, dict(self.headers)))
            answer = server.answers.pop(0) if server.answers else Answer()
            path = re.sub("^http://[^/]*", "", self.path)  # a request to a proxy
            body = server.files.get(path) if answer.body is None else answer.body
            if body is None:
                answer, body = Answer(status=404, headers=answer.headers), b"there is no such file"
            headers = server.validators(body)
            status, start = 200, 0
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            unchanged = answer.ignore_condition or self.headers.get("If-Range") in headers.values()
            if asked and unchanged and not answer.ignore_range:
                status, start = 206, int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                if start >= len(body):
                    status, headers["Content-Range"] = 416, f"bytes */{len(body)}"
            body = body[start:]
            headers |= {"Content-Length": str(len(body)), "Connection": "close"} | answer.headers
            self.send_response(answer.status or status, answer.reason)
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                body = body[: answer.stop_after]
                self.wfile.write(body[: len(body) // 2])
                server.over.wait(server.pause)
                self.wfile.write(body[len(body) // 2 :])
                for _ in range(2**28 // len(body) if answer.then == "repeat" else 0):
                    self.wfile.write(body)
            self.close_connection = True
            if answer.then == "stall":
                server.over.wait(20)
            if answer.then == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        log_message = staticmethod(lambda *args: None)

        def finish(self):
            with contextlib.suppress(OSError, ValueError):  # the connection was reset
                super().finish()

    return Handler


@contextlib.contextmanager
def faulty_server() -> Iterator[Server]:
    server = Server()
    with serving(make_handler(server)) as server.url, contextlib.ExitStack() as stack:
        stack.callback(server.over.set)
        yield server


def md5_header(body: bytes) -> dict[str, str]:
    return {"Content-MD5": base64.b64encode(hashlib.md5(body).digest()).decode()}

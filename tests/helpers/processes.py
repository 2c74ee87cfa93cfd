"""Run the project's scripts as processes, send signals, drop permissions, and serve HTTP."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

from helpers.models import ROOT


@contextlib.contextmanager
def serving(handler: Callable) -> Iterator[str]:
    """Answer HTTP requests with `handler` while the block runs; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, and capture what it prints, as bytes."""
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, **{"stdin": subprocess.DEVNULL, **options})


def start(script: str, *arguments: str, **options) -> subprocess.Popen:
    """Start one of the project's scripts, to interrupt or kill it later. Its output goes into pipes."""
    if os.name == "posix":  # a shell's background jobs ignore Ctrl-C, and their children would inherit that
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run_code(code: str, *arguments: str, **options) -> str:
    """The output of Python code that runs in a new process and can import the project's modules. It must not fail."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **{"cwd": ROOT, **options}).stdout


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line that a process printed before it ended with status 1."""
    assert (result.returncode, result.stdout) == (1, b""), result
    (line,) = result.stderr.decode().splitlines()
    return line


def interrupt(process: subprocess.Popen, timeout: float = 20, sent: int = signal.SIGINT) -> tuple[bytes, bytes]:
    """Press Ctrl-C and return the rest of the output and of the errors. The process must end in time."""
    process.send_signal(sent)
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


def as_any_user() -> None:
    """For `preexec_fn`: make file permissions apply to root as they do to other users (on Linux)."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

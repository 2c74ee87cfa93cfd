"""A stand-in for Hugging Face's hub with one model, for huggingface_hub in a separate process."""

import json
import os
from http.server import BaseHTTPRequestHandler

from helpers.processes import run

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the `files` of owner/model, or answers everything with `status` and `code`; records the `requests`."""

    def __init__(self, directory):
        self.files, self.requests, self.status, self.code, self.url = {}, [], 0, "", ""
        drop = ("HF_", "HUGGING", "GPT2_", "XDG_", "TRANSFORMERS_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        self.env |= {"HF_HOME": str(directory / "hf"), "HF_HUB_DISABLE_XET": "1", "PYTHONIOENCODING": "utf-8"}
        self.env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def add(self, directory):
        self.files |= {path.name: path.read_bytes() for path in directory.iterdir()}

    def fetched(self):
        """The names of the files that were sent, in order."""
        paths = [path for command, path, _ in self.requests if command == "GET" and "/resolve/" in path]
        return [path.rpartition("/")[2] for path in paths]

    def run(self, *arguments, script="gpt2.py", model="owner/model", env=None, **options):
        arguments = (*(arguments or ("def", "--n_tokens_to_generate=5")), f"--model_size={model}")
        return run(script, *arguments, env=self.env | {"HF_ENDPOINT": self.url} | (env or {}), **options)


def make_handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0].replace("/resolve/main/", f"/resolve/{SHA}/")
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            api, place, file = "/api/models/owner/model", f"/owner/model/resolve/{SHA}", path.rpartition("/")[2]
            status, headers, body = 200, {}, b""
            if hub.status:
                status, headers = hub.status, {"X-Error-Code": hub.code} if hub.code else {}
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
                siblings = [{"rfilename": name} for name in hub.files]
                body = json.dumps({"id": "owner/model", "sha": SHA, "siblings": siblings, "private": False}).encode()
            elif path == f"{api}/tree/{SHA}":
                file = {"type": "file", "oid": SHA}
                body = json.dumps([{"path": name, "size": len(hub.files[name])} | file for name in hub.files]).encode()
            elif path == f"{place}/{file}" and file in hub.files:
                body = hub.files[file]
                headers = {"ETag": f'"{hash(body) & 2**64 - 1:040x}"', "X-Repo-Commit": SHA}
            else:
                status, headers = 404, {"X-Error-Code": "EntryNotFound"}
            self.send_response(status)
            for name, value in (headers | {"Content-Length": len(body)}).items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        log_message = staticmethod(lambda *args: None)

    return Handler

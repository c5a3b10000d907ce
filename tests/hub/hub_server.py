"""A server on this machine that speaks for the hub: the requests by which huggingface_hub finds and downloads a file."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories are the folders owner/name below `root`. requests: "METHOD path", in order. tokens: those that were sent."""

    def __init__(self, root: Path, private: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.private = root, private
        self.requests: list[str] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers HEAD and GET of /owner/name/resolve/main/path."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.append(self.headers.get("Authorization"))
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        path = self.server.root / repository / rest.partition("/")[2]
        if not (self.server.root / repository).is_dir() or (
            repository == self.server.private and not self.headers.get("Authorization")
        ):
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif not path.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": COMMIT})
        else:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            self._send(200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}, content, body=body)

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"", *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def running(root: Path, private: str = "") -> Iterator[Hub]:
    """A running hub of the repositories below `root`. private: the one that needs a token."""
    with Hub(root, private) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

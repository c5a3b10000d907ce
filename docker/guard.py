"""Watches the server of this container: guard.py PID FOLDER, with the id of tritonserver's process and the entrypoint's state.

It answers GET /ready and GET /live on HEALTH_PORT (200 or 503), for Docker, Kubernetes and a proxy. `ready` ends when the entrypoint
begins to stop the server, while Triton itself says that it is ready until its very end.

When the process of a Python model has died, Triton goes on saying that the model is ready, fails every call of it and never starts it
again. The guard then ends the server, so that Docker or Kubernetes starts a new one: first it lets the other requests end, for a few
seconds, and refuses new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import os
import signal
import sys
import threading
import time
from pathlib import Path

import health

LEAVING, DRAIN = "leaving", "drain"  # files in the entrypoint's state folder: the server is about to stop, takes no new work
_LOOK_S = 1.0
_LAST_WORK_S = 10.0
_STUB = "triton_python_b"  # the kernel keeps 15 letters of a process' name, also of one that has died


def dead_stubs(server: int, proc: Path = Path("/proc")) -> list[int]:
    """The processes of Python models that have died below the process `server`, which has not noticed."""
    found = []
    for path in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name == _STUB and state == "Z" and int(parent) == server:
                found.append(int(path.parent.name))
    return found


class Guard:
    """What is known of the server. `folder` holds the files that tell how far its stop is."""

    def __init__(self, server: int, folder: Path) -> None:
        self._server, self._folder = server, folder

    @property
    def leaving(self) -> bool:
        return (self._folder / LEAVING).exists()

    def says(self, what: str) -> bool:
        """Whether the server is `ready` or `live`."""
        if what == "ready" and self.leaving:
            return False
        return (self.leaving or not dead_stubs(self._server)) and health.triton(what)

    def watch(self) -> None:
        """Returns when the server has ended, or when it is about to stop by itself. Ends a server whose model has died."""
        while not health.triton("ready"):
            if not self._sleeps():
                return
        while not (dead := dead_stubs(self._server)):
            if not self._sleeps():
                return
        if self.leaving:
            return
        log("E", f"the process of a model has died (process {dead[0]}), so the server ends and must be started again")
        (self._folder / DRAIN).touch()
        end = time.monotonic() + _LAST_WORK_S
        while time.monotonic() < end and health.main("idle") != 0:
            time.sleep(_LOOK_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._server, signal.SIGKILL)  # SIGTERM would wait for the requests that the dead process never answers

    def _sleeps(self) -> bool:
        """Waits for the next look; whether there is still something to watch."""
        if self.leaving or not Path(f"/proc/{self._server}").exists():
            return False
        time.sleep(_LOOK_S)
        return True


def log(level: str, text: str) -> None:
    """Writes a line in the form of the server's own log lines."""
    now = datetime.datetime.now(datetime.timezone.utc)
    sys.stdout.write(f"{level}{now:%m%d %H:%M:%S.%f} {os.getpid()} guard.py:1] {text}\n")
    sys.stdout.flush()


def handler(guard: Guard) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            what = self.path.strip("/")
            known = what in ("ready", "live")
            self.send_response(404 if not known else 200 if guard.says(what) else 503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main(server: int, folder: Path) -> None:
    guard = Guard(server, folder)
    address = os.environ.get("HEALTH_ADDRESS", "") or os.environ.get("BIND_ADDRESS", "") or "0.0.0.0"
    with http.server.ThreadingHTTPServer((address, int(os.environ.get("HEALTH_PORT", "8003"))), handler(guard)) as answers:
        answers.daemon_threads = True
        threading.Thread(target=answers.serve_forever, daemon=True).start()
        guard.watch()
        while Path(f"/proc/{server}").exists():  # while the server stops, /live and /ready are still asked
            time.sleep(_LOOK_S)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGINT):  # the guard ends with the server
        signal.signal(each, signal.SIG_IGN)
    main(int(sys.argv[1]), Path(sys.argv[2]))

"""`make web`: the embedded server on a model repository and the gateway before it, in one terminal. Ctrl-C ends both."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .gateway import Gateway
from .serving import log, serve
from .settings import Settings

_STOP_S = 60.0


@contextlib.contextmanager
def embedded(repository: Path) -> Iterator[str]:
    """The gRPC address of an embedded server, which needs the extra `embedded`. Raises SystemExit where it does not start."""
    command = [
        sys.executable,
        "-m",
        "hunyuan3d_export",
        "serve",
        "--repository",
        str(repository),
        "--grpc-port",
        "0",
        "--no-log",
    ]
    # A session of its own, because Ctrl-C must reach the gateway alone: its jobs end before their server does.
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        ready = next((line for line in server.stdout if line.startswith("{")), None)
        if ready is None:
            raise SystemExit(server.wait() or 1)  # it has said why
        yield str(json.loads(ready)["grpc"])
    finally:
        server.terminate()
        server.wait(timeout=_STOP_S)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="model repository with deployed artifacts")
    parser.add_argument("--port", type=int, default=Settings.port, help="of the page and the interfaces; 0 takes a free one")
    parser.add_argument("--data", type=Path, default=Path("build") / "web-data", help="folder of the gateway's files")
    given = parser.parse_args()
    log()
    with embedded(given.repository) as address:
        serve(Gateway(Settings(servers=address, port=given.port, data=given.data, drain_s=3.0)))


if __name__ == "__main__":
    main()

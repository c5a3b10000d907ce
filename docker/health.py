"""Exits with 0 when the server in this container is `ready` (the default), `live`, or `idle` (no sample or decode runs or waits).

`ready` and `live` are the guard's answers (guard.py), which knows more than Triton: a model whose process has died, and a stop
that has begun.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4
WORK = re.compile(r"^hunyuan3d_(?:(?:active|queued)_samples|mesh_(?:active|queued)_decodes)(?:\{.*\})? (\S+)$", re.MULTILINE)
_PORTS = {"ready": ("HEALTH_PORT", "8003"), "live": ("HEALTH_PORT", "8003"), "metrics": ("METRICS_PORT", "8002")}


def main(what: str = "ready") -> int:
    try:
        if what == "idle":
            counts = [float(count) for count in WORK.findall(_get("metrics"))]
            return 0 if sum(counts) == 0 else 1
        _get(what)
    except (urllib.error.URLError, OSError):
        return 1
    return 0


def triton(what: str) -> bool:
    """Whether Triton itself says that it is `ready` or `live`."""
    try:
        _get(f"v2/health/{what}")
    except (urllib.error.URLError, OSError):
        return False
    return True


def _get(path: str) -> str:
    variable, default = _PORTS.get(path, ("HTTP_PORT", "8000"))
    address = f"{host(path)}:{os.environ.get(variable, default)}"
    with urllib.request.urlopen(f"http://{address}/{path}", timeout=TIMEOUT_S) as response:
        return str(response.read().decode())


def host(path: str) -> str:
    """The host to ask for `path`, by the same settings from which the entrypoint derives the listening addresses."""
    bind = os.environ.get("BIND_ADDRESS", "")
    http = os.environ.get("HTTP_ADDRESS", "") or ("127.0.0.1" if os.environ.get("TLS_CERT_FILE") else bind)
    address = {
        "metrics": os.environ.get("METRICS_ADDRESS", "") or bind,
        "ready": os.environ.get("HEALTH_ADDRESS", "") or bind,
        "live": os.environ.get("HEALTH_ADDRESS", "") or bind,
    }.get(path, http)
    return "127.0.0.1" if address in ("", "0.0.0.0") else address


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

"""A gateway in a process of its own, whose meshes take a while and need no server. It writes down what it begins and makes.

python gateway_process.py LOG SECONDS NAME=VALUE...     the names are those of Settings
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gateway_doubles import FakeServers, mesh_of

from hunyuan3d_client import Mesh
from hunyuan3d_gateway.gateway import Gateway
from hunyuan3d_gateway.jobs import Job
from hunyuan3d_gateway.serving import log, serve
from hunyuan3d_gateway.settings import Settings


class SlowMaker:
    """Makes boxes in some seconds. Lines of the log: what happened, the job, its attempt, the process, the time."""

    def __init__(self, log: Path, seconds: float) -> None:
        self._log, self._seconds = log, seconds

    async def make(self, job: Job, pictures: Sequence[bytes]) -> Mesh:
        assert len(pictures) == job.pictures
        self._write("begun", job)
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self._write("stopped", job)
            raise
        self._write("made", job)
        return mesh_of(int(job.options["seed"]))

    def _write(self, what: str, job: Job) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps([what, job.id, job.attempts, os.getpid(), time.time()]) + "\n")


def main() -> None:
    path, seconds, *given = sys.argv[1:]
    settings: dict[str, Any] = {name: json.loads(value) for name, value in (each.split("=", 1) for each in given)}
    settings["data"] = Path(settings["data"])
    log()
    serve(Gateway(Settings(**settings, port=0), maker=SlowMaker(Path(path), float(seconds)), servers=FakeServers()))


if __name__ == "__main__":
    main()

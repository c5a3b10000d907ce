"""docker/entrypoint.sh run for real, over the wheel's tritonserver laid out like the official image's."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 120.0


class Container:
    """The entrypoint's process; `log` collects what it prints."""

    def __init__(self, script: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        names = ("GRPC_PORT", "HTTP_PORT", "METRICS_PORT", "HEALTH_PORT")
        self.ports = {name: int(environment[name]) if name in environment else free_port() for name in names}
        variables = {**os.environ, **{name: str(port) for name, port in self.ports.items()}, **environment}
        self.process = subprocess.Popen(
            [str(script), *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # stop() kills the whole process group, as stopping a container does
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        host = environment.get("BIND_ADDRESS", "127.0.0.1")
        self.grpc, self.http, self.metrics, self.health = (f"{host}:{port}" for port in self.ports.values())

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip())

    def wait_ready(self) -> None:
        """Waits until the server is ready and serves its metrics, whose port Triton opens last."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if answers(f"{self.http}/v2/health/ready") and answers(f"{self.metrics}/metrics"):
                return
            time.sleep(0.1)
        pytest.fail("not ready:\n" + "\n".join(self.log[-80:]))

    def wait(self) -> int:
        code = self.process.wait(WAIT_S)
        self._reader.join(10)
        return code

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT_S)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def triton_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hunyuan3d_export.server.wheel import lay_out

    home = tmp_path_factory.mktemp("triton")
    lay_out(home)
    return home


@pytest.fixture(scope="session")
def repository(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hunyuan3d_export.repository_from_artifacts import deploy

    repository = tmp_path_factory.mktemp("container") / "models"
    deploy(artifacts(), repository)
    return repository


@pytest.fixture(scope="session")
def settings(triton_home: Path, repository: Path) -> dict[str, str]:
    """The environment of a container that serves ONNX graphs on this host."""
    return {
        "TRITON_HOME": str(triton_home),
        "MODEL_REPOSITORY": str(repository),
        "CONFIG": "cpu",
        "BIND_ADDRESS": "127.0.0.1",
        "EXIT_TIMEOUT_S": "60",
    }


@pytest.fixture(scope="session")
def image(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/opt/hunyuan3d of the CPU image: the files that its Dockerfile copies there."""
    folder = tmp_path_factory.mktemp("opt")
    text = (root / "docker" / "cpu.Dockerfile").read_text().replace("\\\n", "")
    copies = re.findall(r"^COPY (.*) /opt/hunyuan3d/$", text, re.MULTILINE)
    for source in " ".join(copies).split():
        shutil.copy2(root / source, folder)
    return folder


@pytest.fixture(scope="session")
def run(image: Path, settings: dict[str, str]) -> Callable[..., Any]:
    """run(*arguments of tritonserver, **environment): a context manager of a started Container; not yet ready."""

    @contextlib.contextmanager
    def start(*arguments: str, **environment: str) -> Iterator[Container]:
        container = Container(image / "entrypoint.sh", arguments, {**settings, **environment})
        try:
            yield container
        finally:
            container.stop()

    return start

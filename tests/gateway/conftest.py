"""Gateways without a server, on SQLite and on PostgreSQL."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent))

from gateway_doubles import FakeMaker, FakeServers

from hunyuan3d_gateway.app import create_app
from hunyuan3d_gateway.gateway import Gateway
from hunyuan3d_gateway.settings import Settings


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of its own, on a socket in a folder of these tests: the start of its URLs, without a database."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("postgres")
    user = "nobody" if os.getuid() == 0 else getpass.getuser()  # PostgreSQL does not run as root
    if os.getuid() == 0:
        for parent in (folder, *itertools.takewhile(lambda parent: parent != Path(tempfile.gettempdir()), folder.parents)):
            parent.chmod(0o755)
        shutil.chown(folder, user)
    other: dict[str, Any] = {"user": user, "cwd": "/"} if os.getuid() == 0 else {"cwd": "/"}
    subprocess.run(
        [programs / "initdb", "-D", folder / "data", "-U", "tests", "-A", "trust", "-N"],
        check=True, capture_output=True, timeout=120, **other,
    )  # fmt: skip
    settings = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off -c max_connections=200"
    server = subprocess.Popen(
        [programs / "postgres", "-D", folder / "data", *settings.split()],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **other,
    )  # fmt: skip
    try:
        ask = [programs / "pg_isready", "-q", "-t", "60", "-h", folder]
        while subprocess.run(ask, check=False, timeout=120).returncode != 0:
            assert server.poll() is None, "PostgreSQL must stay up"
        yield f"postgresql://tests@/{{}}?host={folder}"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite3'}"
    return new_database(request.getfixturevalue("postgres"))


def new_database(server: str) -> str:
    """A new database in PostgreSQL: its URL."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server.format("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.format(name)


class Running:
    """A gateway in this process with a maker of the test's, and a caller."""

    def __init__(self, gateway: Gateway, maker: FakeMaker, servers: FakeServers, http: TestClient) -> None:
        self.gateway, self.maker, self.servers, self.http = gateway, maker, servers, http

    def close_gate(self) -> None:
        assert self.http.portal is not None
        self.http.portal.call(self._set, False)

    def open_gate(self) -> None:
        assert self.http.portal is not None
        self.http.portal.call(self._set, True)

    async def _set(self, opened: bool) -> None:
        (self.maker.gate.set if opened else self.maker.gate.clear)()


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(**settings): a running gateway."""
    with contextlib.ExitStack() as stack:

        def begin(*, base_url: str = "http://localhost", **settings: Any) -> Running:
            maker, servers = FakeMaker(), FakeServers()
            given = {"data": tmp_path / "data", "drain_s": 0.0, "lease_s": 2.0, "running": 2, **settings}
            gateway = Gateway(Settings(**given), maker=maker, servers=servers)
            maker.board = gateway.board
            http = TestClient(create_app(gateway), base_url=base_url, raise_server_exceptions=False)
            stack.enter_context(http)
            return Running(gateway, maker, servers, http)

        yield begin


@pytest.fixture
def running(start: Start) -> Running:
    """A running gateway with the usual settings."""
    return start()


@pytest.fixture(scope="session")
def endpoints(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of the preset shapes with an image encoder of random weights and a decoder that is a formula."""
    from points_decoder import write

    from hunyuan3d_export.conditioner.weights import ConditionerSource
    from hunyuan3d_export.dit.weights import Weights
    from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
    from hunyuan3d_export.repository_from_artifacts import deploy
    from hunyuan3d_export.server.embedded import EmbeddedServer
    from hunyuan3d_export.shapevae import PRESETS
    from hunyuan3d_export.shapevae.weights import ShapeVAESource

    cache, repository = root / "build" / "test", tmp_path_factory.mktemp("gateway") / "repository"
    export_onnx(Weights(preset="shapes"), cache / "shapes-fp32", options=OnnxOptions(precision="fp32"))
    export_onnx(ConditionerSource(), cache / "conditioner-fp32-op")
    export_onnx(ShapeVAESource(preset="tiny", seed=5), cache / "vae-tiny-fp32-op")
    for name in ("shapes-fp32", "conditioner-fp32-op", "vae-tiny-fp32-op"):
        deploy(cache / name, repository)
    write(repository, PRESETS["tiny"].config.geo_heads)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints

"""The settings of a gateway: names, defaults and texts stand here once, for the command line and for tests."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path
from typing import Any

from hunyuan3d_client.errors import invalid

MIB = 2**20
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def setting(default: Any, text: str) -> Any:
    """A field of Settings with its explanation."""
    return dataclasses.field(default=default, metadata={"text": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Times in seconds, sizes in bytes unless a name says otherwise. Raises InvalidInput for values that contradict each other."""

    servers: str = setting("localhost:8001", "gRPC address HOST:PORT of the server, or of several with commas between.")
    host: str = setting("127.0.0.1", "Address to listen at; 0.0.0.0 for all.")
    port: int = setting(8081, "Port of the page and of all interfaces; 0 takes a free one.")
    data: Path = setting(Path("hunyuan3d-gateway-data"), "Folder of pictures and meshes, and of the SQLite database.")
    database: str = setting(
        "", "URL of the database, postgresql://... for several gateways; left out: SQLite in the data folder."
    )
    running: int = setting(0, "Jobs that this gateway runs at a time; 0: two batches of each server's sampler.")
    attempts: int = setting(3, "Times that a job is begun at most, if gateways die while they run it.")
    lease_s: float = setting(15.0, "Time without a sign after which another gateway takes a running job over.")
    job_timeout_s: float = setting(1800.0, "Time limit of one job's work.")
    server_wait_s: float = setting(60.0, "How long a job waits for a server that is overloaded, gone or loading.")
    drain_s: float = setting(20.0, "How long running jobs may go on after SIGTERM; the others go back into the queue.")
    max_queued: int = setting(256, "Jobs that wait, in all.")
    max_queued_per_caller: int = setting(64, "Jobs that wait for one caller.")
    max_body_bytes: int = setting(48 * MIB, "Largest body of a request.")
    body_timeout_s: float = setting(120.0, "Time in which a request's whole body must arrive.")
    max_pixels: int = setting(40_000_000, "Most pixels of a picture.")
    max_resolution: int = setting(512, "Largest resolution of a mesh that a caller may ask for.")
    max_steps: int = setting(200, "Most steps that a caller may ask for.")
    store_bytes: int = setting(4096 * MIB, "Size of all pictures and meshes; the oldest results go when more is needed.")
    keep_s: float = setting(24 * 3600.0, "How long a finished job and its files are kept.")
    previews: int = setting(8, "Previews of a growing mesh for each job; 0: none.")
    preview_resolution: int = setting(32, "Resolution at which previews are decoded.")
    require_key: bool = setting(False, "Refuse callers without a key. Keys are always asked for once one exists.")
    allow_url_host: tuple[str, ...] = setting(
        (), "Host from which pictures may be fetched by `url`; repeatable. None: no fetching."
    )
    allow_url_network: tuple[str, ...] = setting(
        (), "Private network, as 10.0.0.0/8, in which allowed hosts may be; repeatable."
    )
    cors_origin: tuple[str, ...] = setting((), "Origin whose pages may call the interfaces; repeatable.")
    allowed_host: tuple[str, ...] = setting((), "Name by which callers reach this gateway; repeatable. Others are refused.")
    trusted_proxy: tuple[str, ...] = setting((), "Address of a proxy whose X-Forwarded-For is believed; repeatable.")

    def __post_init__(self) -> None:
        least = {"attempts": 1, "lease_s": 1, "max_queued": 1, "max_queued_per_caller": 1, "max_pixels": 1, "max_steps": 1}
        least |= {"running": 0, "previews": 0, "max_body_bytes": 1024, "keep_s": 1, "store_bytes": MIB, "port": 0}
        least |= {"max_resolution": 8, "preview_resolution": 8, "job_timeout_s": 1, "body_timeout_s": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise invalid(f"--{name.replace('_', '-')}", f"at least {smallest}", getattr(self, name), "leave it out")
        for network in self.allow_url_network:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise invalid("--allow-url-network", "a network such as 10.0.0.0/8", network, str(error)) from error

    @property
    def database_url(self) -> str:
        """The URL for SQLAlchemy."""
        if not self.database:
            return f"sqlite:///{(self.data / 'jobs.sqlite3').resolve()}"
        scheme, separator, rest = self.database.partition("://")
        driver = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}.get(scheme, scheme)
        if not separator or driver not in ("postgresql+psycopg", "sqlite"):
            raise invalid("--database", "sqlite:///FILE or postgresql://USER@HOST/NAME", scheme, "leave it out for SQLite")
        return f"{driver}://{rest}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The values of the header Host that are answered; empty: all.

        A gateway that listens on this machine alone answers to its own names alone, so that a page of another site cannot
        reach it through a name of that site (DNS rebinding).
        """
        if self.allowed_host:
            return self.allowed_host
        return ("127.0.0.1", "localhost", "[::1]") if self.host in _LOOPBACK else ()

"""The connection that the environment or the command line describes: addresses, TLS, headers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import grpc

from .dns_transport import transport_to
from .errors import invalid
from .round_robin import RoundRobin
from .transport import Transport

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """How to reach the servers. Raises InvalidInput for headers of another form and for half of a client's certificate."""

    url: str = DEFAULT_URL
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    headers: tuple[str, ...] = ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Connection:
        """The connection of the variables HUNYUAN3D_*."""
        found = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
        tls = found.get("HUNYUAN3D_TLS", "0").lower()
        if tls not in ("0", "1", "true", "false"):
            raise invalid("HUNYUAN3D_TLS", "1 or 0", repr(tls), "HUNYUAN3D_TLS=1 turns TLS on")
        files = {
            name: Path(found[v]) if (v := f"HUNYUAN3D_{name.upper()}") in found else None for name in ("ca", "cert", "key")
        }
        lines = tuple(line for line in found.get("HUNYUAN3D_HEADER", "").splitlines() if line.strip())
        return cls(url=found.get("HUNYUAN3D_URL", DEFAULT_URL), tls=tls in ("1", "true"), headers=lines, **files)

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise invalid("cert and key", "given together", "one of them", "mutual TLS needs the certificate and its key")
        for header in self.headers:
            name, separator, value = header.partition(": ")
            if not (name and separator and value):
                raise invalid(
                    "--header and HUNYUAN3D_HEADER", "'name: value'", "another form", "such as 'authorization: Bearer TOKEN'"
                )

    def transport(self) -> Transport:
        """A transport to the server, or to all servers. Raises InvalidInput, OSError for a file that cannot be read."""
        parts = (self.ca, self.key, self.cert)  # in the order of grpc.ssl_channel_credentials
        files = [None if path is None else path.read_bytes() for path in parts]
        credentials = grpc.ssl_channel_credentials(*files) if self.tls or any(files) else None
        headers = {name.lower(): value for name, _, value in (header.partition(": ") for header in self.headers)}
        urls = [each.strip() for each in self.url.split(",")]
        transports = [transport_to(each, credentials=credentials, headers=headers) for each in urls]
        return transports[0] if len(transports) == 1 else RoundRobin(transports)


def timeout_s_from_env() -> float:
    """The timeout of the variable HUNYUAN3D_TIMEOUT_S, or the default. Raises InvalidInput."""
    text = os.environ.get("HUNYUAN3D_TIMEOUT_S") or str(DEFAULT_TIMEOUT_S)
    try:
        return float(text)
    except ValueError:
        raise invalid("HUNYUAN3D_TIMEOUT_S", "a number of seconds", repr(text), "HUNYUAN3D_TIMEOUT_S=300") from None

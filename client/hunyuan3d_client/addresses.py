"""Addresses of servers, checked before gRPC sees them: gRPC would take a wrong address for a host name, and would fail only when a call is made."""

from __future__ import annotations

import ipaddress
import re

from .errors import invalid

_FORM = "HOST:PORT, such as localhost:8001, or dns:///NAME:PORT, or unix:PATH"
_OF_GRPC = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s\[\]:/,@]+):(?P<port>\d{1,5})")


def checked(url: str) -> str:
    """`url`, if gRPC can connect to it. Raises InvalidInput with the right form."""
    if not isinstance(url, str):
        raise invalid("url", _FORM, repr(url), "an address is text; for several servers give a list of them")
    if "," in url and not url.startswith(("ipv4:", "ipv6:")):
        each = ", ".join(repr(part.strip()) for part in url.split(","))
        raise invalid("url", _FORM, repr(url), f"give several servers as a list: Client([{each}])")
    if "://" in url and not url.startswith(_OF_GRPC):
        scheme, _, rest = url.partition("://")
        hint = "TLS is GrpcTransport(credentials=...)" if scheme in ("https", "grpcs") else "gRPC addresses have no scheme"
        raise invalid("url", _FORM, repr(url), f"{hint}; write {rest.partition('/')[0] or 'localhost:8001'}")
    name = url.rpartition("/")[2] if url.startswith("dns:") else url
    if url.startswith("dns:"):
        name = name.removeprefix("dns:")
    elif url.startswith(_OF_GRPC):
        if url.partition(":")[2].strip("/"):
            return url
        raise invalid("url", _FORM, repr(url), "the address ends after its scheme")
    found = _HOST_AND_PORT.fullmatch(name)
    if not found or not 0 < int(found["port"]) < 1 << 16:
        hint = f"add the port: {url}:8001" if re.fullmatch(r"[\w.-]+", url) else "Triton's gRPC port is 8001 unless set"
        raise invalid("url", _FORM, repr(url), hint)
    return url


def name_and_port(url: str) -> tuple[str, int] | None:
    """The name and the port of dns:///NAME:PORT or dns:NAME:PORT; None for other addresses, and for a dns: address with a server of its own."""
    rest = url.removeprefix("dns:///") if url.startswith("dns:///") else url.removeprefix("dns:")
    found = _HOST_AND_PORT.fullmatch(rest) if url.startswith("dns:") else None
    return (found["host"].strip("[]"), int(found["port"])) if found else None


def is_same_host(url: str) -> bool:
    """Whether `url` is a loopback address or a Unix socket. Names other than localhost are not looked up."""
    host = url.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or url.startswith("unix:") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

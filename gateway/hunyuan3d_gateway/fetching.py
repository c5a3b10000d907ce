"""Pictures by URL, for hosts that the operator allows. A URL can lead only to an allowed host, and only to a public address there.

The name is looked up once, every address is checked, and the connection goes to a checked address: a second look-up could give
another answer. Redirects are not followed.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import urlsplit

from .failures import Refused, refused

_TIMEOUT_S = 10.0
_PORTS = {"http": 80, "https": 443}
_HINT = "Send the picture itself."


def fetch(url: str, *, hosts: Sequence[str], networks: Sequence[str] = (), max_bytes: int) -> bytes:
    """What a URL holds. networks: private networks in which allowed hosts may be. Blocking. Raises Refused."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise refused(422, "bad_url", "The url cannot be read.", _HINT) from error
    if not hosts:
        raise refused(422, "urls_are_off", "This gateway does not fetch pictures by url.", _HINT)
    if parts.scheme not in _PORTS or host.lower() not in {each.lower() for each in hosts} or parts.username is not None:
        raise refused(422, "url_not_allowed", "This gateway may not fetch pictures from there.", _HINT)
    address = _address(host, port, networks)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        return _get(parts.scheme, (host, port), address, path, max_bytes)
    except Refused:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise refused(422, "url_failed", f"The picture could not be fetched: {type(error).__name__}.", _HINT) from error


def _address(host: str, port: int, networks: Sequence[str]) -> str:
    """An address of the host. Raises Refused if any of its addresses is not public, nor in one of the networks."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise refused(422, "url_failed", "The host of the url has no address.", _HINT) from error
    for each in found:
        address = ipaddress.ip_address(str(each).partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address
        allowed = any(mapped in ipaddress.ip_network(network) for network in networks)
        if not allowed and (not mapped.is_global or mapped.is_multicast):
            raise refused(422, "url_not_allowed", "This gateway may not fetch pictures from there.", _HINT)
    return str(found[0])


def _get(scheme: str, host: tuple[str, int], address: str, path: str, max_bytes: int) -> bytes:
    name, port = host
    connection = http.client.HTTPConnection(name, port, timeout=_TIMEOUT_S)
    plain = socket.create_connection((address, port), _TIMEOUT_S)
    try:
        secure = scheme == "https"
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=name) if secure else plain
        connection.request(
            "GET",
            path,
            headers={"Accept": "image/png,image/jpeg,image/webp", "Host": name if port in (80, 443) else f"{name}:{port}"},
        )
        with contextlib.closing(connection.getresponse()) as answer:
            if answer.status != 200:
                raise refused(422, "url_failed", f"The picture could not be fetched: status {answer.status}.", _HINT)
            data = answer.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise refused(413, "too_large", f"The picture at the url is larger than {max_bytes} bytes.", _HINT)
        return data
    finally:
        connection.close()
        plain.close()

"""Addresses: those that gRPC can connect to pass; all others are refused with the right form, before any call."""

from __future__ import annotations

from typing import Any

import pytest

import hunyuan3d_client as h
from hunyuan3d_client.addresses import checked

GOOD = (
    "localhost:8001",
    "10.0.0.1:1",
    "[::1]:8001",
    "gpu-7.example:65535",
    "dns:///shapes.internal:8001",
    "dns:shapes.internal:8001",
    "dns://8.8.8.8/shapes.internal:8001",
    "unix:/run/triton.sock",
    "unix:///run/triton.sock",
    "ipv4:10.0.0.1:8001,10.0.0.2:8001",
)
BAD: dict[Any, str] = {
    "": "Triton's gRPC port is 8001",
    "localhost": "add the port: localhost:8001",
    "gpu-7.example": "add the port: gpu-7.example:8001",
    "http://localhost:8000": "gRPC addresses have no scheme; write localhost:8000",
    "https://host:443/path": "TLS is GrpcTransport(credentials=...); write host:443",
    "http://": "write localhost:8001",
    "a:1,b:1": "Client(['a:1', 'b:1'])",
    "a:1, b:1": "Client(['a:1', 'b:1'])",
    "localhost:": "8001",
    "localhost:port": "8001",
    "localhost:0": "8001",
    "localhost:65536": "8001",
    ":8001": "8001",
    " localhost:8001": "8001",
    "localhost:8001/": "8001",
    "::1:8001": "8001",
    "dns:///shapes.internal": "8001",
    "unix:": "ends after its scheme",
    7: "an address is text",
    None: "an address is text",
}


@pytest.mark.parametrize("url", GOOD)
def test_addresses_that_grpc_takes(url: str) -> None:
    assert checked(url) == url
    h.GrpcTransport(url)


@pytest.mark.parametrize("url", BAD, ids=str)
def test_other_addresses_are_refused_with_the_right_form(url: Any) -> None:
    with pytest.raises(h.InvalidInput, match=r"^url must be HOST:PORT, such as localhost:8001, ") as error:
        h.GrpcTransport(url)
    assert BAD[url] in str(error.value) and "\nhint: " in str(error.value)


def test_a_client_checks_its_addresses() -> None:
    for url in ("localhost", ["localhost:8001", "b"]):
        with pytest.raises(h.InvalidInput, match="url must be"):
            h.Client(url)

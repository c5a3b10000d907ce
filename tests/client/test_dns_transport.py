"""The servers behind a name: the tests choose its addresses, and transports whose failures they choose stand for the servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import dns_transport, round_robin
from hunyuan3d_client.addresses import name_and_port
from hunyuan3d_client.transport import Tensors

Tokens = Callable[..., np.ndarray]
LATENTS = np.ones((1, 3, 64), np.float32)
PORT = 8001


class Server(h.MockTransport):
    """A server at one address. `hold` keeps requests waiting while it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.hold: asyncio.Event | None = None

    async def infer(self, request: h.Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        if self.hold is not None:
            await self.hold.wait()
        async for answer in super().infer(request, timeout_s=timeout_s):
            yield answer

    async def close(self) -> None:
        self.closed = True


class Name:
    """shapes.internal: its addresses, and the servers at all addresses that were ever called."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.servers: dict[str, Server] = {}
        self.lookups = 0

    def getaddrinfo(self, host: str, port: int, *_: object, **__: object) -> list[tuple[Any, ...]]:
        assert host == "shapes.internal"
        self.lookups += 1
        if not self.addresses:
            raise socket.gaierror("no address")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in self.addresses]

    def connect(self, address: str) -> Server:
        return self.servers.setdefault(address.rpartition(":")[0], Server())

    def calls(self) -> dict[str, int]:
        return {address: len(server.requests) for address, server in self.servers.items()}


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Name:
    made = Name("10.0.0.1", "10.0.0.2")
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    monkeypatch.setattr(dns_transport.DnsTransport, "_connect", lambda _, address: made.connect(address))
    monkeypatch.setattr(round_robin, "_PAUSE_S", 0.01)
    return made


def run(body: Callable[[h.AsyncClient], Coroutine[Any, Any, None]], *, resolve_s: float = 0.0) -> None:
    async def main() -> None:
        transport = h.DnsTransport(f"dns:///shapes.internal:{PORT}", resolve_s=resolve_s)
        async with h.AsyncClient(transport=transport, retries=0) as client:
            await body(client)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_calls_take_turns_among_the_addresses(name: Name, tokens: Tokens) -> None:
    async def body(client: h.AsyncClient) -> None:
        for _ in range(8):
            await client.denoise(LATENTS, 0.5, tokens())

    run(body, resolve_s=60)
    assert name.lookups == 1 and sorted(name.calls().values()) == [4, 4]


def test_a_new_address_gets_work_and_a_gone_one_gets_none(name: Name, tokens: Tokens) -> None:
    async def body(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens())
        name.addresses = ("10.0.0.2", "10.0.0.3")
        async with asyncio.timeout(60):
            # A lookup that began before the change may still run beside the first call.
            while not name.servers["10.0.0.1"].closed:
                await client.denoise(LATENTS, 0.5, tokens())
            before = name.calls()
            while not name.calls().get("10.0.0.3"):
                await client.denoise(LATENTS, 0.5, tokens())
        assert name.calls()["10.0.0.1"] == before["10.0.0.1"]

    run(body)


def test_a_call_at_an_address_that_goes_ends_in_peace(name: Name, tokens: Tokens) -> None:
    async def body(client: h.AsyncClient) -> None:
        name.addresses = ("10.0.0.1",)
        await client.denoise(LATENTS, 0.5, tokens())
        first = name.servers["10.0.0.1"]
        first.hold = asyncio.Event()
        running = asyncio.create_task(client.denoise(LATENTS, 0.5, tokens()))
        name.addresses = ("10.0.0.2",)
        await asyncio.sleep(0.01)
        await client.health()
        await until(lambda: "10.0.0.2" in name.servers and len(client.transport.servers) == 1)
        assert not first.closed
        first.hold.set()
        assert (await running).shape == LATENTS.shape
        await until(lambda: first.closed)

    run(body)


def test_the_last_known_addresses_stay_while_the_name_has_none(name: Name, tokens: Tokens) -> None:
    async def body(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens())
        name.addresses = ()
        for _ in range(4):
            await client.denoise(LATENTS, 0.5, tokens())
            await asyncio.sleep(0.005)

    run(body)
    assert name.lookups > 1 and sum(name.calls().values()) == 5


def test_a_name_without_an_address_says_so_and_is_asked_again(name: Name, tokens: Tokens) -> None:
    async def body(client: h.AsyncClient) -> None:
        name.addresses = ()
        with pytest.raises(h.ServerUnavailable, match="shapes.internal must have an address, got none"):
            await client.denoise(LATENTS, 0.5, tokens())
        name.addresses = ("10.0.0.1",)
        await client.denoise(LATENTS, 0.5, tokens())

    run(body, resolve_s=60)


def test_a_server_out_of_reach_brings_the_next_lookup_forward(name: Name, tokens: Tokens) -> None:
    async def body(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens())
        transport = client.transport
        assert isinstance(transport, h.DnsTransport)
        transport._note(h.StatusError(grpc.StatusCode.UNAVAILABLE, "gone"))
        await asyncio.sleep(1.1)
        await client.denoise(LATENTS, 0.5, tokens())
        await until(lambda: name.lookups == 2)

    run(body, resolve_s=3600)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("dns:///shapes.internal:8001", ("shapes.internal", 8001)),
        ("dns:shapes.internal:8001", ("shapes.internal", 8001)),
        ("dns:///[::1]:8001", ("::1", 8001)),
        ("dns://8.8.8.8/shapes.internal:8001", None),
        ("shapes.internal:8001", None),
        ("unix:/run/server", None),
    ],
)
def test_the_name_in_an_address(url: str, found: tuple[str, int] | None) -> None:
    assert name_and_port(url) == found


def test_certificates_are_checked_for_the_name() -> None:
    plain, tls = (h.DnsTransport("dns:///shapes.internal:8001", credentials=c) for c in (None, grpc.ssl_channel_credentials()))
    assert plain._options == {"grpc.default_authority": "shapes.internal"}
    assert tls._options == {"grpc.ssl_target_name_override": "shapes.internal"}
    with pytest.raises(h.InvalidInput, match="url must be dns:///NAME:PORT"):
        h.DnsTransport("shapes.internal:8001")

"""Several servers behind one client, over transports whose failures the tests choose."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract, round_robin
from hunyuan3d_client.transport import Tensors

Tokens = Callable[..., np.ndarray]
LATENTS = np.ones((1, 3, 64), np.float32)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Server(h.MockTransport):
    """A server that can be down (nothing answers), draining (answers that it is not ready) or busy (a full queue)."""

    def __init__(self, state: str = "up") -> None:
        super().__init__()
        self.state = state
        self.status: grpc.StatusCode | None = UNAVAILABLE
        self.asked = 0

    async def infer(self, request: h.Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        if self.state != "up":
            self.requests.append(request)
            raise h.StatusError(self.status, self.state)
        async for answer in super().infer(request, timeout_s=timeout_s):
            yield answer

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        self.asked += 1
        if self.state == "down":
            raise h.StatusError(UNAVAILABLE, "down")
        return self.state != "draining" and await super().model_ready(name, timeout_s=timeout_s)

    async def model_info(self, name: str, *, timeout_s: float) -> h.ModelInfo:
        if self.state == "down":
            raise h.StatusError(UNAVAILABLE, "down")
        return await super().model_info(name, timeout_s=timeout_s)


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_robin, "_PAUSE_S", 0.01)
    monkeypatch.setattr("hunyuan3d_client.exchange._FIRST_PAUSE_S", 1e-3)


def run(servers: list[Server], body: Callable[[h.AsyncClient], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with h.AsyncClient(transport=h.RoundRobin(servers), **options) as client:
            await body(client)

    asyncio.run(main())


def counts(servers: list[Server]) -> list[int]:
    return [len(server.requests) for server in servers]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def test_calls_take_turns(tokens: Tokens) -> None:
    servers = [Server(), Server(), Server()]

    async def body(client: h.AsyncClient) -> None:
        await client.health()
        await until(lambda: all(server.asked for server in servers))
        for _ in range(6):
            await client.denoise(LATENTS, 0.5, tokens())
        await client.sample(tokens())

    run(servers, body)
    assert sorted(counts(servers)) == [2, 2, 3]


def test_a_server_that_is_down_from_the_start_gets_nothing(tokens: Tokens) -> None:
    servers = [Server("down"), Server()]

    async def body(client: h.AsyncClient) -> None:
        await asyncio.gather(*(client.denoise(LATENTS, 0.5, tokens()) for _ in range(20)))

    run(servers, body, retries=0)
    assert counts(servers) == [0, 20]


@pytest.mark.parametrize("state", ["down", "draining"])
def test_a_server_is_left_and_used_again(state: str, tokens: Tokens) -> None:
    servers = [Server(), Server()]

    async def body(client: h.AsyncClient) -> None:
        await asyncio.gather(*(client.denoise(LATENTS, 0.5, tokens()) for _ in range(4)))
        servers[0].state = state
        before = counts(servers)
        for _ in range(10):
            await client.denoise(LATENTS, 0.5, tokens())
        assert counts(servers)[0] <= before[0] + 1, "the call that found out, which went to the other then"
        assert counts(servers)[1] == before[1] + 10
        servers[0].state = "up"
        ready = servers[0].asked
        await until(lambda: servers[0].asked > ready)
        before = counts(servers)
        for _ in range(10):
            await client.denoise(LATENTS, 0.5, tokens())
        assert counts(servers) == [before[0] + 5, before[1] + 5]

    run(servers, body)


def test_a_full_queue_sends_the_call_to_the_other(tokens: Tokens) -> None:
    servers = [Server("busy"), Server()]

    async def body(client: h.AsyncClient) -> None:
        for _ in range(4):
            await client.denoise(LATENTS, 0.5, tokens())

    run(servers, body)
    assert counts(servers)[1] == 4


def test_the_failed_server_is_asked_why_and_not_its_neighbour(tokens: Tokens) -> None:
    servers = [Server(), Server()]

    async def body(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens())
        await until(lambda: all(server.asked for server in servers))
        for state, kind in {"down": h.ServerUnavailable, "draining": h.ModelNotReady, "busy": h.Overloaded}.items():
            for server in servers:
                server.state = "up"
            await until(lambda: len(client.transport._up) == 2)
            await client.model_info(contract.DIT)  # fetched here, so that the next call sends only its request
            client.transport._up[0].state = state
            with pytest.raises(kind) as error:
                await client.denoise(LATENTS, 0.5, tokens())
            assert type(error.value) is kind and error.value.status is UNAVAILABLE

    run(servers, body, retries=0)


def test_a_server_that_ends_without_a_status_is_left(tokens: Tokens) -> None:
    """A Triton that exits ends a stream with a message but without a status."""
    servers = [Server(), Server()]

    async def body(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens())
        await until(lambda: len(client.transport._up) == 2)
        servers[0].state, servers[0].status = "draining", None
        for _ in range(6):
            await client.denoise(LATENTS, 0.5, tokens())
        assert client.transport._up == deque([servers[1]])

    run(servers, body)
    assert counts(servers)[0] <= 2, "one from before, one that found out"


def test_a_server_that_refuses_is_passed_over_for_a_while(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says that it is ready although it refuses."""
    monkeypatch.setattr(round_robin, "_PAUSE_S", 60.0)
    servers = [Server(), Server()]

    async def body(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens())
        await until(lambda: len(client.transport._up) == 2)
        servers[0].state = "busy"
        await asyncio.gather(*(client.denoise(LATENTS, 0.5, tokens()) for _ in range(20)))
        before = counts(servers)[0]
        await asyncio.gather(*(client.denoise(LATENTS, 0.5, tokens()) for _ in range(20)))
        assert counts(servers)[0] == before

    run(servers, body)


def test_all_servers_down(tokens: Tokens) -> None:
    servers = [Server("down"), Server("down")]

    async def body(client: h.AsyncClient) -> None:
        with pytest.raises(h.ServerUnavailable):
            await client.denoise(LATENTS, 0.5, tokens())
        servers[1].state = "up"
        await until(lambda: bool(client.transport._up))
        await client.denoise(LATENTS, 0.5, tokens())

    run(servers, body, retries=0)


def test_a_model_that_no_server_has(tokens: Tokens) -> None:
    servers = [Server(), Server()]
    for server in servers:
        del server.models[contract.DIT_GUIDED]

    async def body(client: h.AsyncClient) -> None:
        with pytest.raises(h.ModelNotReady) as error:
            await client.denoise(LATENTS, 0.5, tokens(), guidance_scale=3)
        assert error.value.status is grpc.StatusCode.NOT_FOUND

    run(servers, body)


def test_the_urls_of_a_client(kserve: Any, tokens: Tokens) -> None:
    with h.Client([kserve.url, "localhost:1"], retries=0) as client:
        for _ in range(4):
            client.denoise(LATENTS, 0.5, tokens())
        assert client.health().version == "9.9" and client.model_info(contract.DIT).max_batch_size == 8
    assert len(kserve.requests) == 4


def test_a_name_of_several_addresses(kserve: Any, tokens: Tokens) -> None:
    with h.Client(f"dns:///{kserve.url}") as client:
        client.denoise(LATENTS, 0.5, tokens())
        assert isinstance(client._client.transport, h.DnsTransport)
    assert len(kserve.requests) == 1
    own = dict(h.GrpcTransport(f"dns://127.0.0.1/{kserve.url}")._options)  # a name server of its own: gRPC alone can ask that
    assert "round_robin" in own["grpc.service_config"]
    assert "grpc.service_config" not in dict(h.GrpcTransport(kserve.url)._options)


def test_a_server_that_hangs_from_the_start_holds_nobody_up(tokens: Tokens) -> None:
    class Hung(Server):
        async def model_ready(self, name: str, *, timeout_s: float) -> bool:  # noqa: ARG002
            await asyncio.sleep(timeout_s)
            raise h.StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer")

    servers = [Hung(), Server()]

    async def body(client: h.AsyncClient) -> None:
        await asyncio.gather(*(client.denoise(LATENTS, 0.5, tokens()) for _ in range(4)))

    run(servers, body)
    assert counts(servers) == [0, 4]

    async def alone(client: h.AsyncClient) -> None:
        await client.denoise(LATENTS, 0.5, tokens(), timeout_s=0.2)  # all spent on asking the server whether it is ready

    servers = [Hung()]
    started = time.monotonic()
    with pytest.raises(h.DeadlineExceeded):
        run(servers, alone)
    assert time.monotonic() - started < 10


def test_no_servers() -> None:
    with pytest.raises(h.InvalidInput, match="servers must be at least one"):
        h.Client([])


def test_a_model_that_nobody_has_keeps_no_server_out(tokens: Tokens) -> None:
    """The servers are still asked for the missing model while calls for other models join and leave them as usual."""
    servers = [Server(), Server()]
    for server in servers:
        del server.models[contract.DIT_GUIDED]

    async def body(client: h.AsyncClient) -> None:
        async def missing() -> None:
            with pytest.raises(h.ModelNotReady):
                await client.denoise(LATENTS, 0.5, tokens(), guidance_scale=2.0)

        await missing()
        await client.denoise(LATENTS, 0.5, tokens())
        await until(lambda: len(client.transport._up) == 2)
        await missing()
        servers[0].state = "down"
        for _ in range(10):
            await client.denoise(LATENTS, 0.5, tokens())
        assert list(client.transport._up) == [servers[1]]

    run(servers, body)
    assert counts(servers)[1] >= 10


class Slow(Server):
    """A server that takes a while to say whether a model is ready."""

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        await asyncio.sleep(0.02)
        return await super().model_ready(name, timeout_s=timeout_s)


def test_calls_for_different_models_wait_for_the_same_server(tokens: Tokens) -> None:
    """At the start no server is known to be up, so calls ask for different models at once. No call stops another's question."""
    servers = [Slow("down"), Slow()]

    async def body(client: h.AsyncClient) -> None:
        calls = [client.denoise(LATENTS, 0.5, tokens()), client.denoise(LATENTS, 0.5, tokens(), guidance_scale=2.0)]
        await asyncio.gather(*calls, client.sample(tokens()))

    run(servers, body, retries=0)
    assert counts(servers) == [0, 3]


def test_closing_ends_who_waits_for_a_server(tokens: Tokens) -> None:
    servers = [Slow("down"), Slow("down")]

    async def main() -> None:
        client = h.AsyncClient(transport=h.RoundRobin(servers), retries=0, timeout_s=30)
        call = asyncio.create_task(client.denoise(LATENTS, 0.5, tokens()))
        await asyncio.sleep(0.005)
        await client.close()
        with pytest.raises(h.Hunyuan3DError):
            await asyncio.wait_for(call, 10)

    asyncio.run(main())

"""A thousand requests that are left in every possible way, and some that stay: the server keeps nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from hunyuan3d_client import AsyncClient
from hunyuan3d_client.errors import Cancelled, DeadlineExceeded, Hunyuan3DError, Overloaded, ServerUnavailable
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]
OPTIONS = {"num_latents": 16, "steps": 200}
AT_ONCE = 24
WAIT_S = 60.0
MOST_GROWTH = 1.15
WAYS = ("break", "cancel", "disconnect", "deadline", "stay")


@pytest.fixture(scope="module")
def server(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    repository = tmp_path_factory.mktemp("soak") / "repository"
    deploy(artifacts(), repository)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


def counters(endpoints: Endpoints) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=WAIT_S) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("hunyuan3d_"))}


def resident_bytes(pid: int) -> int:
    """The memory of the server and its Python processes, without the memory that they share."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes)


async def one(client: AsyncClient, url: str, way: str, chance: random.Random, context: np.ndarray) -> str:
    """Sends one request and lets it end in this way. Returns the way."""
    options = {**OPTIONS, "seed": chance.randrange(2**40)}
    last = chance.randrange(1, 20)
    if way == "deadline":
        with contextlib.suppress(DeadlineExceeded):
            await client.sample(context, timeout_s=chance.uniform(0.002, 0.3), **options)
    elif way == "cancel":
        task = asyncio.ensure_future(client.sample(context, **options))
        await asyncio.wait([task], timeout=chance.uniform(0, 0.2))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    elif way == "break":
        async with contextlib.aclosing(client.stream(context, preview_every=3, **options)) as steps:
            async for step in steps:
                if step.index >= last:
                    break
    elif way == "disconnect":
        async with AsyncClient(url, timeout_s=WAIT_S) as leaver:
            task = asyncio.ensure_future(leaver.sample(context, **options))
            await asyncio.wait([task], timeout=chance.uniform(0, 0.2))
        with contextlib.suppress(Cancelled, ServerUnavailable, asyncio.CancelledError):
            await asyncio.wait_for(task, WAIT_S)
    else:
        await client.sample(context, **{**OPTIONS, "steps": last + 1})
    return way


async def storm(url: str, requests: int, seed: int, contexts: list[np.ndarray]) -> list[str]:
    """Sends `requests` requests, AT_ONCE at a time. Each must end within 2 WAIT_S. Returns how each ended."""
    chance, slots = random.Random(seed), asyncio.Semaphore(AT_ONCE)
    async with AsyncClient(url, timeout_s=WAIT_S, retries=0, max_in_flight=AT_ONCE) as client:

        async def guarded(number: int) -> str:
            async with slots:
                way = WAYS[number % len(WAYS)]
                try:
                    return await asyncio.wait_for(one(client, url, way, chance, chance.choice(contexts)), 2 * WAIT_S)
                except Overloaded:
                    return "overloaded"
                except Hunyuan3DError as error:
                    return f"{way}: {error!r}"

        return await asyncio.gather(*(guarded(number) for number in range(requests)))


@pytest.mark.parametrize("requests", [100, pytest.param(1250, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_nothing_stays_of_clients_that_leave(requests: int, server: Endpoints, tokens: Make) -> None:
    contexts = [tokens(1, 4), tokens(1, 4, seed=1), tokens(1, 6)]
    asyncio.run(storm(server.grpc, 100, 0, contexts))  # the memory pools reach their full size
    before, began = counters(server), resident_bytes(server.pid)
    ends = asyncio.run(storm(server.grpc, requests, 1, contexts))
    assert set(ends) <= {*WAYS, "overloaded"}, [end for end in ends if end not in WAYS][:5]
    deadline = time.monotonic() + WAIT_S
    while (after := counters(server))["hunyuan3d_active_samples"] or after["hunyuan3d_queued_samples"]:
        assert time.monotonic() < deadline, "a trajectory is left"
        time.sleep(0.05)
    failed = 'hunyuan3d_requests_total{outcome="failed"}'
    assert (
        after[failed] == before[failed]
        and after['hunyuan3d_requests_total{outcome="cancelled"}'] > before['hunyuan3d_requests_total{outcome="cancelled"}']
    )
    growth = resident_bytes(server.pid) / began
    print(f"{requests} requests, {len([end for end in ends if end != 'stay'])} of them left early: memory x {growth:.3f}")  # noqa: T201
    assert growth <= MOST_GROWTH

    async def again() -> tuple[np.ndarray, np.ndarray]:
        async with AsyncClient(server.grpc, timeout_s=WAIT_S) as client:
            return await client.sample(contexts[0], seed=5, **OPTIONS), await client.sample(contexts[0], seed=5, **OPTIONS)

    first, second = asyncio.run(again())
    np.testing.assert_array_equal(first, second)

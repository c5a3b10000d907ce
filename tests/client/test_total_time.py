"""No call takes longer than its timeout, whatever does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client.transport import Tensors

TIMEOUT_S = 0.3
MARGIN_S = 0.1
ATTEMPTS = 4  # the machine may be busy: a defect makes all of them late
LATENTS = np.ones((1, 3072, 64), np.float32)
CONTEXT = np.ones((1, 300, 1536), np.float16)  # large enough for shared memory
CALLS: dict[str, Callable[[h.Client], Any]] = {
    "denoise": lambda client: client.denoise(LATENTS, 0.5, CONTEXT, timeout_s=TIMEOUT_S),
    "sample": lambda client: client.sample(CONTEXT, steps=2, timeout_s=TIMEOUT_S),
    "stream": lambda client: list(client.stream(CONTEXT, steps=2, timeout_s=TIMEOUT_S)),
    "condition": lambda client: client.condition(b"picture", timeout_s=TIMEOUT_S),
    "generate": lambda client: client.generate(b"picture", timeout_s=TIMEOUT_S),
    "health": lambda client: client.health(timeout_s=TIMEOUT_S),
    "model_info": lambda client: client.model_info("hunyuan3d_dit", timeout_s=TIMEOUT_S),
}


@contextlib.contextmanager
def dead() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address that drops whoever connects: the queue of the listening socket is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    stack.enter_context(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def least_s(client: h.Client, call: str) -> float:
    """The least time of a few calls that all fail."""
    taken = []
    for _ in range(ATTEMPTS):
        started = time.monotonic()
        with pytest.raises(h.Hunyuan3DError):
            CALLS[call](client)
        taken.append(time.monotonic() - started)
        if taken[-1] <= TIMEOUT_S + MARGIN_S:
            break
    return min(taken)


@pytest.mark.parametrize(
    ("many", "shared_memory"), [(False, False), (False, True), (True, False)], ids=["one", "shared memory", "two"]
)
@pytest.mark.parametrize("place", [dead, black_hole, silent])
@pytest.mark.parametrize("call", CALLS)
def test_nobody_answers(call: str, place: Any, many: bool, shared_memory: bool) -> None:
    with place() as url, h.Client([url, url] if many else url, shared_memory=shared_memory) as client:
        assert least_s(client, call) <= TIMEOUT_S + MARGIN_S


@pytest.mark.parametrize("many", [False, True], ids=["one server", "two servers"])
@pytest.mark.parametrize("call", ["denoise", "sample", "generate"])
def test_a_server_refuses_and_then_hangs(call: str, many: bool, kserve: Any) -> None:
    """The client asks a server that is UNAVAILABLE whether its model is ready."""
    with h.Client([kserve.url, kserve.url] if many else kserve.url, retries=0) as client:
        client.model_info("hunyuan3d_dit"), client.model_info("hunyuan3d_sampler"), client.model_info("hunyuan3d_context")
        kserve.fail, kserve.silent = grpc.StatusCode.UNAVAILABLE, {"ModelReady"}
        kserve.stall.clear()
        kserve._begin = lambda _, context: context.abort(grpc.StatusCode.UNAVAILABLE, "told to fail")
        assert least_s(client, call) <= TIMEOUT_S + MARGIN_S


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is Linux's")
@pytest.mark.usefixtures("prefix")
@pytest.mark.parametrize("step", ["SystemSharedMemoryRegister", "SystemSharedMemoryStatus", "SystemSharedMemoryUnregister"])
def test_shared_memory_hangs(step: str, kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question of shared memory in turn: registering, looking for a lost segment, making room."""
    more = np.ones((1, 1370 if step.endswith("Unregister") else 300, 1536), np.float16)
    kserve._begin = lambda request, _: kserve.requests.append(request) or kserve._wait(step)
    if step == "SystemSharedMemoryUnregister":
        monkeypatch.setattr("hunyuan3d_client.shared_memory._MOST_BYTES", 5 << 20)
    taken: list[float] = []
    while len(taken) < ATTEMPTS and min(taken, default=9) > TIMEOUT_S + MARGIN_S:
        kserve.silent = set()
        with h.Client(kserve.url, shared_memory="auto", retries=0) as client:
            if step != "SystemSharedMemoryRegister":
                client.denoise(LATENTS[:, :3000], 0.5, CONTEXT)
            if step == "SystemSharedMemoryStatus":
                kserve.segments.clear()
            kserve.silent = {step}
            kserve.stall.clear()
            started = time.monotonic()
            with contextlib.suppress(h.Hunyuan3DError):
                client.denoise(LATENTS, 0.5, more, timeout_s=TIMEOUT_S)
            taken.append(time.monotonic() - started)
            kserve.stall.set()
    assert min(taken) <= TIMEOUT_S + MARGIN_S


class Slow(h.MockTransport):
    """Each answer about the server takes most of the timeout."""

    async def model_ready(self, name: str, *, timeout_s: float) -> bool:
        await asyncio.sleep(min(timeout_s, 0.2))
        if timeout_s <= 0.2:
            raise h.StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        return await super().model_ready(name, timeout_s=timeout_s)

    async def infer(self, request: h.Request, *, timeout_s: float) -> AsyncGenerator[Tensors, None]:
        await asyncio.sleep(timeout_s)
        raise h.StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"{request.model} is late")
        yield {}


@pytest.mark.parametrize("call", CALLS)
def test_each_step_of_a_call_gets_what_is_left(call: str) -> None:
    with h.Client(transport=h.RoundRobin([Slow(), Slow()])) as client:
        started = time.monotonic()
        with contextlib.suppress(h.Hunyuan3DError):
            CALLS[call](client)
        assert time.monotonic() - started <= TIMEOUT_S + MARGIN_S


def test_questions_of_one_health_share_its_timeout(kserve: Any) -> None:
    """Each of its questions takes a while, but not the whole timeout."""
    kserve.pause_s = 0.15
    with h.Client(kserve.url, retries=0) as client:
        started = time.monotonic()
        with pytest.raises(h.DeadlineExceeded):
            client.health(timeout_s=TIMEOUT_S)
        assert time.monotonic() - started <= TIMEOUT_S + MARGIN_S


def test_arguments_that_take_long_to_prepare() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4000, 6000, 3), np.uint8)  # seconds of compression
    with h.Client(transport=h.MockTransport()) as client:
        started = time.monotonic()
        with pytest.raises(h.DeadlineExceeded, match="not ready to be sent"):
            client.generate(picture, timeout_s=TIMEOUT_S)
        assert time.monotonic() - started <= TIMEOUT_S + MARGIN_S

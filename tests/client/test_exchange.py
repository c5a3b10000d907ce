"""Deadlines, slots, retries and the choice of error class, over transports that fail or stall."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract
from hunyuan3d_client.transport import Tensors

Tokens = Callable[..., np.ndarray]
LATENTS = np.ones((1, 3, 64), np.float32)


def double(request: h.Request) -> list[Tensors]:
    return [{"velocity": request.inputs["latents"] * 2}]


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.usefixtures("quick")
def test_refused_requests_are_sent_again(failing: Any, status: grpc.StatusCode, tokens: Tokens) -> None:
    transport = failing(status, status)
    with h.Client(transport=transport, retries=2) as client:
        client.denoise(LATENTS, 0.5, tokens())
    assert len(transport.requests) == 3 and len({request.request_id for request in transport.requests}) == 1


@pytest.mark.usefixtures("quick")
def test_retries_end(failing: Any, tokens: Tokens) -> None:
    transport = failing(*[grpc.StatusCode.UNAVAILABLE] * 9)
    with h.Client(transport=transport, retries=1) as client, pytest.raises(h.Overloaded) as error:
        client.denoise(LATENTS, 0.5, tokens())
    assert error.value.attempt == 2 == len(transport.requests) and 0 < error.value.retry_after_s < 1
    assert error.value.request_id == transport.requests[0].request_id


@pytest.mark.parametrize("status", sorted(set(h.errors.BY_STATUS), key=str) + [None])
@pytest.mark.usefixtures("quick")
def test_only_refused_requests_are_sent_again(failing: Any, status: grpc.StatusCode | None, tokens: Tokens) -> None:
    safe = status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    transport = failing(status)
    with h.Client(transport=transport, retries=0) as client, pytest.raises(h.Hunyuan3DError) as error:
        client.denoise(LATENTS, 0.5, tokens())
    expected = h.Overloaded if safe else h.ModelFailed if status is None else h.errors.BY_STATUS[status]
    assert type(error.value) is expected and error.value.status is status and error.value.attempt == 1
    assert isinstance(error.value.__cause__, h.StatusError) and "\nhint: " in str(error.value)
    transport = failing(status)
    with h.Client(transport=transport, retries=1) as client:
        if safe:
            client.denoise(LATENTS, 0.5, tokens())
        else:
            with pytest.raises(expected):
                client.denoise(LATENTS, 0.5, tokens())
    assert len(transport.requests) == 1 + safe


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, None])
def test_a_failure_while_the_model_is_not_ready(failing: Any, status: grpc.StatusCode | None, tokens: Tokens) -> None:
    transport = failing()
    with h.Client(transport=transport) as client:
        client.denoise(LATENTS, 0.5, tokens())
        transport.models[contract.DIT] = dataclasses.replace(transport.models[contract.DIT], ready=False)
        transport._statuses = [status]
        with pytest.raises(h.ModelNotReady) as error:
            client.denoise(LATENTS, 0.5, tokens())
    assert error.value.status is status and len(transport.requests) == 2


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, None])
def test_a_refusal_after_the_deadline_is_a_deadline(status: grpc.StatusCode, tokens: Tokens) -> None:
    late = threading.Event()

    def slow(_: h.Request) -> Iterable[Tensors]:
        late.wait(0.05)
        raise h.StatusError(status, "the server was first to notice")

    with h.Client(transport=h.MockTransport(slow)) as client, pytest.raises(h.DeadlineExceeded) as error:
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=0.03)
    assert error.value.status is status


@pytest.mark.usefixtures("quick")
def test_a_stream_that_broke_is_not_sent_again(tokens: Tokens) -> None:
    whole = h.MockTransport()

    def broken(request: h.Request) -> Iterator[Tensors]:
        yield from list(whole._answer(request))[:1]
        raise h.StatusError(grpc.StatusCode.UNAVAILABLE, "socket closed")

    transport = h.MockTransport(broken)
    with h.Client(transport=transport, retries=5) as client, pytest.raises(h.ServerUnavailable):
        client.sample(tokens())
    assert len(transport.requests) == 1


def test_deadlines(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with h.Client(transport=transport, timeout_s=50) as client:
        client.denoise(LATENTS, 0.5, tokens())
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=20)
    assert 49 < transport.timeouts_s[0] <= 50 and 19 < transport.timeouts_s[1] <= 20


def test_a_deadline_that_passes_before_the_call_starts(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with h.Client(transport=transport) as client, pytest.raises(h.DeadlineExceeded, match="hint: raise timeout_s"):
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=1e-9)
    gc.collect()
    assert not transport.requests


def test_requests_in_flight_are_bounded(stalled: Any, tokens: Tokens) -> None:
    with h.Client(transport=stalled, max_in_flight=2) as client:
        client.model_info(contract.DIT)
        threads = [threading.Thread(target=client.denoise, args=(LATENTS, 0.5, tokens())) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert stalled.started.acquire(timeout=10) and stalled.started.acquire(timeout=10)
        with pytest.raises(h.DeadlineExceeded, match="max_in_flight") as error:
            client.denoise(LATENTS, 0.5, tokens(), timeout_s=0.05)
        assert isinstance(error.value.__cause__, asyncio.TimeoutError)
        assert client.health().live  # a query needs no slot
        assert not stalled.started.acquire(blocking=False)
        client._loop._loop.call_soon_threadsafe(stalled.go.set)
        for thread in threads:
            thread.join()
        client.denoise(LATENTS, 0.5, tokens())


@pytest.mark.usefixtures("quick")
def test_retries_of_all_calls_share_a_budget(failing: Any, tokens: Tokens) -> None:
    transport = failing(*[grpc.StatusCode.UNAVAILABLE] * 100)
    with h.Client(transport=transport, retries=4) as client:
        for _ in range(5):
            with pytest.raises(h.Overloaded):
                client.denoise(LATENTS, 0.5, tokens())
        assert len(transport.requests) == 5 + 10
        transport._statuses = []
        for _ in range(11):
            client.denoise(LATENTS, 0.5, tokens())
        transport._statuses = [grpc.StatusCode.UNAVAILABLE]
        client.denoise(LATENTS, 0.5, tokens())  # successes have earned one retry

"""Big tensors in /dev/shm: who places, reuses, leaves and removes them. The server is in this process (conftest.py)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract, shared_memory
from hunyuan3d_client.addresses import is_same_host

pytestmark = [
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is Linux's"),
    pytest.mark.usefixtures("prefix"),
]
FOLDER = Path("/dev/shm")
LATENTS = np.arange(3072 * 64, dtype=np.float32).reshape(1, 3072, 64)


def context(length: int = 300) -> np.ndarray:
    return np.ones((1, length, contract.CONTEXT_WIDTH), np.float16)


def segments(prefix: str) -> list[Path]:
    return list(FOLDER.glob(f"{prefix}*"))


def sent_by_value(request: Any) -> set[str]:
    return {tensor.name for tensor in request.inputs if "shared_memory_region" not in tensor.parameters}


def test_big_tensors_are_placed_and_the_segment_is_used_again(kserve: Any, prefix: str) -> None:
    with h.Client(kserve.url, shared_memory="auto") as client:
        for t in (0.25, 0.5, 1):
            np.testing.assert_array_equal(client.denoise(LATENTS, t, context()), LATENTS * t)
        assert len(segments(prefix)) == len(kserve.segments) == kserve.registrations == 1
    assert [sent_by_value(request) for request in kserve.requests] == [{"t"}] * 3
    assert not kserve.segments, "closing unregisters"


def test_small_tensors_travel(kserve: Any) -> None:
    with h.Client(kserve.url, shared_memory="auto") as client:
        client.denoise(LATENTS[:, :8], 0.5, context(8))
    assert kserve.registrations == 0


def test_a_streams_context_is_placed(kserve: Any) -> None:
    with h.Client(kserve.url, shared_memory="auto") as client:
        assert [step.index for step in client.stream(context(), steps=3)] == [1, 2, 3]
        assert [step.index for step in client.stream(context(), steps=2)] == [1, 2]
        assert kserve.registrations == 1
    assert all("context" not in sent_by_value(request) for request in kserve.requests)


def test_a_larger_request_takes_a_larger_segment_and_a_smaller_one_shares_it(kserve: Any) -> None:
    with h.Client(kserve.url, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context(300))
        client.denoise(LATENTS, 0.5, context(1370))
        assert kserve.registrations == 2
        client.denoise(LATENTS, 0.5, context(300))
        client.denoise(LATENTS, 0.5, context(1370))
        assert kserve.registrations == 2


def test_requests_side_by_side_have_segments_of_their_own(kserve: Any) -> None:
    async def main() -> None:
        async with h.AsyncClient(kserve.url, shared_memory="auto") as client:
            times = np.linspace(0, 1, 12)
            velocities = await asyncio.gather(*(client.denoise(LATENTS, t, context()) for t in times))
            for t, velocity in zip(times, velocities, strict=True):
                np.testing.assert_array_equal(velocity, LATENTS * np.float32(t))
            assert 1 < kserve.registrations <= 12

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.9.0.1:1", True),
        ("[::1]:1", True),
        ("unix:/run/triton.sock", True),
        ("10.0.0.1:1", False),
        ("gpu-7:8001", False),
        ("localhost.example:1", False),
        ("dns:///localhost:1", False),
    ],
)
def test_what_auto_takes_for_this_host(url: str, expected: bool) -> None:
    assert is_same_host(url) is expected


@pytest.mark.parametrize("options", [{}, {"shared_memory": False}], ids=str)
def test_false_never_places(options: dict[str, bool], kserve: Any) -> None:
    with h.Client(kserve.url, **options) as client:
        client.denoise(LATENTS, 0.5, context())
    assert kserve.registrations == 0


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
def test_a_server_that_refuses(status: grpc.StatusCode, kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kserve.refusal = status
    with h.Client(kserve.url, retries=0, shared_memory="auto") as client:
        for _ in range(3):
            client.denoise(LATENTS, 0.5, context())
        assert kserve.asked_to_register == 1, "not asked again soon"
        assert all(sent_by_value(request) == {"latents", "t", "context"} for request in kserve.requests)
    monkeypatch.setattr(shared_memory, "_REFUSED_S", 0.0)
    with h.Client(kserve.url, retries=0, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context())
        kserve.refusal = None
        client.denoise(LATENTS, 0.5, context())
        assert kserve.registrations == 1, "but later"


def test_a_server_that_refuses_one_who_insists(kserve: Any) -> None:
    kserve.refusal = grpc.StatusCode.INTERNAL
    with h.Client(kserve.url, shared_memory=True) as client, pytest.raises(h.InvalidInput) as error:
        client.denoise(LATENTS, 0.5, context())
    assert "shared_memory must be usable" in str(error.value) and "\nhint: shared_memory='auto'" in str(error.value)
    kserve.refusal = grpc.StatusCode.UNAVAILABLE
    with h.Client(kserve.url, shared_memory=True, retries=0) as client, pytest.raises(h.Overloaded) as overloaded:
        client.denoise(LATENTS, 0.5, context())
    refusal = overloaded.value.__cause__
    assert isinstance(refusal, h.StatusError) and isinstance(refusal.__cause__, grpc.RpcError)


@pytest.mark.parametrize("limit", ["_MOST_BYTES", "disk"])
def test_no_memory_left(limit: str, kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit == "disk":

        def full(*_: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(shared_memory, limit, 1 << 20)
    with h.Client(kserve.url, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context())
    with h.Client(kserve.url, shared_memory=True) as client, pytest.raises(h.InvalidInput, match="in use|no space"):
        client.denoise(LATENTS, 0.5, context())
    assert kserve.registrations == 0


def test_idle_segments_make_room(kserve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_MOST_BYTES", 9 << 20)
    with h.Client(kserve.url, shared_memory=True) as client:
        client.denoise(LATENTS, 0.5, context(300))  # 4 MiB
        client.denoise(LATENTS, 0.5, context(1370))  # 8 MiB
        assert (kserve.registrations, len(kserve.segments)) == (2, 1)


def test_a_restarted_server_gets_the_request_again(kserve: Any) -> None:
    with h.Client(kserve.url, retries=0, shared_memory="auto") as client:
        client.denoise(LATENTS, 0.5, context())
        kserve.segments.clear()
        np.testing.assert_array_equal(client.denoise(LATENTS, 0.5, context()), LATENTS / 2)
    assert kserve.registrations == 2 and len(kserve.requests) == 3


def test_an_error_of_the_model_is_an_answer(kserve: Any) -> None:
    with h.Client(kserve.url, shared_memory="auto") as client:
        kserve.fail = grpc.StatusCode.INTERNAL
        with pytest.raises(h.ModelFailed):
            client.denoise(LATENTS, 0.5, context())
        kserve.fail = None
        client.denoise(LATENTS, 0.5, context())
    assert kserve.registrations == 1 and len(kserve.requests) == 2


def test_insisting_needs_one_server() -> None:
    with pytest.raises(h.InvalidInput, match="shared_memory must be False or 'auto' for a dns: address"):
        h.GrpcTransport("dns:///localhost:1", shared_memory=True)
    with pytest.raises(h.InvalidInput, match="shared_memory must be True, False or 'auto'"):
        h.GrpcTransport("localhost:1", shared_memory="yes")
    with pytest.raises(h.InvalidInput, match="beside transport"):
        h.Client(transport=h.MockTransport(), shared_memory=True)

"""Headers and ids of calls, when to try again, and what is logged of a call."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

import hunyuan3d_client as h
from hunyuan3d_client import contract

Tokens = Callable[..., np.ndarray]
LATENTS = np.ones((1, 3, 64), np.float32)


def test_headers_of_one_call_win_over_the_transports(kserve: Any, tokens: Tokens) -> None:
    transport = h.GrpcTransport(kserve.url, headers={"authorization": "Bearer old", "x-team": "shapes"})
    with h.Client(transport=transport) as client:
        client.denoise(LATENTS, 0.5, tokens(), headers={"authorization": "Bearer new", "traceparent": "00-1-2-01"})
        client.sample(tokens(), steps=2)
        client.health(headers={"authorization": "Bearer new"})
    one, other = kserve.headers
    assert (one["authorization"], one["x-team"], one["traceparent"]) == ("Bearer new", "shapes", "00-1-2-01")
    assert other["authorization"] == "Bearer old" and "traceparent" not in other
    assert kserve.questions[0]["traceparent"] == "00-1-2-01", "the question about the model belongs to the call"
    assert {found["authorization"] for found in kserve.questions[-5:]} == {"Bearer new"}


class Refreshing:
    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> dict[str, str]:
        self.asked += 1
        return {"authorization": f"Bearer {self.asked}"}

    async def later(self) -> dict[str, str]:
        return self()


@pytest.mark.parametrize("kind", ["function", "coroutine", "of a call"])
def test_a_function_gives_the_headers_of_each_request(kind: str, kserve: Any, tokens: Tokens) -> None:
    token = Refreshing()
    common, own = {"function": (token, None), "coroutine": (token.later, None), "of a call": (None, token)}[kind]
    with h.Client(transport=h.GrpcTransport(kserve.url, headers=common)) as client:
        client.model_info(contract.DIT)
        for _ in range(2):
            client.denoise(LATENTS, 0.5, tokens(), headers=own)
    first, second = (int(found["authorization"].removeprefix("Bearer ")) for found in kserve.headers)
    assert second == first + 1


def test_a_slow_function_holds_no_other_call_up_and_keeps_the_deadline(kserve: Any, tokens: Tokens) -> None:
    released = threading.Event()

    def slow() -> dict[str, str]:
        released.wait(20)
        return {}

    with h.Client(kserve.url) as client:
        client.model_info(contract.DIT)
        tries = []
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(h.DeadlineExceeded, match="the function of headers= took too long"):
                client.denoise(LATENTS, 0.5, tokens(), headers=slow, timeout_s=0.3)
            tries.append(time.monotonic() - started)
        assert min(tries) <= 0.4
        client.denoise(LATENTS, 0.5, tokens(), timeout_s=5)
        released.set()


def test_a_function_sees_the_context_of_its_caller(kserve: Any, tokens: Tokens) -> None:
    """So that the propagator of OpenTelemetry finds the caller's span."""
    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    transport = h.GrpcTransport(kserve.url, headers=lambda: {"traceparent": span.get()})
    with h.Client(transport=transport) as client:
        client.model_info(contract.DIT)
        span.set("00-7-8-01")
        client.denoise(LATENTS, 0.5, tokens())
    assert kserve.headers[0]["traceparent"] == "00-7-8-01"


def test_an_error_of_the_function_is_the_callers(kserve: Any, tokens: Tokens) -> None:
    for url in (kserve.url, [kserve.url, kserve.url]):
        with h.Client(url) as client, pytest.raises(ZeroDivisionError):
            client.denoise(LATENTS, 0.5, tokens(), headers=lambda: {"x": str(1 / 0)}, timeout_s=5)


@pytest.mark.parametrize(
    "headers", [{"My Key": "x"}, {"key": "a\r"}, 7, lambda: {"My Key": "x"}], ids=["space", "return", "number", "called"]
)
def test_wrong_headers_of_a_call(headers: Any, kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url) as client, pytest.raises(h.InvalidInput, match="headers must be"):
        client.sample(tokens(), headers=headers)
    assert not kserve.requests


def test_the_id_of_a_request_is_on_its_steps_and_errors(kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url) as client:
        assert {step.request_id for step in client.stream(tokens(), steps=2, request_id="order-7")} == {"order-7"}
        named = {step.request_id for step in client.stream(tokens(), steps=2)}
        client.denoise(np.ones((9, 3, 64)), 0.5, tokens(9), request_id="batch")
        kserve.fail = grpc.StatusCode.INTERNAL
        with pytest.raises(h.ModelFailed) as error:
            client.denoise(LATENTS, 0.5, tokens(), request_id="order-8")
    assert error.value.request_id == "order-8"
    assert [request.id for request in kserve.requests][0] == "order-7" and {kserve.requests[1].id} == named
    assert {request.id for request in kserve.requests[2:4]} == {"batch-0", "batch-1"}


@pytest.mark.parametrize("request_id", ["", "a b", "a\nb", "x" * 129, 7])
def test_ids_that_a_log_could_not_show(request_id: Any, tokens: Tokens) -> None:
    with h.Client(transport=h.MockTransport()) as client, pytest.raises(h.InvalidInput, match="request_id must be"):
        client.sample(tokens(), request_id=request_id)


@pytest.mark.parametrize(
    ("trailers", "expected"),
    [
        ((("retry-after", "7"),), 7.0),
        ((("grpc-retry-pushback-ms", "2500"),), 2.5),
        ((("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT"),), None),
        ((("grpc-retry-pushback-ms", "-1"),), None),
        ((), None),
        ("too many samples\nhint: try again in 12.5 s", 12.5),
        ("too many samples\nhint: try again later", None),
    ],
)
def test_the_server_says_when_to_try_again(trailers: Any, expected: float | None, kserve: Any, tokens: Tokens) -> None:
    kserve.words, trailers = (trailers, ()) if isinstance(trailers, str) else (kserve.words, trailers)
    kserve.fail, kserve.trailers = grpc.StatusCode.RESOURCE_EXHAUSTED, trailers
    with h.Client(kserve.url, timeout_s=1) as client, pytest.raises(h.Overloaded) as error:
        client.denoise(LATENTS, 0.5, tokens())
    if expected is not None:
        assert error.value.retry_after_s == expected and len(kserve.requests) == 1, "it ends beyond the timeout"
    else:
        assert 0 < error.value.retry_after_s < 1 and len(kserve.requests) == 3


@pytest.mark.parametrize(
    ("url", "headers", "warned"),
    [
        ("shapes.invalid:1", {"authorization": "Bearer 123secret"}, True),
        ("shapes.invalid:1", lambda: {"authorization": "Bearer 123secret"}, True),
        ("shapes.invalid:1", {"triton-grpc-protocol-hunyuan3d-key": "123secret"}, True),
        ("shapes.invalid:1", {"x-team": "shapes"}, False),
        ("localhost:1", {"authorization": "Bearer 123secret"}, False),
        ("https", {"authorization": "Bearer 123secret"}, False),
    ],
)
def test_a_secret_in_plaintext_is_warned_of_once(
    url: str, headers: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = grpc.ssl_channel_credentials() if url == "https" else None
    transport = h.GrpcTransport("shapes.invalid:1" if credentials else url, credentials=credentials, headers=headers)
    with h.Client(transport=transport, retries=0) as client:
        for _ in range(2):
            with pytest.raises(h.Hunyuan3DError):
                client.health(timeout_s=0.2)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == warned and all("in plaintext" in text and "hint: turn TLS on" in text for text in told)
    assert "123secret" not in caplog.text


@pytest.mark.usefixtures("quick")
def test_one_line_a_request_and_details_at_debug(
    kserve: Any, failing: Any, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="hunyuan3d_client")
    transport = h.GrpcTransport(kserve.url, headers={"authorization": "Bearer 123secret"})
    with h.Client(transport=transport) as client:
        client.denoise(LATENTS, 0.5, tokens(), request_id="order-7")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert line.startswith("hunyuan3d_dit order-7: answered in 0.") and line.endswith("s, attempt 1")
    assert "123secret" not in caplog.text and "array" not in caplog.text and "[[" not in caplog.text
    caplog.clear()
    with h.Client(transport=failing(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)) as client:
        with pytest.raises(h.ModelFailed):
            client.denoise(LATENTS, 0.5, tokens(), request_id="order-8")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert line.startswith("hunyuan3d_dit order-8: ModelFailed after 0.") and line.endswith("attempt 2")
    details = [
        record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG and "order-8" in record.getMessage()
    ]
    assert ["attempt 1" in details[0], "Overloaded, sent again" in details[1], "attempt 2" in details[2]] == [True] * 3

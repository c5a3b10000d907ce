"""GrpcTransport on the real wire, against a KServe v2 server in this process (conftest.py)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

import hunyuan3d_client as h
from hunyuan3d_client import contract, wire

Tokens = Callable[..., np.ndarray]
LATENTS = np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
STATUSES = sorted(set(h.errors.BY_STATUS) - {grpc.StatusCode.UNAVAILABLE}, key=str)


def test_denoise_round_trip(kserve: Any, tokens: Tokens) -> None:
    context = tokens(2)
    with h.Client(kserve.url) as client:
        velocity = client.denoise(LATENTS, [0.25, 1], context, timeout_s=30)
    np.testing.assert_array_equal(velocity, LATENTS * np.float32([0.25, 1])[:, None, None])
    (request,) = kserve.requests
    assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [
        ("latents", "FP32", [2, 3, 64]),
        ("t", "FP32", [2, 1]),
        ("context", "FP16", [2, 5, 1536]),
    ]
    assert request.raw_input_contents[2] == context.tobytes()
    assert 25e6 < request.parameters["timeout"].int64_param <= 30e6 and len(request.id) == 32


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 31, 32, 33, 4095, 4096, 4097, 600_000]), min_size=1, max_size=4),
    text=st.text(max_size=200),
)
def test_a_message_is_what_protobuf_reads(sizes: list[int], text: str) -> None:
    """The sizes lie around 128, 16 384 and 2 097 152 bytes, where protobuf writes a length in one byte more."""
    inputs: dict[str, np.ndarray] = {f"x{i}": np.arange(size, dtype=np.float32)[None] for i, size in enumerate(sizes)}
    inputs["schedule"] = np.array([text.encode()], np.object_)
    request = h.Request("model", inputs, "id", output_bytes={"velocity": 4})
    message = pb.ModelInferRequest.FromString(wire.message(request, None, 1.5))
    assert (message.model_name, message.id, message.parameters["timeout"].int64_param) == ("model", "id", 1_500_000)
    assert [(i.name, i.datatype, tuple(i.shape)) for i in message.inputs] == [
        (name, "BYTES" if array.dtype == np.object_ else "FP32", array.shape) for name, array in inputs.items()
    ]
    for content, array in zip(message.raw_input_contents, inputs.values(), strict=True):
        if array.dtype == np.object_:
            assert content == len(array[0]).to_bytes(4, "little") + array[0]
        else:
            assert content == array.tobytes()
    assert not message.outputs, "all outputs, where none is placed"


def test_an_answer_that_contradicts_itself(kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url) as client:
        for output in ({"datatype": "FP32", "shape": [5]}, {"datatype": "BF16", "shape": [0]}):
            kserve.answer = pb.ModelInferResponse(raw_output_contents=[b"1234"])
            kserve.answer.outputs.add(name="velocity", **output)
            with pytest.raises(h.ModelFailed, match="each output must fit") as error:
                client.denoise(LATENTS, 0.5, tokens(2))
            assert error.value.status is grpc.StatusCode.INTERNAL


def test_trajectory_round_trip(kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url) as client:
        steps = list(client.stream(tokens(2), steps=3, seed=9, schedule="flow_match"))
    assert [(step.index, step.total, step.path) for step in steps] == [(1, 3, "plain"), (2, 3, "plain"), (3, 3, "plain")]
    assert steps[0].latents is None and np.array_equal(steps[2].latents, np.full((2, 3, 64), 9))
    assert kserve.requests[0].parameters[contract.ERRORS_AS_OUTPUTS].bool_param
    assert "triton_grpc_error" not in kserve.headers[0], "it brings some servers down"
    schedule = [tensor.name for tensor in kserve.requests[0].inputs].index("schedule")
    assert kserve.requests[0].raw_input_contents[schedule] == b"\x0a\x00\x00\x00flow_match"


def test_the_models_declaration_is_fetched_once(kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url) as client:
        for _ in range(3):
            client.denoise(LATENTS, 0.5, tokens(2))
        assert kserve.infos == 1
        info = client.model_info(contract.DIT)
        assert kserve.infos == 2
        kserve.fail = grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(h.InvalidInput):
            client.denoise(LATENTS, 0.5, tokens(2))
        kserve.fail = None
        client.denoise(LATENTS, 0.5, tokens(2))
    assert kserve.infos == 3  # asked again, because a refusal may mean another deployment
    assert info.platform == "python" and info.max_batch_size == 8
    assert info.parameters == {"precision": "fp32"} and info.inputs["t"].shape == (-1, 1)


def test_health(kserve: Any) -> None:
    with h.Client(kserve.url) as client:
        state = client.health()
        assert (state.live, state.ready, state.version) == (True, True, "9.9")
        sampler = next(model for model in state.models if model.name == contract.SAMPLER)
        assert sampler.ready and sampler.inputs["steps"].optional and not sampler.inputs["context"].optional
        kserve.ready = False
        assert [model.ready for model in client.health().models] == [False] * len(contract.MODELS)


def test_a_server_that_restricts_what_it_tells(kserve: Any, tokens: Tokens) -> None:
    """Without the key the client checks calls by the contract alone; with the key the server tells the rest."""
    kserve.restricted = True
    with h.Client(kserve.url) as client:
        np.testing.assert_array_equal(client.denoise(LATENTS, 0.5, tokens(2)), LATENTS * np.float32(0.5))
        client.denoise(LATENTS, 0.5, tokens(2), guidance=3.0)  # allowed: the weights may be distilled
        assert [tensor.name for tensor in kserve.requests[-1].inputs][-1] == "guidance"
        assert client.sample(tokens(2), steps=2).shape == (2, 3, 64)
        with pytest.raises(h.InvalidInput, match="guidance"):
            client.denoise(LATENTS, 0.5, tokens(2), guidance=3.0, guidance_scale=2.0)
        state = client.health()
        assert state.ready and state.version == "" and all(model.restricted for model in state.models)
        assert {model.name for model in state.models} >= set(contract.MODELS)
        info = client.model_info("another")
        assert info.restricted and not info.inputs
        kserve.missing = contract.SAMPLER
        with pytest.raises(h.ModelNotReady) as error:
            client.model_info(contract.SAMPLER)
        assert error.value.status is grpc.StatusCode.NOT_FOUND, "this server is well and has no such model"
        kserve.ready = False
        with pytest.raises(h.ModelNotReady) as error:
            client.model_info(contract.SAMPLER)
        assert error.value.status is grpc.StatusCode.UNAVAILABLE, "it ends: another may have it"
    with h.Client(transport=h.GrpcTransport(kserve.url, headers={"key": "secret"})) as client:
        kserve.ready = True
        state = client.health()
        assert state.version == "9.9" and not any(model.restricted for model in state.models)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("streamed", [False, True])
def test_statuses_arrive_whole(status: grpc.StatusCode, streamed: bool, kserve: Any, tokens: Tokens) -> None:
    kserve.fail = status
    with h.Client(kserve.url, retries=0) as client, pytest.raises(h.Hunyuan3DError) as error:
        client.sample(tokens(), steps=2) if streamed else client.denoise(LATENTS, 0.5, tokens(2))
    # A server cancels a call for which the client still waits only when a time limit has passed.
    expected = h.DeadlineExceeded if status is grpc.StatusCode.CANCELLED else h.errors.BY_STATUS[status]
    assert type(error.value) is expected and error.value.status is status
    assert error.value.request_id == kserve.requests[0].id and "told to fail" in str(error.value)


@pytest.mark.parametrize(("ready", "expected"), [(True, h.Overloaded), (False, h.ModelNotReady)])
def test_unavailable_is_told_apart_by_asking(ready: bool, expected: type[Exception], kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url, retries=0) as client:
        client.denoise(LATENTS, 0.5, tokens(2))
        kserve.fail, kserve.ready = grpc.StatusCode.UNAVAILABLE, ready
        with pytest.raises(expected):
            client.denoise(LATENTS, 0.5, tokens(2))


@pytest.mark.parametrize(("ready", "expected"), [(True, h.ModelFailed), (False, h.ModelNotReady)])
def test_stream_errors_without_status(ready: bool, expected: type[Exception], kserve: Any, tokens: Tokens) -> None:
    kserve.text, kserve.ready = "DEADLINE_EXCEEDED, or so it says", ready
    with h.Client(kserve.url) as client, pytest.raises(expected) as error:
        client.sample(tokens(), steps=2)
    assert error.value.status is None and len(kserve.requests) == 1


@pytest.mark.parametrize(
    ("code", "expected", "status"),
    [
        ("INVALID_ARG", h.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
        ("NOT_FOUND", h.ModelNotReady, grpc.StatusCode.NOT_FOUND),
        ("UNAVAILABLE", h.Overloaded, grpc.StatusCode.UNAVAILABLE),
        ("CANCELLED", h.DeadlineExceeded, grpc.StatusCode.CANCELLED),
        ("INTERNAL", h.ModelFailed, grpc.StatusCode.INTERNAL),
        ("a new one", h.ModelFailed, grpc.StatusCode.UNKNOWN),
    ],
)
def test_the_samplers_errors(
    code: str, expected: type[Exception], status: grpc.StatusCode, kserve: Any, tokens: Tokens
) -> None:
    kserve.told = code, "its words\nhint: its own"
    with h.Client(kserve.url, retries=0) as client, pytest.raises(h.Hunyuan3DError) as error:
        client.sample(tokens(), steps=2)
    assert type(error.value) is expected and error.value.status is status
    assert str(error.value).endswith("its words\nhint: its own")


def test_an_error_is_known_by_the_name_of_its_output() -> None:
    words = np.array([b"INVALID_ARG", b"its words"], np.object_)
    assert wire.refusal({"path": words}) is None, "two elements make no error"
    found = wire.refusal({"error": words})
    assert found is not None and (found.status, str(found)) == (grpc.StatusCode.INVALID_ARGUMENT, "its words")
    for broken in (words[:1], np.zeros(2, np.float32)):
        found = wire.refusal({"error": broken})
        assert (
            found is not None and found.status is grpc.StatusCode.INTERNAL and "error must be a code and a text" in str(found)
        )


@pytest.mark.parametrize("streamed", [False, True])
def test_the_cause_of_an_error_is_kept(streamed: bool, kserve: Any, tokens: Tokens) -> None:
    kserve.fail = grpc.StatusCode.INTERNAL
    with h.Client(kserve.url) as client, pytest.raises(h.ModelFailed) as error:
        client.sample(tokens(), steps=2) if streamed else client.denoise(LATENTS, 0.5, tokens(2))
    assert isinstance(error.value.__cause__, h.StatusError)
    assert isinstance(error.value.__cause__.__cause__, grpc.RpcError)


def test_a_dead_address(tokens: Tokens) -> None:
    with h.Client("localhost:1", retries=0) as client:
        for call in (lambda: client.sample(tokens()), client.health):
            with pytest.raises(h.ServerUnavailable, match="hint: check the address") as error:
                call()
            assert error.value.status is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("streamed", [False, True])
def test_deadline_reaches_the_server(streamed: bool, kserve: Any, tokens: Tokens) -> None:
    with h.Client(kserve.url) as client:
        client.model_info(contract.SAMPLER if streamed else contract.DIT)
        kserve.stall.clear()
        with pytest.raises(h.DeadlineExceeded) as error:
            client.sample(tokens(), steps=2, timeout_s=0.3) if streamed else client.denoise(
                LATENTS, 0.5, tokens(2), timeout_s=0.3
            )
        assert error.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert kserve.cancelled.wait(10)


def test_leaving_a_stream_cancels_the_call(kserve: Any, tokens: Tokens) -> None:
    kserve.hold_after = 2
    with h.Client(kserve.url) as client:
        for step in client.stream(tokens(), steps=3):
            if step.index == 2:
                break
        assert kserve.cancelled.wait(10)


def test_cancelling_a_job_cancels_the_call(kserve: Any, tokens: Tokens, background: Any) -> None:
    kserve.stall.clear()
    with h.Client(kserve.url) as client:
        job = background(client, tokens(), steps=3)
        job.cancel()
        with pytest.raises(h.Cancelled):
            job.result(timeout_s=10)


def test_closing_cancels_calls_of_other_threads(kserve: Any, tokens: Tokens, background: Any) -> None:
    kserve.stall.clear()
    client = h.Client(kserve.url)
    job = background(client, tokens(), steps=3)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(h.Cancelled):
        job.result(timeout_s=10)
    client.close()


def test_messages_of_many_megabytes(kserve: Any) -> None:
    latents = np.ones((8, 4096, 64), np.float32)  # 8 MiB each way
    context = np.ones((8, 1370, 1536), np.float32)  # 33 MiB as float16
    with h.Client(kserve.url) as client:
        assert client.denoise(latents, 1, context).shape == latents.shape


def test_headers_go_with_every_call(kserve: Any, tokens: Tokens) -> None:
    transport = h.GrpcTransport(
        kserve.url, headers={"authorization": "Bearer abc"}, options={"grpc.primary_user_agent": "mine"}
    )
    with h.Client(transport=transport) as client:
        client.denoise(LATENTS, 0.5, tokens(2))
        client.sample(tokens(), steps=2)
    for headers in kserve.headers:
        assert headers["authorization"] == "Bearer abc" and headers["user-agent"].startswith("mine ")


def test_credentials_turn_tls_on(kserve: Any) -> None:
    transport = h.GrpcTransport(kserve.url, credentials=grpc.ssl_channel_credentials())
    with h.Client(transport=transport, retries=0) as client, pytest.raises(h.ServerUnavailable):
        client.health(timeout_s=5)


def test_async_client(kserve: Any, tokens: Tokens) -> None:
    async def main() -> None:
        async with h.AsyncClient(kserve.url) as client:
            velocities = await asyncio.gather(*(client.denoise(LATENTS, t, tokens(2)) for t in (0, 0.5, 1)))
            assert [velocity.max() for velocity in velocities] == [0, LATENTS.max() / 2, LATENTS.max()]
            assert [step.index async for step in client.stream(tokens(), steps=3)] == [1, 2, 3]
            assert (await client.sample(tokens(), steps=3, seed=4)).mean() == 4

    asyncio.run(main())


def test_one_client_of_many_threads(kserve: Any, tokens: Tokens) -> None:
    results: dict[int, np.ndarray] = {}
    with h.Client(kserve.url) as client:

        def work(index: int) -> None:
            for _ in range(5):
                results[index] = client.denoise(np.full((1, 2, 64), float(index)), 1, tokens())

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((results[index] == index).all() for index in range(8))


def test_a_closed_channel_is_a_status(kserve: Any) -> None:
    async def main() -> None:
        transport = h.GrpcTransport(kserve.url)
        assert await transport.model_ready(contract.DIT, timeout_s=5)
        await transport.close()
        for streamed in (False, True):
            with pytest.raises(h.StatusError) as error:
                await anext(transport.infer(h.Request(contract.DIT, {}, "id", streamed), timeout_s=5))
            assert error.value.status is grpc.StatusCode.CANCELLED and error.value.__cause__ is not None

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "value"),
    [("My Key", "x"), ("key", "secret\r"), ("key", "schlüssel"), ("", "x"), ("key", None), ("x-bin", "x"), ("x", b"x")],
)
def test_headers_that_grpc_would_refuse(name: str, value: Any) -> None:
    with pytest.raises(h.InvalidInput, match="headers must be lower-case names") as error:
        h.GrpcTransport("localhost:1", headers={name: value})
    assert "secret" not in str(error.value) and "schl" not in str(error.value)


def test_headers_that_grpc_takes(kserve: Any, tokens: Tokens) -> None:
    with h.Client(transport=h.GrpcTransport(kserve.url, headers={"empty": "", "x-bin": b"\0\1"})) as client:
        client.denoise(LATENTS, 0.5, tokens(2))
    assert kserve.headers[-1].items() >= {"empty": "", "x-bin": b"\0\1"}.items()


def test_a_refusal_is_told_though_its_stream_stays_open(kserve: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hunyuan3d_client.grpc_transport._END_S", 0.05)
    kserve.told, kserve.hold_after = ("INVALID_ARG", "its words"), 1
    with h.Client(kserve.url, timeout_s=15) as client, pytest.raises(h.InvalidInput, match="its words"):
        client.sample(tokens(), steps=2)
    assert kserve.cancelled.wait(10)

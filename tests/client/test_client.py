"""What AsyncClient and Client send and return, over a MockTransport; every option changes the request."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
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


@pytest.mark.parametrize(("batch", "parts"), [(1, [1]), (8, [8]), (9, [8, 1]), (19, [8, 8, 3])])
def test_denoise_splits_and_joins_batches(batch: int, parts: list[int], tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    latents = np.arange(batch * 64, dtype=np.float32).reshape(batch, 1, 64)
    with h.Client(transport=transport) as client:
        velocity = client.denoise(latents, 0.5, tokens(batch))
    np.testing.assert_array_equal(velocity, latents * 2)
    assert [len(request.inputs["latents"]) for request in transport.requests] == parts
    assert transport.cancelled == []


@pytest.mark.parametrize("answers", [0, 2])
def test_a_denoiser_answers_once(answers: int, tokens: Tokens) -> None:
    transport = h.MockTransport(lambda request: double(request) * answers)
    with h.Client(transport=transport) as client, pytest.raises(h.ModelFailed, match="must have one answer"):
        client.denoise(LATENTS, 0.5, tokens())


def test_the_servers_own_batch_limit_is_kept(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    transport.models[contract.DIT] = dataclasses.replace(transport.models[contract.DIT], max_batch_size=2)
    with h.Client(transport=transport) as client:
        client.denoise(np.ones((3, 1, 64)), 0.5, tokens(3))
    assert [len(request.inputs["latents"]) for request in transport.requests] == [2, 1]


def test_one_failed_part_fails_the_call(failing: Any, tokens: Tokens) -> None:
    transport = failing(grpc.StatusCode.INTERNAL)
    with h.Client(transport=transport) as client, pytest.raises(h.ModelFailed):
        client.denoise(np.ones((9, 1, 64)), 0.5, tokens(9))


def test_guidance_scale_asks_the_guided_model(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with h.Client(transport=transport) as client:
        client.denoise(LATENTS, 0.5, tokens(), guidance_scale=4)
    assert transport.requests[0].model == contract.DIT_GUIDED and transport.requests[0].inputs["guidance_scale"] == [4]


def test_guided_model_that_is_missing(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    del transport.models[contract.DIT_GUIDED]
    with h.Client(transport=transport) as client, pytest.raises(h.ModelNotReady, match="hint: .*health") as error:
        client.denoise(LATENTS, 0.5, tokens(), guidance_scale=4)
    assert (error.value.status, error.value.model) == (grpc.StatusCode.NOT_FOUND, contract.DIT_GUIDED)


def test_a_redeployed_model_is_noticed(tokens: Tokens) -> None:
    transport = h.MockTransport(double)
    with h.Client(transport=transport) as client:
        client.denoise(LATENTS, 0.5, tokens())
        with pytest.raises(h.InvalidInput, match="guidance must be left out"):
            client.denoise(LATENTS, 0.5, tokens(), guidance=3)
        plain = transport.models[contract.DIT]
        guidance = {**plain.inputs, "guidance": h.InputInfo("FP32", (-1, 1))}
        transport.models[contract.DIT] = dataclasses.replace(plain, inputs=guidance)
        client.denoise(LATENTS, 0.5, tokens(), guidance=3)
    assert transport.requests[-1].inputs["guidance"].shape == (1, 1)


def test_sample_and_stream(tokens: Tokens) -> None:
    transport = h.MockTransport()
    with h.Client(transport=transport) as client:
        assert client.sample(tokens(2), steps=4, num_latents=7).shape == (2, 7, 64)
        steps = list(client.stream(tokens()[0], steps=5, num_latents=7, preview_every=2))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5] and {step.total for step in steps} == {5}
    assert [step.index for step in steps if step.latents is not None] == [2, 4, 5]
    assert [request.inputs["preview_every"][0] for request in transport.requests] == [0, 2]


def test_stream_checks_its_arguments_at_once(tokens: Tokens) -> None:
    with h.Client(transport=h.MockTransport()) as client, pytest.raises(h.InvalidInput, match="steps"):
        client.stream(tokens(), steps=0)


@pytest.mark.parametrize("answers", [0, 2])
def test_a_trajectory_cut_short_is_an_error(answers: int, tokens: Tokens) -> None:
    whole = h.MockTransport()

    def cut(request: h.Request) -> Iterator[Tensors]:
        yield from list(whole._answer(request))[:answers]

    with h.Client(transport=h.MockTransport(cut)) as client, pytest.raises(h.ModelFailed, match="must end with") as error:
        client.sample(tokens(), steps=4)
    assert error.value.request_id and error.value.model == contract.SAMPLER


def test_leaving_an_async_stream_early_cancels_it(tokens: Tokens) -> None:
    transport = h.MockTransport()

    async def main() -> None:
        async with h.AsyncClient(transport=transport, max_in_flight=1) as client:
            async for step in client.stream(tokens(), steps=50):
                assert step.index == 1
                break
            await client.sample(tokens())  # needs the only slot, which the stream must have given back
            assert transport.cancelled == [transport.requests[0].request_id]

    asyncio.run(main())


def test_cancelling_a_task_cancels_its_request(stalled: Any, tokens: Tokens) -> None:
    async def main() -> None:
        async with h.AsyncClient(transport=stalled) as client:
            task = asyncio.create_task(client.denoise(LATENTS, 0.5, tokens()))
            while not stalled.started.acquire(blocking=False):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(stalled.cancelled) == 1

    asyncio.run(main())


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "3"])
def test_bad_timeouts(timeout_s: Any, tokens: Tokens) -> None:
    with h.Client(transport=h.MockTransport()) as client, pytest.raises(h.InvalidInput, match="timeout_s must be"):
        client.sample(tokens(), timeout_s=timeout_s)


@pytest.mark.parametrize("options", [{"max_in_flight": 0}, {"retries": -1}])
def test_bad_client_options(options: dict[str, int]) -> None:
    with pytest.raises(h.InvalidInput):
        h.Client(transport=h.MockTransport(), **options)


def test_model_info_and_health() -> None:
    with h.Client(transport=h.MockTransport()) as client:
        assert client.model_info(contract.DIT).inputs["latents"] == h.InputInfo("FP32", (-1, -1, 64))
        state = client.health(timeout_s=5)
    assert state.live and state.ready and {model.name for model in state.models} == set(contract.MODELS)


# Every option of sampling, each with a value whose effect on the request the test below looks for.
OPTIONS: dict[str, Any] = {
    "steps": 2,
    "guidance_scale": 2.5,
    "seed": 5,
    "num_latents": 9,
    "latents": LATENTS,
    "negative_context": np.ones((1, 5, 1536), np.float16),
    "schedule": "flow_match",
    "preview_every": 3,
    "tolerance": 0.125,
    "timeout_s": 7.0,
    "request_id": "mine-7",
    "headers": {"traceparent": "00-1-2-01"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_sampling_changes_the_request(name: str, tokens: Tokens) -> None:
    seen = []
    for options in ({}, {name: OPTIONS[name]}):
        transport = h.MockTransport()
        with h.Client(transport=transport) as client:
            list(client.stream(tokens(), **options))
            if name != "preview_every":
                client.sample(tokens(), **options)
        values = [request.inputs[name].tolist() if name in request.inputs else None for request in transport.requests]
        if name in ("request_id", "headers"):
            values = [getattr(request, name) for request in transport.requests]
        seen.append([round(value) for value in transport.timeouts_s] if name == "timeout_s" else values)
    assert all(before != after for before, after in zip(seen[0], seen[1], strict=True))


def test_options_of_the_methods_are_those_tested_and_equal_in_both_clients() -> None:
    parameters = {name: set(inspect.signature(getattr(h.Client, name)).parameters) for name in ("sample", "stream")}
    assert parameters["stream"] == {"self", "context", *OPTIONS}
    assert parameters["sample"] == parameters["stream"] - {"preview_every"}
    for name in vars(h.AsyncClient):
        if not name.startswith("_") and name != "close":
            method = getattr(h.AsyncClient, name)
            assert inspect.signature(method).parameters.keys() == inspect.signature(getattr(h.Client, name)).parameters.keys()
    for method in (h.Client.denoise, h.Client.stream, h.Client.sample):
        kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 4
    assert inspect.signature(h.Client).parameters == inspect.signature(h.AsyncClient).parameters


# For each option of a constructor, the test in which the option changes something.
SEEN_IN: dict[Any, dict[str, str]] = {
    h.AsyncClient: {
        "url": "test_the_urls_of_a_client",
        "transport": "test_denoise_splits_and_joins_batches",
        "timeout_s": "test_deadlines",
        "max_in_flight": "test_requests_in_flight_are_bounded",
        "retries": "test_retries_end",
        "shared_memory": "test_false_never_places",
    },
    h.GrpcTransport: {
        "url": "test_denoise_round_trip",
        "credentials": "test_credentials_turn_tls_on",
        "headers": "test_headers_go_with_every_call",
        "options": "test_headers_go_with_every_call",
        "shared_memory": "test_insisting_needs_one_server",
    },
    h.RoundRobin: {"servers": "test_calls_take_turns"},
    h.MockTransport: {
        "answer": "test_denoise_splits_and_joins_batches",
        "models": "test_a_mocks_models_are_the_ones_given",
        "weights": "test_a_mock_reports_the_weights_that_a_test_gives_it",
    },
}


@pytest.mark.parametrize("kind", SEEN_IN)
def test_every_option_of_the_constructors_has_its_test(kind: Any) -> None:
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert list(inspect.signature(kind).parameters) == list(SEEN_IN[kind])
    for test in SEEN_IN[kind].values():
        assert f"\ndef {test}(" in written


def test_a_mocks_models_are_the_ones_given() -> None:
    with h.Client(transport=h.MockTransport(models=[h.ModelInfo("other")])) as client:
        assert [model.name for model in client.health().models] == ["other"]
        with pytest.raises(h.ModelNotReady):
            client.model_info(contract.DIT)


STREAMED = (contract.SAMPLER, contract.MESH, contract.PICTURE_LATENTS, contract.PICTURE_MESH)


def asked(model: str, **inputs: np.ndarray) -> list[Tensors]:
    """All answers of a MockTransport without a handler."""

    async def main() -> list[Tensors]:
        request = h.Request(model, inputs, "id", streamed=model in STREAMED)
        return [answer async for answer in h.MockTransport().infer(request, timeout_s=1)]

    return asyncio.run(main())


@pytest.mark.parametrize("spec", contract.MODELS.values(), ids=lambda spec: spec.name)
def test_a_mock_answers_for_every_model_of_the_contract(spec: contract.ModelSpec) -> None:
    sizes = {"B": 2, "L": 7, "T": 5, "V": 3, "P": 14, "H": 2, "side": 28, "S": 1, "bytes": 1}
    inputs = {tensor.name: np.ones(tensor.shape(sizes), tensor.numpy_dtype) for tensor in spec.inputs if not tensor.optional}
    for answer in asked(spec.name, **inputs):
        assert {tensor.name for tensor in spec.outputs if not tensor.optional} <= answer.keys()
        for tensor in spec.outputs:
            if tensor.name in answer:
                assert answer[tensor.name].dtype == tensor.numpy_dtype and answer[tensor.name].ndim == len(tensor.dims)
                fixed = zip(tensor.dims, answer[tensor.name].shape, strict=True)
                assert all(dim == size for dim, size in fixed if isinstance(dim, int))


def test_a_mock_answers_for_a_model_that_the_contract_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = contract.TensorSpec("queries", "FP32", ("B", "Q", 3), "points")
    field = contract.TensorSpec("field", "FP16", ("B", "Q", 1), "signed distance")
    monkeypatch.setitem(contract.MODELS, "a_new_one", contract.ModelSpec("a_new_one", (queries,), (field,)))
    (answer,) = asked("a_new_one", queries=np.ones((2, 11, 3), np.float32))
    assert answer["field"].shape == (2, 11, 1) and answer["field"].dtype == np.float16 and not answer["field"].any()
    with h.Client(transport=h.MockTransport()) as client:
        assert client.model_info("a_new_one").inputs["queries"] == h.InputInfo("FP32", (-1, -1, 3))
    with pytest.raises(h.StatusError, match="is not in the contract\nhint: "):
        asked("a model of nobody")


def test_a_mock_of_one_response_gives_the_last_step() -> None:
    context = np.ones((1, 5, contract.CONTEXT_WIDTH), np.float16)
    (answer,) = asked(contract.SAMPLER_UNARY, context=context, steps=np.int32([4]), num_latents=np.int32([9]))
    assert answer["step"] == answer["total"] == [4] and answer["latents"].shape == (1, 9, 64)

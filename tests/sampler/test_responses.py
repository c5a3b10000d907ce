"""The samplers' responses: steps and errors as outputs, and the single response of hunyuan3d_sampler_unary."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from doubles import PARAMETERS
from model_code import load_model

from hunyuan3d_client import contract

Tokens = Callable[..., np.ndarray]
WAIT_S = 20.0
SAMPLER, UNARY = contract.MODELS[contract.SAMPLER], contract.MODELS[contract.SAMPLER_UNARY]
# Triton asks for all outputs if a request names none.
EVERYTHING = [tensor.name for tensor in SAMPLER.outputs]
AS_OUTPUTS = json.dumps({contract.ERRORS_AS_OUTPUTS: True})


def initialized(spec: contract.ModelSpec, folder: Path, parameters: dict[str, str]) -> Any:
    config = {
        "name": spec.name,
        "input": [{"name": tensor.name} for tensor in spec.inputs],
        "output": [{"name": tensor.name} for tensor in spec.outputs],
        "parameters": {name: {"string_value": text} for name, text in parameters.items()},
    }
    model = load_model(spec.name).TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[pb_utils.InferenceRequest]]:
    """The calls between models; a denoiser answers with its latents."""
    seen: list[pb_utils.InferenceRequest] = []

    async def answer(call: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        seen.append(call)
        (latents,) = (tensor for tensor in call.options["inputs"] if tensor.name() == "latents")
        return pb_utils.InferenceResponse([pb_utils.Tensor("velocity", latents.as_numpy())])

    monkeypatch.setattr(pb_utils.InferenceRequest, "answer", answer, raising=False)
    monkeypatch.setattr(
        pb_utils, "get_output_tensor_by_name", lambda response, _name: response.output_tensors()[0], raising=False
    )
    yield seen


def sampled(model: Any, request: pb_utils.Request) -> list[tuple[pb_utils.InferenceResponse, int]]:
    """All responses of the sampler to one request."""

    async def run() -> None:
        await model.execute([request])
        while not request.sender.sent or not request.sender.sent[-1][1]:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), WAIT_S))
    return request.sender.sent


def request_of(context: np.ndarray, *, parameters: str = "", outputs: list[str] | None = None) -> pb_utils.Request:
    arrays = {"context": context, "num_latents": np.array([4], np.int32), "steps": np.array([3], np.int32)}
    return pb_utils.Request(arrays, outputs=EVERYTHING if outputs is None else outputs, parameters=parameters)


@pytest.mark.usefixtures("calls")
def test_steps_have_their_path_and_no_error(tmp_path: Path, tokens: Tokens) -> None:
    model = initialized(SAMPLER, tmp_path, PARAMETERS)
    responses = sampled(model, request_of(tokens(1, 2), parameters=AS_OUTPUTS))
    assert [int(response.arrays["step"][0]) for response, _ in responses] == [1, 2, 3], "the last has size 0"
    assert [flags for _, flags in responses] == [0, 0, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL]
    for response, _ in responses:
        assert response.arrays["path"].tolist() == [b"guided"] and contract.ERROR.name not in response.arrays


def test_calls_of_denoisers_say_that_their_values_are_checked(
    tmp_path: Path, tokens: Tokens, calls: list[pb_utils.InferenceRequest]
) -> None:
    sampled(initialized(SAMPLER, tmp_path, PARAMETERS), request_of(tokens(1, 2)))
    assert [call.options["parameters"] for call in calls] == [{"checked": True}] * 2


def test_an_error_is_the_output_error_alone(tmp_path: Path, tokens: Tokens) -> None:
    model = initialized(SAMPLER, tmp_path, {**PARAMETERS, "needs": "hunyuan3d_dit|hunyuan3d_dit_guided"})
    ((response, flags),) = sampled(model, request_of(tokens(1, 2) * np.float16(np.nan), parameters=AS_OUTPUTS))
    assert not response.has_error() and flags == pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    assert response.arrays.keys() == {contract.ERROR.name}
    assert response.arrays["error"].tolist() == [b"INVALID_ARG", b"context must be finite, got NaN or Inf"]
    assert response.arrays["error"].shape == contract.ERROR.dims


@pytest.mark.parametrize(
    ("parameters", "outputs"), [("", EVERYTHING), (AS_OUTPUTS, ["latents"])], ids=["not wanted", "output not asked for"]
)
def test_otherwise_an_error_is_tritons(parameters: str, outputs: list[str], tmp_path: Path, tokens: Tokens) -> None:
    model = initialized(SAMPLER, tmp_path, PARAMETERS)
    request = request_of(tokens(1, 0), parameters=parameters, outputs=outputs)
    ((response, _),) = sampled(model, request)
    assert response.error().code() == "INVALID_ARG" and "context must be " in response.error().message()


def unary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, responses: list[pb_utils.InferenceResponse], outputs: list[str]
) -> tuple[pb_utils.InferenceResponse, pb_utils.InferenceRequest]:
    """The unary sampler's response when the sampler answers `responses`, and its call of the sampler."""
    calls = []

    async def answer(call: pb_utils.InferenceRequest) -> list[pb_utils.InferenceResponse]:
        calls.append(call)
        return responses

    monkeypatch.setattr(pb_utils.InferenceRequest, "answer", answer, raising=False)
    model = initialized(UNARY, folder, {})
    ((response, _),) = sampled(model, pb_utils.Request({"context": np.zeros((1, 2, 1536), np.float16)}, outputs=outputs))
    (call,) = calls
    assert call.decoupled and call.options["model_name"] == contract.SAMPLER
    assert call.options["parameters"] == {contract.ERRORS_AS_OUTPUTS: True}
    return response, call


def texts(name: str, *values: bytes) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array(values, np.object_))


def test_unary_makes_a_triton_error_of_the_samplers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pb_utils.InferenceResponse([texts("error", b"UNAVAILABLE", b"samples must fit")])
    found, call = unary(tmp_path, monkeypatch, [refused], ["latents"])
    assert (found.error().code(), found.error().message()) == ("UNAVAILABLE", "samples must fit")
    wanted = {tensor.name for tensor in UNARY.outputs} - {"vae_latents"} | {contract.ERROR.name}
    assert set(call.options["requested_output_names"]) == wanted


def test_unary_returns_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [pb_utils.InferenceResponse([texts("path", b"plain"), texts("step", step)]) for step in (b"1", b"2")]
    found, call = unary(tmp_path, monkeypatch, [*steps, pb_utils.InferenceResponse()], ["vae_latents"])
    assert not found.has_error() and found.arrays["step"].tolist() == [b"2"]
    assert "vae_latents" in call.options["requested_output_names"]


def test_unary_takes_a_path_alone_for_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response whose only output is `path` is a result and not an error."""
    found, _ = unary(tmp_path, monkeypatch, [pb_utils.InferenceResponse([texts("path", b"plain")])], ["path"])
    assert not found.has_error() and found.arrays["path"].tolist() == [b"plain"]


@pytest.mark.usefixtures("calls")
def test_previews_beyond_the_bound_are_left_out_and_the_result_is_not(tmp_path: Path, tokens: Tokens) -> None:
    """Triton keeps what a client does not read, so 20 clients that read nothing would fill its memory with previews."""
    model = initialized(SAMPLER, tmp_path, {**PARAMETERS, "preview_mib": "1"})
    length = 2**20 // (4 * contract.LATENT_CHANNELS) - 1  # one preview fits, a second does not
    for _ in range(2):  # what an ended request held is free again
        numbers = {"num_latents": length, "preview_every": 1, "steps": 4}
        arrays = {"context": tokens(1, 2), **{name: np.array([value], np.int32) for name, value in numbers.items()}}
        request = pb_utils.Request(arrays, outputs=EVERYTHING)
        responses = [response.arrays for response, _ in sampled(model, request)]
        assert [("latents" in arrays) for arrays in responses] == [True, False, False, True]


@pytest.mark.usefixtures("calls")
def test_the_noise_of_a_large_request_does_not_hold_the_event_loop(
    tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other samples are stepped by the same loop."""
    model = initialized(SAMPLER, tmp_path, PARAMETERS)
    drawn, release = threading.Event(), threading.Event()
    decode = sys.modules["sample_request"].decode

    def slow(*arguments: Any) -> Any:
        if len(arguments[0]["context"]) > 1:
            drawn.set()
            assert release.wait(WAIT_S)
        return decode(*arguments)

    monkeypatch.setitem(model._admit.__func__.__globals__, "decode", slow)
    arrays = {"context": tokens(8, 2), "num_latents": np.array([4096], np.int32), "steps": np.array([3], np.int32)}
    large, small = pb_utils.Request(arrays, outputs=EVERYTHING), request_of(tokens(1, 2))

    async def run() -> None:
        first = asyncio.create_task(model.execute([large]))
        await asyncio.to_thread(drawn.wait, WAIT_S)
        await model.execute([small])
        while not small.sender.sent or not small.sender.sent[-1][1]:
            await asyncio.sleep(0)
        assert not large.sender.sent
        release.set()
        await first
        while not large.sender.sent or not large.sender.sent[-1][1]:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), WAIT_S))
    assert large.sender.sent[-1][0].arrays["latents"].shape == (8, 4096, 64)


@pytest.mark.parametrize("arrays", [{}, {"context": np.ones(3)}, {"context": np.ones((1, 2, 3)), "num_latents": np.zeros(0)}])
def test_numbers_to_draw_of_malformed_requests(arrays: dict[str, np.ndarray]) -> None:
    assert sys.modules["sample_request"].numbers_to_draw(arrays, None) == 0

"""tritonclient sends requests that our client would not send: each gets its own error and the right status."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hunyuan3d_client import Client, contract
from hunyuan3d_export.server.embedded import Endpoints

pytestmark = pytest.mark.served

Tensors = dict[str, np.ndarray]
INVALID = "StatusCode.INVALID_ARGUMENT"
WAIT_S = 60.0


def inputs_of(tensors: Tensors) -> list[triton.InferInput]:
    inputs = []
    for name, value in tensors.items():
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        inputs.append(tensor.set_data_from_numpy(value))
    return inputs


def infer(raw: triton.InferenceServerClient, model: str, tensors: Tensors) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        raw.infer(model, inputs_of(tensors), client_timeout=WAIT_S)
    return caught.value


def stream(url: str, tensors: Tensors) -> InferenceServerException:
    """The error of a streamed request, sent on a connection of its own. An error of the sampler has its code."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(contract.SAMPLER, inputs_of(tensors), parameters={contract.ERRORS_AS_OUTPUTS: True})
        result, error = answers.get(timeout=WAIT_S)
    if error is None:
        code, text = result.as_numpy("error")  # the first response must be an error
        return InferenceServerException(text.decode(), {b"INVALID_ARG": INVALID}[code])
    return error


def numbers(value: object, dtype: type) -> np.ndarray:
    return np.atleast_1d(np.array(value, dtype))


def context(batch: int = 1, length: int = 3, fill: float = 0.5) -> np.ndarray:
    return np.full((batch, length, 1536), fill, np.float16)


SAMPLER_CASES: dict[str, tuple[Tensors, str]] = {
    "T = 0": ({"context": context(length=0)}, "context must be "),
    "B = 0": ({"context": context(batch=0)}, "context must be "),
    "NaN context": ({"context": context(fill=np.nan)}, "context must be finite"),
    "Inf context": ({"context": context(fill=np.inf)}, "context must be finite"),
    "9 samples": ({"context": context(batch=9, length=1)}, "context must be of at most 8 samples"),
    "L = 0": ({"latents": np.zeros((1, 0, 64), np.float32)}, "latents must be "),
    "NaN latents": ({"latents": np.full((1, 4, 64), np.nan, np.float32)}, "latents must be finite"),
    "two noises": ({"latents": np.zeros((2, 4, 64), np.float32)}, "latents must have context's batch size 1, got 2"),
    "num_latents 0": ({"num_latents": numbers(0, np.int32)}, "num_latents must be in 1..4096, got 0"),
    "num_latents huge": ({"num_latents": numbers(2**31 - 1, np.int32)}, "num_latents must be in 1..4096"),
    "steps 0": ({"steps": numbers(0, np.int32)}, "steps must be in 1..1000 for flow_match, got 0"),
    "steps 1001": ({"steps": numbers(1001, np.int32)}, "steps must be in 1..1000 for flow_match, got 1001"),
    "consistency 101": (
        {"steps": numbers(101, np.int32), "schedule": numbers(b"consistency", np.object_)},
        "steps must be in 1..100 for consistency, got 101",
    ),
    "schedule": ({"schedule": numbers(b"ddim", np.object_)}, "schedule must be one of flow_match, consistency, got 'ddim'"),
    "scale NaN": ({"guidance_scale": numbers(np.nan, np.float32)}, "guidance_scale must be finite, got nan"),
    "negative of another T": ({"negative_context": context(length=2)}, "negative_context must have context's shape"),
    "negative of another B": ({"negative_context": context(batch=2)}, "negative_context must have context's shape"),
    "three seeds": ({"seed": np.arange(3)}, "seed must hold 1 or 1 values, got shape"),
}
# Triton itself refuses these by config.pbtxt. Its error on a stream carries no status.
TRITON_CASES: dict[str, tuple[Tensors, str]] = {
    "narrow context": ({"context": np.zeros((1, 3, 1535), np.float16)}, "context"),
    "flat context": ({"context": np.zeros((3, 1536), np.float16)}, "context"),
    "float32 context": ({"context": np.zeros((1, 3, 1536), np.float32)}, "context"),
    "float64 latents": ({"latents": np.zeros((1, 3, 64))}, "latents"),
    "float steps": ({"steps": numbers(5, np.float32)}, "steps"),
    "two steps": ({"steps": numbers([5, 6], np.int32)}, "steps"),
    "unknown input": ({"guidance": numbers(5, np.float32)}, "guidance"),
}


def sampler_tensors(changes: Tensors) -> Tensors:
    fitting = {} if "latents" in changes else {"num_latents": numbers(4, np.int32)}
    return {"context": context(), "steps": numbers(3, np.int32), **fitting, **changes}


@pytest.mark.parametrize("name", [*SAMPLER_CASES, *TRITON_CASES])
def test_unary_sampler(name: str, raw: triton.InferenceServerClient) -> None:
    changes, message = {**SAMPLER_CASES, **TRITON_CASES}[name]
    error = infer(raw, contract.SAMPLER_UNARY, sampler_tensors(changes))
    assert error.status() == INVALID and message in error.message()


@pytest.mark.parametrize("name", SAMPLER_CASES)
def test_streamed_sampler(name: str, served: Endpoints) -> None:
    changes, message = SAMPLER_CASES[name]
    error = stream(served.grpc, sampler_tensors(changes))
    assert error.status() == INVALID and message in error.message()


@pytest.mark.parametrize("name", TRITON_CASES)
def test_streamed_sampler_in_tritons_words(name: str, served: Endpoints) -> None:
    changes, message = TRITON_CASES[name]
    assert message in stream(served.grpc, sampler_tensors(changes)).message()


def test_streamed_preview_every(served: Endpoints) -> None:
    error = stream(served.grpc, sampler_tensors({"preview_every": numbers(-1, np.int32)}))
    assert error.status() == INVALID and "preview_every must be 0 or more, got -1" in error.message()


@pytest.mark.parametrize("model", [contract.SAMPLER_UNARY, contract.DIT])
def test_missing_context(model: str, raw: triton.InferenceServerClient) -> None:
    error = infer(raw, model, {"latents": np.zeros((1, 4, 64), np.float32)})
    assert error.status() == INVALID


def denoiser_tensors(changes: Tensors, batch: int = 2) -> Tensors:
    fitting = {
        "latents": np.zeros((batch, 4, 64), np.float32),
        "t": np.full((batch, 1), 0.5, np.float32),
        "context": context(batch),
        "guidance_scale": np.full((batch, 1), 5, np.float32),
    }
    return {**fitting, **changes}


DENOISER_CASES: dict[str, tuple[Tensors, str]] = {
    "batch 9": (denoiser_tensors({}, batch=9), "batch"),
    "batches differ": ({"t": np.full((1, 1), 0.5, np.float32)}, "batch"),
    "NaN latents": ({"latents": np.full((2, 4, 64), np.nan, np.float32)}, "latents must be finite"),
    "NaN context": ({"context": context(2, fill=np.nan)}, "context must be finite"),
    "NaN scale": ({"guidance_scale": np.full((2, 1), np.nan, np.float32)}, "guidance_scale must be finite"),
    "t 1.5": ({"t": np.full((2, 1), 1.5, np.float32)}, "t must be in [0, 1], got 1.5"),
    "t NaN": ({"t": np.full((2, 1), np.nan, np.float32)}, "t must be finite"),
    "L = 0": ({"latents": np.zeros((2, 0, 64), np.float32)}, "latents must not be empty"),
    "T = 0": ({"context": context(2, length=0)}, "context must not be empty"),
    "63 channels": ({"latents": np.zeros((2, 4, 63), np.float32)}, "latents"),
    "half latents": ({"latents": np.zeros((2, 4, 64), np.float16)}, "latents"),
    "flat t": ({"t": np.full(2, 0.5, np.float32)}, "t"),
}


@pytest.mark.parametrize("name", DENOISER_CASES)
def test_denoiser(name: str, raw: triton.InferenceServerClient) -> None:
    changes, message = DENOISER_CASES[name]
    error = infer(raw, contract.DIT_GUIDED, denoiser_tensors(changes))
    assert error.status() == INVALID and message in error.message()
    assert raw.infer(contract.DIT_GUIDED, inputs_of(denoiser_tensors({}))).as_numpy("velocity").shape == (2, 4, 64)


def test_a_bad_request_does_not_end_a_running_one(client: Client, served: Endpoints, tokens: Callable[..., np.ndarray]) -> None:
    steps = client.stream(tokens(1, 3), num_latents=5, steps=40, preview_every=0)
    next(steps)
    assert stream(served.grpc, sampler_tensors({"steps": numbers(0, np.int32)})).status() == INVALID
    *_, last = steps
    expected = client.sample(tokens(1, 3), num_latents=5, steps=40)
    assert np.linalg.norm(last.latents - expected) <= 1e-5 * np.linalg.norm(expected)


def test_http_answers_with_the_same_errors(served: Endpoints) -> None:
    body = {
        "inputs": [
            {"name": "context", "shape": [1, 1, 1536], "datatype": "FP16", "parameters": {"binary_data_size": 3072}},
            {"name": "steps", "shape": [1], "datatype": "INT32", "data": [0]},
        ]
    }
    header = json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://{served.http}/v2/models/{contract.SAMPLER_UNARY}/infer",
        data=header + bytes(3072),
        headers={"Inference-Header-Content-Length": str(len(header))},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=WAIT_S)
    with caught.value as answer:
        assert answer.code == 400 and "steps must be in 1..1000 for flow_match, got 0" in json.load(answer)["error"]


INTEGERS = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    steps=INTEGERS | st.integers(0, 3),
    num_latents=INTEGERS | st.integers(0, 4),
    scale=st.floats(width=32),
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    schedule=st.binary(max_size=3) | st.sampled_from([b"flow_match", b"consistency"]),
)
def test_anything_is_answered_by_a_result_or_invalid_argument(
    shape: tuple[int, int], steps: int, num_latents: int, scale: float, seeds: list[int], schedule: bytes, raw: Any
) -> None:
    if 3 < steps <= 1000 or abs(scale) > 1e3:
        steps, scale = 2, 2.0  # keep the results few steps long and finite
    tensors = {
        "context": context(*shape),
        "steps": numbers(steps, np.int32),
        "num_latents": numbers(num_latents, np.int32),
        "guidance_scale": numbers(scale, np.float32),
        "seed": np.array(seeds, np.int64),
        "schedule": numbers(schedule, np.object_),
    }
    try:
        result = raw.infer(contract.SAMPLER_UNARY, inputs_of(tensors), client_timeout=WAIT_S)
    except InferenceServerException as error:
        assert error.status() == INVALID, error
    else:
        assert result.as_numpy("latents").shape == (shape[0], num_latents, 64)

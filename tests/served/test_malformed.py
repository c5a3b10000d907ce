"""Requests that break the protocol or the contract in generated ways, straight through tritonclient: each gets an error."""

from __future__ import annotations

import queue
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

WAIT_S = 60.0
Inputs = list[triton.InferInput]
DENOISERS = (contract.DIT, contract.DIT_GUIDED)
SAMPLERS = (contract.SAMPLER, contract.SAMPLER_UNARY)
BIG = st.sampled_from([-(2**31), -1, 0, 2**31 - 1])
BAD_SHAPES = ([0], [1], [], [1, 1], [-1], [2**31], [1, 1, 1, 1], [2**40, 3, 1536], [1, 3, 1537])
DTYPES = ("FP32", "FP16", "FP64", "INT32", "INT64", "UINT8", "BOOL", "BYTES", "BF16", "NONSENSE", "")


def tensor(name: str, value: np.ndarray) -> triton.InferInput:
    made = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    return made.set_data_from_numpy(value)


def valid(model: str) -> dict[str, np.ndarray]:
    """A small request that `model` takes."""
    if model in DENOISERS:
        column = np.full((1, 1), 0.5, np.float32)
        scale = {"guidance_scale": column} if model == contract.DIT_GUIDED else {}
        return {
            "latents": np.zeros((1, 3, 64), np.float32),
            "t": column,
            "context": np.zeros((1, 2, 1536), np.float16),
            **scale,
        }
    return {
        "context": np.zeros((1, 2, 1536), np.float16),
        "steps": np.array([2], np.int32),
        "num_latents": np.array([3], np.int32),
        "seed": np.array([1], np.int64),
        "schedule": np.array([b"flow_match"], np.object_),
        "guidance_scale": np.array([2], np.float32),
    }


def _named(inputs: Inputs, name: str) -> triton.InferInput:
    return next(found for found in inputs if found.name() == name)


def missing(inputs: Inputs, _: st.DataObject) -> None:
    inputs.remove(_named(inputs, "context"))


def unknown(inputs: Inputs, data: st.DataObject) -> None:
    inputs.append(tensor(data.draw(st.text(max_size=8).map(lambda text: f"x{text}")), np.zeros(1, np.float32)))


def another_dtype(inputs: Inputs, data: st.DataObject) -> None:
    found = data.draw(st.sampled_from(inputs))
    wrong = data.draw(st.sampled_from([name for name in DTYPES if name != found.datatype()]))
    found._input.datatype = wrong


def another_shape(inputs: Inputs, data: st.DataObject) -> None:
    found = data.draw(st.sampled_from(inputs))
    shape = data.draw(st.sampled_from([shape for shape in BAD_SHAPES if shape != found.shape()]))
    found.set_shape(shape)


def another_length(inputs: Inputs, data: st.DataObject) -> None:
    found = data.draw(st.sampled_from([each for each in inputs if each.datatype() != "BYTES"]))
    right = len(found._raw_content)
    found._raw_content = bytes(data.draw(st.integers(0, 2 * right).filter(lambda length: length != right)))


def broken_text(inputs: Inputs, data: st.DataObject) -> None:
    raw = data.draw(st.binary(max_size=12).filter(lambda raw: raw != b"\x0a\0\0\0flow_match"))
    _named(inputs, "schedule")._raw_content = raw


def not_finite(inputs: Inputs, data: st.DataObject) -> None:
    found = data.draw(st.sampled_from([each for each in inputs if each.datatype() in ("FP16", "FP32")]))
    dtype = np.dtype(np.float16 if found.datatype() == "FP16" else np.float32)
    values = np.frombuffer(found._raw_content, dtype).copy()
    values[data.draw(st.integers(0, values.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    found._raw_content = values.tobytes()


def out_of_range(inputs: Inputs, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["steps", "num_latents"]))
    _named(inputs, name)._raw_content = np.array([data.draw(BIG)], np.int32).tobytes()


ANY = (missing, unknown, another_dtype, another_shape, another_length, not_finite)
OF_SAMPLERS = (*ANY, broken_text, out_of_range)


def ask(raw: triton.InferenceServerClient, url: str, model: str, inputs: Inputs, outputs: list[Any] | None) -> Exception | None:
    """The error of the answer, or None for a result. A streamed request gets a connection of its own."""
    if model != contract.SAMPLER:
        try:
            raw.infer(model, inputs, outputs=outputs, client_timeout=WAIT_S)
        except InferenceServerException as error:
            return error
        return None
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, inputs, outputs=outputs)
        return answers.get(timeout=WAIT_S)[1]


def check(data: st.DataObject, raw: triton.InferenceServerClient, served: Endpoints) -> None:
    model = data.draw(st.sampled_from([*DENOISERS, *SAMPLERS]))
    inputs = [tensor(name, value) for name, value in valid(model).items()]
    break_it = data.draw(st.sampled_from(OF_SAMPLERS if model in SAMPLERS else ANY))
    break_it(inputs, data)
    error = ask(raw, served.grpc, model, inputs, None)
    assert isinstance(error, InferenceServerException) and "DEADLINE" not in str(error.status()), (model, break_it, error)


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(data=st.data())
def test_every_malformed_request_is_answered_by_an_error(data: st.DataObject, raw: Any, served: Endpoints) -> None:
    check(data, raw, served)


@pytest.mark.slow
@settings(QUICK, max_examples=500)
@given(data=st.data())
def test_500_malformed_requests(data: st.DataObject, raw: Any, served: Endpoints) -> None:
    check(data, raw, served)


def test_the_server_still_answers(client: Client, tokens: Callable[..., np.ndarray]) -> None:
    assert client.sample(tokens(1, 2), num_latents=3, steps=2).shape == (1, 3, 64)


@pytest.mark.parametrize("model", [*DENOISERS, *SAMPLERS])
def test_what_is_broken_was_valid(model: str, raw: triton.InferenceServerClient, served: Endpoints) -> None:
    assert ask(raw, served.grpc, model, [tensor(name, value) for name, value in valid(model).items()], None) is None

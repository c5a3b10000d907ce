"""The mesh model's responses and its calls of the networks, on top of the stand-in for Triton's Python backend."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from model_code import load_model

sys.path.insert(0, str(Path(__file__).parent))

from decoding_doubles import LATENTS, PARAMETERS, sphere

from hunyuan3d_client import contract

SPEC = contract.MODELS[contract.MESH]
EVERYTHING = [tensor.name for tensor in SPEC.outputs]
AS_OUTPUTS = json.dumps({contract.ERRORS_AS_OUTPUTS: True})
RESULT = {tensor.name for tensor in contract.MESH_RESULT}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[pb_utils.InferenceRequest]]:
    """The calls between models; the field is a sphere."""
    seen: list[pb_utils.InferenceRequest] = []

    async def answer(call: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        seen.append(call)
        if call.options["model_name"] == contract.VAE:
            return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.ones(3)) for name in ("k", "v")])
        (queries,) = (tensor.as_numpy() for tensor in call.options["inputs"] if tensor.name() == "queries")
        return pb_utils.InferenceResponse([pb_utils.Tensor("field", sphere(queries))])

    def output(response: pb_utils.InferenceResponse, name: str) -> pb_utils.Tensor:
        return next(tensor for tensor in response.output_tensors() if tensor.name() == name)

    monkeypatch.setattr(pb_utils.InferenceRequest, "answer", answer, raising=False)
    monkeypatch.setattr(pb_utils, "get_output_tensor_by_name", output, raising=False)
    yield seen


def initialized(**changed: str) -> Any:
    config = {
        "name": SPEC.name,
        "input": [{"name": tensor.name} for tensor in SPEC.inputs],
        "output": [{"name": tensor.name} for tensor in SPEC.outputs],
        "parameters": {name: {"string_value": text} for name, text in {**PARAMETERS, **changed}.items()},
    }
    model = load_model(SPEC.name).TritonPythonModel()
    model.initialize({"model_config": json.dumps(config), "model_repository": "/nowhere", "model_version": "1"})
    return model


def answered(
    model: Any, arrays: dict[str, np.ndarray], *, outputs: list[str] | None = None, parameters: str = ""
) -> list[pb_utils.InferenceResponse]:
    """All responses to one request."""
    request = pb_utils.Request(arrays, outputs=EVERYTHING if outputs is None else outputs, parameters=parameters)

    async def run() -> None:
        await model.execute([request])
        while not request.sender.sent or not request.sender.sent[-1][1]:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 30))
    return [response for response, _ in request.sender.sent]


def test_progress_comes_first_and_the_file_last(calls: list[pb_utils.InferenceRequest]) -> None:
    *progress, last = answered(initialized(), {"latents": LATENTS, "format": np.array([b"obj"], np.object_)})
    names = {tensor.name for tensor in contract.MESH_PROGRESS}
    assert len(progress) > 2 and all(response.arrays.keys() == names for response in progress)
    assert last.arrays.keys() == names | RESULT and last.arrays["stage"].tolist() == [b"done"]
    assert last.arrays["mesh"].dtype == np.uint8 and last.arrays["mesh_format"].tolist() == [b"obj"]
    facts = json.loads(last.arrays["statistics"][0])
    assert facts["vertices"] == last.arrays["mesh"].tobytes().count(b"\nv ") + last.arrays["mesh"].tobytes().startswith(b"v ")
    assert last.arrays["evaluations"].tolist() == [facts["evaluations"]]
    for tensor in (*contract.MESH_PROGRESS, *contract.MESH_RESULT):
        assert last.arrays[tensor.name].dtype == tensor.numpy_dtype
    first, *others = (call.options for call in calls)
    assert first["model_name"] == contract.VAE and "preferred_memory" not in first, "k and v stay where they are made"
    for options in others:
        assert options["model_name"] == contract.FIELD and options["preferred_memory"].memory == "CPU"
        assert options["inputs"][1:] == others[0]["inputs"][1:], "the same tensors, which are copied at most once"


@pytest.mark.usefixtures("calls")
def test_progress_is_sent_only_to_those_who_ask_for_it() -> None:
    (only,) = answered(initialized(), {"latents": LATENTS}, outputs=["mesh", "error"])
    assert RESULT <= only.arrays.keys()


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("as_output", [True, False])
def test_errors_keep_their_code(as_output: bool) -> None:
    bad = {"latents": LATENTS, "resolution": np.array([2000], np.int32)}
    (response,) = answered(initialized(), bad, parameters=AS_OUTPUTS if as_output else "")
    text = "resolution must be in 8..1024, got 2000\nhint: 256 or 384 are usual"
    if as_output:
        assert response.arrays.keys() == {"error"} and response.arrays["error"].tolist() == [b"INVALID_ARG", text.encode()]
    else:
        assert (response.error().code(), response.error().message()) == ("INVALID_ARG", text)


@pytest.mark.usefixtures("calls")
def test_a_missing_network_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pb_utils, "is_model_ready", lambda name: name != contract.FIELD)
    (response,) = answered(initialized(), {"latents": LATENTS})
    assert response.error().code() == "NOT_FOUND" and "hunyuan3d_field must be loaded" in response.error().message()


@pytest.mark.usefixtures("calls")
def test_a_stopping_server_takes_no_new_mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUNYUAN3D_DRAIN_FILE", str(tmp_path / "drain"))
    model = initialized()
    assert len(answered(model, {"latents": LATENTS})) > 1
    (tmp_path / "drain").touch()
    (response,) = answered(model, {"latents": LATENTS})
    assert response.error().code() == "UNAVAILABLE" and "takes no new meshes" in response.error().message()


def test_a_field_that_fails_or_has_another_shape(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    right = pb_utils.InferenceRequest.answer

    async def failing(call: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        if call.options["model_name"] == contract.FIELD:
            return pb_utils.InferenceResponse([pb_utils.Tensor("field", np.zeros((1, 3), np.float32))])
        return await right(call)

    monkeypatch.setattr(pb_utils.InferenceRequest, "answer", failing)
    *_, response = answered(initialized(), {"latents": LATENTS})
    assert response.error().code() == "INTERNAL" and "field must be [1, " in response.error().message()
    assert len(calls) == 1


def test_bad_parameters_are_refused_at_load() -> None:
    with pytest.raises(pb_utils.TritonModelException, match="max_decodes must be at least 1"):
        initialized(max_decodes="0")

"""The tensors that a server declares and answers are checked against the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hunyuan3d_client import InputInfo, InvalidInput, MockTransport, ModelFailed, ModelInfo, ModelNotReady, contract, requests


def latents(batch: int = 1, dtype: Any = np.float32) -> np.ndarray:
    return np.ones((batch, 3, contract.LATENT_CHANNELS), dtype)


def context(batch: int = 1) -> np.ndarray:
    return np.ones((batch, 2, contract.CONTEXT_WIDTH), np.float16)


def denoise(batch: int = 1, **scales: Any) -> dict[str, np.ndarray]:
    return requests.denoise(latents(batch), 0.5, context(batch), **{"guidance": None, "guidance_scale": None, **scales})[1]


def model(**inputs: InputInfo) -> ModelInfo:
    known = {
        "latents": InputInfo("FP32", (-1, -1, 64)),
        "t": InputInfo("FP32", (-1, 1)),
        "context": InputInfo("FP16", (-1, -1, 1536)),
    }
    return ModelInfo(contract.DIT, inputs={**known, **inputs})


def test_conform_adds_the_axis_the_server_declares() -> None:
    inputs = requests.conform(denoise(2), model())
    assert inputs["t"].shape == (2, 1) and inputs["latents"].shape == (2, 3, 64) and list(inputs) == ["latents", "t", "context"]


def test_conform_leaves_out_optional_inputs() -> None:
    assert set(
        requests.conform(requests.sample(context(), {"seed": 0, "preview_every": 0}), MockTransport().models[contract.SAMPLER])
    ) == {"context", "seed", "preview_every"}


def test_conform_names_what_is_too_much_and_what_is_missing() -> None:
    with pytest.raises(InvalidInput, match="guidance must be left out for hunyuan3d_dit") as error:
        requests.conform(denoise(guidance=3), model())
    assert "\nhint: " in str(error.value)
    with pytest.raises(InvalidInput, match="guidance must be given for hunyuan3d_dit") as error:
        requests.conform(denoise(), model(guidance=InputInfo("FP32", (-1, 1))))
    assert "\nhint: " in str(error.value)


@pytest.mark.parametrize(
    "declared", [InputInfo("BF16", (-1, -1, 1536)), InputInfo("FP16", (-1, -1, 1024)), InputInfo("FP16", (-1, 1536))]
)
def test_conform_refuses_another_contract(declared: InputInfo) -> None:
    with pytest.raises(ModelNotReady, match="context of hunyuan3d_dit must be float16"):
        requests.conform(denoise(), model(context=declared))


def step_answer(**changes: Any) -> dict[str, np.ndarray]:
    answer = {"step": np.int32([2]), "total": np.int32([4]), "t": np.float32([0.5]), "batch": np.int32([3])}
    answer["path"] = np.array([b"guided"], np.object_)
    return {key: value for key, value in {**answer, **changes}.items() if value is not None}


def test_step() -> None:
    assert requests.step(step_answer()) == requests.Step(2, 4, 0.5, None, "guided", 3)
    read_only = latents()
    read_only.flags.writeable = False
    step = requests.step(step_answer(latents=read_only))
    assert step.latents is not None and step.latents.flags.writeable
    assert dataclasses.is_dataclass(step)


@pytest.mark.parametrize("missing", ["step", "total", "t", "batch", "path"])
def test_step_without_an_output_is_the_models_fault(missing: str) -> None:
    with pytest.raises(ModelFailed, match=missing):
        requests.step(step_answer(**{missing: None}))


@pytest.mark.parametrize("answer", [{}, {"velocity": latents(2)}, {"velocity": latents(dtype=np.float16)}])
def test_bad_velocity_is_the_models_fault(answer: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelFailed, match="velocity must be float32"):
        requests.velocity(answer, latents())

"""Calls between models: time limits, errors, and loading a model again. The stand-in does what the real Triton does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import batching
import numpy as np
import pytest
import triton_python_backend_utils as pb_utils
from arrays import Arrays
from denoisers import GUIDED, PLAIN, Denoisers
from device_arrays import Cupy, Tensor
from outcomes import Ended, NoDenoiser
from settings import Settings

WAIT_S = 20.0
STATE = {"latents": np.ones((2, 5, 64), np.float32), "t": np.zeros((2, 1), np.float32)}


class Triton:
    """A stand-in for pb_utils, whose denoisers can be dead, slow or absent. They compute on a GPU: their answers stay there unless
    the call asks for them in CPU memory."""

    TritonModelException = RuntimeError
    PreferredMemory = pb_utils.PreferredMemory
    TRITONSERVER_MEMORY_CPU = pb_utils.TRITONSERVER_MEMORY_CPU

    def __init__(self) -> None:
        self.ready = {PLAIN, GUIDED}
        self.dead: set[str] = set()
        self.answer: Callable[[str, dict[str, np.ndarray]], Awaitable[None]] | None = None
        self.control: list[tuple[str, str]] = []
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.request_ids: list[str] = []

    def is_model_ready(self, name: str) -> bool:
        return name in self.ready

    def Tensor(self, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        return name, array

    def InferenceRequest(
        self,
        *,
        request_id: str,
        model_name: str,
        requested_output_names: list[str],
        inputs: list[Any],
        parameters: dict[str, bool],
        preferred_memory: pb_utils.PreferredMemory | None = None,
    ) -> Any:
        assert requested_output_names == ["velocity"]
        assert parameters == {batching.CHECKED: True}, "the denoiser need not look at the values again"
        self.request_ids.append(request_id)
        on_cpu = preferred_memory is not None and preferred_memory.memory == pb_utils.TRITONSERVER_MEMORY_CPU
        return SimpleNamespace(async_exec=lambda: self._exec(model_name, dict(inputs), on_cpu=on_cpu))

    async def _exec(self, model: str, inputs: dict[str, np.ndarray], *, on_cpu: bool) -> Any:
        self.calls.append((model, inputs["latents"].shape))
        if self.answer is not None:
            await self.answer(model, inputs)
        if model in self.dead:
            return SimpleNamespace(has_error=lambda: True, error=lambda: SimpleNamespace(message=lambda: "not healthy"))
        velocity = inputs["latents"] * 2
        on_device = Cupy().asarray(velocity)
        return SimpleNamespace(has_error=lambda: False, velocity=Tensor("velocity", velocity if on_cpu else on_device))

    def get_output_tensor_by_name(self, response: Any, name: str) -> Any:
        return getattr(response, name)

    def unload_model(self, *, model_name: str) -> None:
        self.control.append(("unload", model_name))
        self.ready.discard(model_name)

    def load_model(self, *, model_name: str) -> None:
        self.control.append(("load", model_name))
        self.ready.add(model_name)
        self.dead.discard(model_name)


class Bytes:
    """Adds up the bytes that were moved."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def moved(self, tensor: str, size_bytes: int) -> None:
        self.found[tensor] = self.found.get(tensor, 0) + size_bytes


def denoisers(triton: Triton, base: Settings, counted: Bytes | None = None, **changes: object) -> Denoisers:
    return Denoisers(triton, dataclasses.replace(base, **changes), Arrays("numpy", triton), counted or Bytes())


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def context(length: int = 3) -> np.ndarray:
    return np.zeros((2, length, 1536), np.float16)


def test_paths_go_to_their_models_and_bytes_are_counted(base: Settings) -> None:
    triton, counted = Triton(), Bytes()

    async def scenario() -> None:
        found = denoisers(triton, base, counted)
        held = found.hold(context())
        for path in ("guided", "plain", "two-batch", "distilled"):
            np.testing.assert_array_equal(await found.velocity(path, STATE, held, "an-id"), STATE["latents"] * 2)

    run(scenario)
    assert [model for model, _ in triton.calls] == [GUIDED, PLAIN, PLAIN, PLAIN]
    assert triton.request_ids == ["an-id"] * 4
    latents = STATE["latents"].nbytes
    assert counted.found == {"context": context().nbytes, "state": 4 * (latents + 8), "velocity": 4 * latents}


def test_an_evaluation_has_a_time_limit(base: Settings) -> None:
    triton = Triton()

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    triton.answer = never

    async def scenario() -> None:
        found = denoisers(triton, base, evaluation_timeout_s=0.05, restart_denoiser=False)
        with pytest.raises(Ended, match="must answer within 0.05 s, got nothing\nhint: raise evaluation_timeout_s"):
            await found.velocity("guided", STATE, found.hold(context()), "an-id")

    run(scenario)
    assert triton.control == []


def test_a_denoiser_that_was_unloaded_is_not_found(base: Settings) -> None:
    triton = Triton()
    triton.dead, triton.ready = {GUIDED}, {PLAIN}

    async def scenario() -> None:
        found = denoisers(triton, base)
        assert found.plain_ready and not found.guided_ready
        with pytest.raises(NoDenoiser, match="hunyuan3d_dit_guided must stay loaded, got unloaded"):
            await found.velocity("guided", STATE, found.hold(context()), "an-id")

    run(scenario)
    assert triton.control == []


def test_distilled_weights_have_no_guided_model(base: Settings) -> None:
    assert not denoisers(Triton(), base, guidance_embed=True).guided_ready


@pytest.mark.parametrize("guidance_embed", [False, True])
def test_a_dead_denoiser_is_loaded_again_while_calls_wait(guidance_embed: bool, base: Settings) -> None:
    triton = Triton()
    triton.dead = {PLAIN}

    async def scenario() -> None:
        found = denoisers(triton, base, guidance_embed=guidance_embed)
        path = "distilled" if guidance_embed else "plain"
        with pytest.raises(Ended, match="hunyuan3d_dit must answer, got not healthy"):
            await found.velocity(path, STATE, found.hold(context()), "an-id")
        assert found.plain_ready, "requests that come now will wait"
        np.testing.assert_array_equal(await found.velocity(path, STATE, found.hold(context()), "an-id"), STATE["latents"] * 2)

    run(scenario)
    assert triton.control == [("unload", PLAIN), ("load", PLAIN)]
    assert [shape for _, shape in triton.calls] == [(2, 5, 64), (1, 1, 64), (2, 5, 64)], "the smallest evaluation decided"


def test_a_denoiser_that_fails_one_evaluation_is_left_alone(base: Settings) -> None:
    triton = Triton()

    async def fail_large(_: str, inputs: dict[str, np.ndarray]) -> None:
        if inputs["latents"].shape[1] > 1:
            raise RuntimeError("out of memory")

    triton.answer = fail_large

    async def scenario() -> None:
        found = denoisers(triton, base)
        for _ in range(2):
            with pytest.raises(Ended, match="hunyuan3d_dit_guided must answer, got out of memory"):
                await found.velocity("guided", STATE, found.hold(context()), "an-id")

    run(scenario)
    assert triton.control == []


def test_a_model_that_cannot_be_loaded_again_stays_an_error(base: Settings, caplog: pytest.LogCaptureFixture) -> None:
    triton = Triton()
    triton.dead = {GUIDED}

    def refuse(*, model_name: str) -> None:
        raise RuntimeError(f"{model_name}: explicit model control is off")

    triton.unload_model = refuse

    async def scenario() -> None:
        found = denoisers(triton, base)
        for _ in range(2):
            with pytest.raises(Ended, match="not healthy"):
                await found.velocity("guided", STATE, found.hold(context()), "an-id")

    run(scenario)
    assert "hunyuan3d_dit_guided must load again" in caplog.text and "explicit model control is off" in caplog.text


def test_without_the_parameter_nothing_is_loaded_again(base: Settings) -> None:
    triton = Triton()
    triton.dead = {GUIDED}

    async def scenario() -> None:
        found = denoisers(triton, base, restart_denoiser=False)
        with pytest.raises(Ended):
            await found.velocity("guided", STATE, found.hold(context()), "an-id")

    run(scenario)
    assert len(triton.calls) == 1 and triton.control == []

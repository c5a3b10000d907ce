"""The denoisers as the stepper sees them: calls between models, with a time limit, and a new start after a crash.

When a denoiser's Python process dies, Triton reports the model as ready, answers every call of it with an error and does not
start it again; only unloading and loading it again does (seen on Triton 2.51). An error does not say whether the process died or
one evaluation failed. Therefore, after an error, the smallest possible evaluation is tried, and the denoiser is loaded again if
that fails too.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import model_calls
import numpy as np
from arrays import Arrays
from metrics import Metrics
from outcomes import Ended, NoDenoiser
from sample_request import CHANNELS, SamplingPath
from settings import Settings

PLAIN, GUIDED = "hunyuan3d_dit", "hunyuan3d_dit_guided"
_CONTEXT_WIDTH = 1536
_PROBE_TIMEOUT_S = 60.0  # long, because the smallest evaluation may have to wait for large ones

logger = logging.getLogger(__name__)


class Denoisers:
    """Implements stepper.Denoiser by calls between models; `triton` is pb_utils."""

    def __init__(self, triton: Any, settings: Settings, arrays: Arrays, metrics: Metrics) -> None:
        self._triton = triton
        self._settings = settings
        self._arrays = arrays
        self._metrics = metrics
        self._revivals: dict[str, asyncio.Task[None]] = {}

    @property
    def plain_ready(self) -> bool:
        return self._ready(PLAIN)

    @property
    def guided_ready(self) -> bool:
        return not self._settings.guidance_embed and self._ready(GUIDED)

    def _ready(self, model: str) -> bool:
        return model in self._revivals or self._triton.is_model_ready(model)  # while it is loaded again, calls wait for it

    def hold(self, context: Any) -> Any:
        """A tensor that many calls can take. Only the first of them copies it into Triton's memory."""
        self._metrics.moved("context", context.nbytes)
        return self._arrays.tensor("context", context)

    async def velocity(self, path: SamplingPath, state: dict[str, Any], context: Any, request_id: str) -> Any:
        """One evaluation. Raises NoDenoiser when the model has been unloaded, Ended when it fails or takes too long."""
        model = GUIDED if path == "guided" else PLAIN
        if (revival := self._revivals.get(model)) is not None:
            await asyncio.shield(revival)
        self._metrics.moved("state", sum(array.nbytes for array in state.values()))
        tensors = [*(self._arrays.tensor(name, array) for name, array in state.items()), context]
        try:
            velocity = await self._call(model, tensors, self._settings.evaluation_timeout_s, request_id)
        except Ended as error:
            if not self._ready(model):
                raise NoDenoiser(f"{model} must stay loaded, got unloaded\nhint: load it again") from error
            if self._settings.restart_denoiser and model not in self._revivals:
                task = asyncio.get_running_loop().create_task(self._revive(model))
                self._revivals[model] = task
                task.add_done_callback(lambda _: self._revivals.pop(model))
            raise
        self._metrics.moved("velocity", velocity.nbytes)
        return velocity

    async def _call(self, model: str, tensors: list[Any], limit_s: float, request_id: str) -> Any:
        (velocity,) = await model_calls.call(
            self._triton,
            model,
            tensors,
            ["velocity"],
            limit_s=limit_s,
            caller="hunyuan3d_sampler",
            request_id=request_id,
            **self._arrays.call_options(),
        )
        return self._arrays.array(velocity)

    async def _revive(self, model: str) -> None:
        try:
            await self._call(
                model, self._smallest(model), min(_PROBE_TIMEOUT_S, self._settings.evaluation_timeout_s), "revival"
            )
            return
        except Ended as error:
            logger.warning("%s fails even the smallest evaluation and is loaded again: %s", model, error)
        try:  # loading alone would do nothing, because Triton sees that the model has not changed
            await asyncio.to_thread(self._triton.unload_model, model_name=model)
            await asyncio.to_thread(self._triton.load_model, model_name=model)
        except Exception:
            logger.exception("%s must load again", model)

    def _smallest(self, model: str) -> list[Any]:
        """Inputs of one row, with one latent token and one context token."""
        scale = "guidance_scale" if model == GUIDED else "guidance" if self._settings.guidance_embed else None
        inputs = {
            "latents": np.zeros((1, 1, CHANNELS), np.float32),
            "t": np.zeros((1, 1), np.float32),
            "context": np.zeros((1, 1, _CONTEXT_WIDTH), np.float16),
            **({scale: np.ones((1, 1), np.float32)} if scale else {}),
        }
        return [self._triton.Tensor(name, array) for name, array in inputs.items()]

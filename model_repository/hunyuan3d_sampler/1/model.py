"""Triton's side of the sampler: it takes requests, and sends a response for each step."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import parameters
import triton_python_backend_utils as pb_utils
from arrays import Arrays
from denoisers import GUIDED, Denoisers
from identity import deployed_weights
from metrics import Metrics
from outcomes import outcome
from previews import Previews
from sample_request import SampleRequest, SamplingPath, choose_path, decode, numbers_to_draw
from settings import Settings
from stepper import CONTEXTS_HELD, Stepper
from streaming import Drain, Stream, input_tensors, log_to_triton
from trajectory import Progress, Trajectory

_PRESET_FILE = "preset.json"
SERVED = "served"  # a request that asks for this output alone is answered with the weights of each model, also while draining
_DRAWN_AT_ONCE = 2**17  # a millisecond of noise; the event loop steps all other samples meanwhile, so more is drawn in a thread
VAE_LATENTS = "vae_latents"  # computed only for requests that ask for this output, or that name no outputs at all


class TritonPythonModel:
    contexts_held = CONTEXTS_HELD  # bench/serving.py measures what this saves, by a subclass that holds none

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        try:
            self._settings = parameters.parse(Settings, parameters.of_config(config))
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        log_to_triton()
        self._inputs = [tensor["name"] for tensor in config["input"]]
        folder = Path(args["model_repository"])
        self._served = json.dumps(deployed_weights(folder.parent, args["model_version"]))
        preset = _deployed_preset(folder / args["model_version"])
        self._num_latents, self._scale_factor = preset.get("num_latents"), preset.get("scale_factor")
        self._metrics = Metrics(pb_utils.MetricFamily)
        self._arrays = Arrays(self._settings.arrays, pb_utils)
        self._denoisers = Denoisers(pb_utils, self._settings, self._arrays, self._metrics)
        self._stepper = Stepper(self._denoisers, self._settings, self._metrics, contexts_held=self.contexts_held)
        self._previews = Previews(self._settings.preview_mib * 2**20)
        self._drain = Drain()
        self._drawing = ThreadPoolExecutor(1, "noise")
        self._said: set[str] = set()

    async def execute(self, requests: list) -> None:
        for request in requests:
            stream = _Stream(request, self._arrays, self._metrics, self._previews, self._scale_factor)
            try:
                if stream.requested == {SERVED}:
                    stream.send([pb_utils.Tensor(SERVED, np.array([self._served.encode()], np.object_))], final=True)
                else:
                    await self._admit(request, stream)
            except Exception as error:  # only this request is refused
                self._metrics.ended(outcome(error))
                stream.fail(error)

    async def _admit(self, request: object, stream: _Stream) -> None:
        self._drain.check("samples")
        tensors = input_tensors(request, self._inputs)
        if numbers_to_draw(tensors, self._num_latents) <= _DRAWN_AT_ONCE:
            decoded = decode(tensors, self._settings, self._num_latents)
        else:
            loop = asyncio.get_running_loop()
            decoded = await loop.run_in_executor(self._drawing, decode, tensors, self._settings, self._num_latents)
        ready = {"plain_ready": self._denoisers.plain_ready, "guided_ready": self._denoisers.guided_ready}
        path = choose_path(decoded, self._settings, **ready)
        self._say_once(decoded, path)
        self._stepper.submit(Trajectory(self._arrays.upload(decoded), path, stream.request_id), stream)

    def finalize(self) -> None:
        self._drawing.shutdown(wait=False, cancel_futures=True)

    def _say_once(self, decoded: SampleRequest, path: SamplingPath) -> None:
        fallback = path == "two-batch" and decoded.negative_context is None
        if fallback and path not in self._said:
            self._said.add(path)
            pb_utils.Logger.log_warn(f"{GUIDED} is not loaded: guidance runs as two-batch, at up to 1.6 times the compute")
        if decoded.off_reason is not None and decoded.off_reason not in self._said:
            self._said.add(decoded.off_reason)
            pb_utils.Logger.log_warn(
                f"A tolerance has no effect on some requests, all their steps are evaluated: {decoded.off_reason}"
            )


class _Stream(Stream):
    """Sends the responses of one request; implements stepper.Sink."""

    def __init__(
        self, request: object, arrays: Arrays, metrics: Metrics, previews: Previews, scale_factor: float | None
    ) -> None:
        super().__init__(request)
        self._previews = previews
        self._scale_factor = scale_factor if VAE_LATENTS in self.requested else None
        self._arrays = arrays
        self._metrics = metrics

    def step(self, progress: Progress) -> None:
        outputs = [
            pb_utils.Tensor("step", np.array([progress.step], np.int32)),
            pb_utils.Tensor("total", np.array([progress.total], np.int32)),
            pb_utils.Tensor("t", np.array([progress.t], np.float32)),
            pb_utils.Tensor("batch", np.array([progress.batch], np.int32)),
            pb_utils.Tensor("path", np.array([progress.path.encode()], np.object_)),
            pb_utils.Tensor("evaluated", np.array([progress.evaluated], np.int32)),
        ]
        latents = progress.latents
        if latents is not None and self._may_send(latents, done=progress.done):
            outputs.append(pb_utils.Tensor("latents", self._arrays.host(latents)))
            self._metrics.moved("response", latents.nbytes)
        if progress.done:
            outputs += self._last(progress)
        self.send(outputs, final=progress.done)
        if progress.done:
            self._previews.forget(self)
            shape = f"B {progress.samples}, L {progress.latents.shape[1]}, T {progress.context_tokens}"
            evaluations = f"{min(progress.evaluations)}..{max(progress.evaluations)} evaluations"
            self.done(f"{progress.total} steps, path {progress.path}, {shape}, {evaluations}")

    def fail(self, error: Exception) -> None:
        self._previews.forget(self)
        super().fail(error)

    def _may_send(self, latents: np.ndarray, *, done: bool) -> bool:
        if done or self._previews.take(self, latents.nbytes):
            return True
        self._metrics.preview_left_out()
        return False

    def _last(self, progress: Progress) -> list[object]:
        """The outputs of the final response alone."""
        outputs = [
            pb_utils.Tensor("network_evaluations", np.array(progress.evaluations, np.int32)),
            pb_utils.Tensor("forecast_error", np.array(progress.forecast_errors, np.float32)),
        ]
        if self._scale_factor is not None:
            scaled = self._arrays.host(progress.latents) / np.float32(self._scale_factor)
            outputs.append(pb_utils.Tensor(VAE_LATENTS, scaled))
        return outputs


def _deployed_preset(folder: Path) -> dict[str, object]:
    path = folder / _PRESET_FILE
    return json.loads(path.read_text()) if path.is_file() else {}

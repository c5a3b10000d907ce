"""Triton around the sampler: requests in, one response for each step out."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from arrays import Arrays
from denoisers import GUIDED, Denoisers
from metrics import Metrics
from outcomes import Cancelled, Expired, Overloaded, code, outcome
from settings import Settings
from stepper import Stepper
from trajectory import Trajectory, choose_path, decode

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_PRESET_FILE = "preset.json"
# A stream has no code for an error, and a call between models loses it, so the client and hunyuan3d_sampler_unary set this
# request parameter: its errors come as the output `path` holding code and text, with no other output beside it.
ERRORS_AS_OUTPUTS = "errors_as_outputs"
# The container's entrypoint names a file by this variable; once it is there, the server is about to stop and takes nothing new.
DRAIN_FILE = "HUNYUAN3D_DRAIN_FILE"
_LONGEST_ID = 64
VAE_LATENTS = "vae_latents"  # made only for requests that name it, or name no outputs at all

logger = logging.getLogger(__name__)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        try:
            self._settings = Settings.parse({name: value["string_value"] for name, value in config["parameters"].items()})
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        logging.basicConfig(handlers=[_TritonLog()], level=logging.INFO, format="%(message)s", force=True)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        preset = _deployed_preset(Path(args["model_repository"]) / args["model_version"])
        self._num_latents, self._scale_factor = preset.get("num_latents"), preset.get("scale_factor")
        self._metrics = Metrics(pb_utils.MetricFamily)
        self._arrays = Arrays(self._settings.arrays, pb_utils)
        self._denoisers = Denoisers(pb_utils, self._settings, self._arrays, self._metrics)
        self._stepper = Stepper(self._denoisers, self._settings, self._metrics)
        self._drain_file = Path(os.environ[DRAIN_FILE]) if DRAIN_FILE in os.environ else None
        self._said: set[str] = set()

    async def execute(self, requests: list) -> None:
        for request in requests:
            stream = _Stream(request, self._arrays, self._metrics, self._scale_factor)
            try:
                self._admit(request, stream)
            except Exception as error:  # a refused request is its own client's news only
                self._metrics.ended(outcome(error))
                stream.fail(error)

    def _admit(self, request: object, stream: _Stream) -> None:
        if self._drain_file is not None and self._drain_file.exists():
            raise Overloaded("server must not be stopping, got a new sample\nhint: another server takes it")
        decoded = decode(_tensors(request, self._inputs), self._settings, self._num_latents)
        ready = {"plain_ready": self._denoisers.plain_ready, "guided_ready": self._denoisers.guided_ready}
        path = choose_path(decoded, self._settings, **ready)
        self._say_once(decoded, path)
        self._stepper.submit(Trajectory(self._arrays.upload(decoded), path, stream.request_id), stream)

    def _say_once(self, decoded: object, path: str) -> None:
        fallback = path == "two-batch" and decoded.negative_context is None
        if fallback and path not in self._said:
            self._said.add(path)
            pb_utils.Logger.log_warn(f"{GUIDED} is not loaded: guidance runs as two-batch, at up to 1.6 times the compute")


class _Stream:
    """One request's responses (stepper.Sink)."""

    def __init__(self, request: object, arrays: Arrays, metrics: Metrics, scale_factor: float | None) -> None:
        self.request_id = loggable(request.request_id())
        self._began = time.monotonic()
        self._scale_factor = scale_factor if VAE_LATENTS in request.requested_output_names() else None
        self._sender = request.get_response_sender()
        self._arrays = arrays
        self._metrics = metrics
        self._errors_as_outputs = ERRORS_AS_OUTPUTS in json.loads(request.parameters() or "{}")
        timeout_us = request.timeout()
        self._deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else None

    def cancelled(self) -> Exception | None:
        if self._sender.is_cancelled():
            return Cancelled("the client cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return Expired("the request's deadline has passed")
        return None

    def step(self, trajectory: Trajectory) -> None:
        outputs = [
            pb_utils.Tensor("step", np.array([trajectory.step], np.int32)),
            pb_utils.Tensor("total", np.array([trajectory.total], np.int32)),
            pb_utils.Tensor("t", np.array([trajectory.t], np.float32)),
            pb_utils.Tensor("batch", np.array([trajectory.batch], np.int32)),
            pb_utils.Tensor("path", np.array([trajectory.path.encode()], np.object_)),
        ]
        if trajectory.preview_due:
            outputs.append(pb_utils.Tensor("latents", self._arrays.host(trajectory.latents)))
            self._metrics.moved("response", trajectory.latents.nbytes)
        if trajectory.done and self._scale_factor is not None:
            scaled = self._arrays.host(trajectory.latents) / np.float32(self._scale_factor)
            outputs.append(pb_utils.Tensor(VAE_LATENTS, scaled))
        self._sender.send(pb_utils.InferenceResponse(outputs), flags=_FINAL if trajectory.done else 0)
        if trajectory.done:
            shape = f"B {trajectory.samples}, L {trajectory.group[0]}, T {trajectory.group[1]}"
            line = f"done: {trajectory.total} steps, path {trajectory.path}, {shape}"
            asyncio.get_running_loop().call_soon(self._log, logging.INFO, line)  # it takes a while: the count comes first

    def fail(self, error: Exception) -> None:
        name = code(error)
        if self._errors_as_outputs:
            answer = pb_utils.InferenceResponse(
                [pb_utils.Tensor("path", np.array([name.encode(), str(error).encode()], np.object_))]
            )
        else:  # Triton adds TritonError to its module only after models are imported, so it is looked up here
            answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, name)))
        self._sender.send(answer, flags=_FINAL)
        kind = outcome(error)
        self._log(logging.ERROR if kind == "failed" else logging.INFO, f"{kind}: {str(error).partition(chr(10))[0]}")

    def _log(self, level: int, text: str) -> None:
        logger.log(level, "request %s %s, after %.3f s", self.request_id, text, time.monotonic() - self._began)


def loggable(request_id: str) -> str:
    """A client's id in one word: a log's line, and a comma in the ids of a shared call, are ours to set."""
    return re.sub(r"[^\w.:-]", "?", request_id, flags=re.ASCII)[:_LONGEST_ID] or "-"


class _TritonLog(logging.Handler):
    """The server's own log takes what the plain modules say."""

    def emit(self, record: logging.LogRecord) -> None:
        log = pb_utils.Logger.log_error if record.levelno >= logging.ERROR else pb_utils.Logger.log_warn
        (pb_utils.Logger.log_info if record.levelno < logging.WARNING else log)(self.format(record))


def _tensors(request: object, names: list[str]) -> dict[str, np.ndarray]:
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}


def _deployed_preset(folder: Path) -> dict[str, object]:
    path = folder / _PRESET_FILE
    return json.loads(path.read_text()) if path.is_file() else {}

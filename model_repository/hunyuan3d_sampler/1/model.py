"""Triton's side of the sampler: it takes requests, and sends a response for each step."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
import parameters
import triton_python_backend_utils as pb_utils
from arrays import Arrays
from denoisers import GUIDED, Denoisers
from metrics import Metrics
from outcomes import Cancelled, Expired, Overloaded, code, outcome
from settings import Settings
from stepper import CONTEXTS_HELD, Stepper
from trajectory import SampleRequest, SamplingPath, Trajectory, choose_path, decode

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_PRESET_FILE = "preset.json"
# Triton has no code for an error in a stream, and drops the code in a call between models. The client and
# hunyuan3d_sampler_unary therefore set this request parameter. With it, an error is the output `error`, which holds the code's
# name and the text, and the response has no other output.
ERRORS_AS_OUTPUTS = "errors_as_outputs"
ERROR = "error"
# An environment variable with the path of a file. The container's entrypoint makes that file before it stops the server; from
# then on new samples are refused.
DRAIN_FILE = "HUNYUAN3D_DRAIN_FILE"
_LONGEST_ID = 64
VAE_LATENTS = "vae_latents"  # computed only for requests that ask for this output, or that name no outputs at all

logger = logging.getLogger(__name__)


class TritonPythonModel:
    contexts_held = CONTEXTS_HELD  # bench/serving.py measures what this saves, by a subclass that holds none

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        try:
            self._settings = parameters.parse(Settings, parameters.of_config(config))
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        logging.basicConfig(handlers=[_TritonLog()], level=logging.INFO, format="%(message)s", force=True)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        preset = _deployed_preset(Path(args["model_repository"]) / args["model_version"])
        self._num_latents, self._scale_factor = preset.get("num_latents"), preset.get("scale_factor")
        self._metrics = Metrics(pb_utils.MetricFamily)
        self._arrays = Arrays(self._settings.arrays, pb_utils)
        self._denoisers = Denoisers(pb_utils, self._settings, self._arrays, self._metrics)
        self._stepper = Stepper(self._denoisers, self._settings, self._metrics, contexts_held=self.contexts_held)
        self._drain_file = Path(os.environ[DRAIN_FILE]) if DRAIN_FILE in os.environ else None
        self._said: set[str] = set()

    async def execute(self, requests: list) -> None:
        for request in requests:
            stream = _Stream(request, self._arrays, self._metrics, self._scale_factor)
            try:
                self._admit(request, stream)
            except Exception as error:  # only this request is refused
                self._metrics.ended(outcome(error))
                stream.fail(error)

    def _admit(self, request: object, stream: _Stream) -> None:
        if self._drain_file is not None and self._drain_file.exists():
            raise Overloaded("The server is stopping and takes no new samples.\nhint: send the request to another server")
        decoded = decode(_tensors(request, self._inputs), self._settings, self._num_latents)
        ready = {"plain_ready": self._denoisers.plain_ready, "guided_ready": self._denoisers.guided_ready}
        path = choose_path(decoded, self._settings, **ready)
        self._say_once(decoded, path)
        self._stepper.submit(Trajectory(self._arrays.upload(decoded), path, stream.request_id), stream)

    def _say_once(self, decoded: SampleRequest, path: SamplingPath) -> None:
        fallback = path == "two-batch" and decoded.negative_context is None
        if fallback and path not in self._said:
            self._said.add(path)
            pb_utils.Logger.log_warn(f"{GUIDED} is not loaded: guidance runs as two-batch, at up to 1.6 times the compute")


class _Stream:
    """Sends the responses of one request; implements stepper.Sink."""

    def __init__(self, request: object, arrays: Arrays, metrics: Metrics, scale_factor: float | None) -> None:
        self.request_id = loggable(request.request_id())
        self._began = time.monotonic()
        self._told = 0  # the last step that the client was told of
        requested = request.requested_output_names()
        self._scale_factor = scale_factor if VAE_LATENTS in requested else None
        self._sender = request.get_response_sender()
        self._arrays = arrays
        self._metrics = metrics
        # Triton would drop an output that was not asked for, and the client would get an empty response.
        self._errors_as_outputs = ERROR in requested and ERRORS_AS_OUTPUTS in json.loads(request.parameters() or "{}")
        timeout_us = request.timeout()
        self._deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else None

    def cancelled(self) -> Exception | None:
        if self._sender.is_cancelled():
            return Cancelled("the client cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return Expired("the request's deadline has passed")
        return None

    def step(self, trajectory: Trajectory) -> None:
        """Sends a response for each step since the last call, those of size 0 included, which needed no evaluation."""
        for index in range(self._told + 1, trajectory.step + 1):
            self._respond(trajectory, index)
        self._told = trajectory.step
        if trajectory.done:
            shape = f"B {trajectory.samples}, L {trajectory.group[0]}, T {trajectory.group[1]}"
            line = f"done: {trajectory.total} steps, path {trajectory.path}, {shape}"
            asyncio.get_running_loop().call_soon(
                self._log, logging.INFO, line
            )  # later, because logging is slow and the metrics come first

    def _respond(self, trajectory: Trajectory, index: int) -> None:
        last = index == trajectory.total
        outputs = [
            pb_utils.Tensor("step", np.array([index], np.int32)),
            pb_utils.Tensor("total", np.array([trajectory.total], np.int32)),
            pb_utils.Tensor("t", np.array([trajectory.request.sigmas[index]], np.float32)),
            pb_utils.Tensor("batch", np.array([trajectory.batch], np.int32)),
            pb_utils.Tensor("path", np.array([trajectory.path.encode()], np.object_)),
        ]
        if trajectory.preview_due(index):
            outputs.append(pb_utils.Tensor("latents", self._arrays.host(trajectory.latents)))
            self._metrics.moved("response", trajectory.latents.nbytes)
        if last and self._scale_factor is not None:
            scaled = self._arrays.host(trajectory.latents) / np.float32(self._scale_factor)
            outputs.append(pb_utils.Tensor(VAE_LATENTS, scaled))
        self._sender.send(pb_utils.InferenceResponse(outputs), flags=_FINAL if last else 0)

    def fail(self, error: Exception) -> None:
        name = code(error)
        if self._errors_as_outputs:
            answer = pb_utils.InferenceResponse(
                [pb_utils.Tensor(ERROR, np.array([name.encode(), str(error).encode()], np.object_))]
            )
        else:  # TritonError is looked up here, because pb_utils gets it only after models are imported
            answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, name)))
        self._sender.send(answer, flags=_FINAL)
        kind = outcome(error)
        self._log(logging.ERROR if kind == "failed" else logging.INFO, f"{kind}: {str(error).partition(chr(10))[0]}")

    def _log(self, level: int, text: str) -> None:
        logger.log(level, "request %s %s, after %.3f s", self.request_id, text, time.monotonic() - self._began)


def loggable(request_id: str) -> str:
    """A client's request id as one word: it must not start a new line in the log, nor look like several ids with commas."""
    return re.sub(r"[^\w.:-]", "?", request_id, flags=re.ASCII)[:_LONGEST_ID] or "-"


class _TritonLog(logging.Handler):
    """Passes the log records of the plain modules on to the server's log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = pb_utils.Logger.log_error if record.levelno >= logging.ERROR else pb_utils.Logger.log_warn
        (pb_utils.Logger.log_info if record.levelno < logging.WARNING else log)(self.format(record))


def _tensors(request: object, names: list[str]) -> dict[str, np.ndarray]:
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}


def _deployed_preset(folder: Path) -> dict[str, object]:
    path = folder / _PRESET_FILE
    return json.loads(path.read_text()) if path.is_file() else {}

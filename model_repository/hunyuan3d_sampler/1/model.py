"""Triton around the sampler: requests in, one response for each step out."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from settings import Settings
from stepper import Stepper
from trajectory import NoDenoiser, Trajectory, choose_path, decode

PLAIN, GUIDED = "hunyuan3d_dit", "hunyuan3d_dit_guided"
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_PRESET_FILE = "preset.json"
# A call between models loses an error's code (every one arrives as INTERNAL), so hunyuan3d_sampler_unary sets this request
# parameter: its errors come as the output `path` holding code and text, with no other output beside it.
ERRORS_AS_OUTPUTS = "errors_as_outputs"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        try:
            self._settings = Settings.parse({name: value["string_value"] for name, value in config["parameters"].items()})
        except ValueError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._num_latents = _deployed_num_latents(Path(args["model_repository"]) / args["model_version"])
        self._stepper = Stepper(self._denoise, max_batch=self._settings.max_batch)
        self._said: set[str] = set()

    async def execute(self, requests: list) -> None:
        for request in requests:
            stream = _Stream(request)
            try:
                self._admit(request, stream)
            except Exception as error:  # a refused request is its own client's news only
                stream.fail(error)

    def _admit(self, request: object, stream: _Stream) -> None:
        decoded = decode(_tensors(request, self._inputs), self._settings, self._num_latents)
        limit = self._settings.max_trajectories
        if self._stepper.samples + len(decoded.latents) > limit:
            raise Overloaded(
                f"samples in progress must stay within {limit}, got {self._stepper.samples} and {len(decoded.latents)} more"
            )
        path = choose_path(
            decoded,
            self._settings,
            plain_ready=pb_utils.is_model_ready(PLAIN),
            guided_ready=not self._settings.guidance_embed and pb_utils.is_model_ready(GUIDED),
        )
        self._say_once(decoded, path)
        self._stepper.submit(Trajectory(decoded, path), stream)

    def _say_once(self, decoded: object, path: str) -> None:
        fallback = path == "two-batch" and decoded.negative_context is None
        if fallback and path not in self._said:
            self._said.add(path)
            pb_utils.Logger.log_warn(f"{GUIDED} is not loaded: guidance runs as two-batch, at up to 1.6 times the compute")

    async def _denoise(self, path: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
        call = pb_utils.InferenceRequest(
            model_name=GUIDED if path == "guided" else PLAIN,
            requested_output_names=["velocity"],
            inputs=[pb_utils.Tensor(name, value) for name, value in tensors.items()],
        )
        response = await call.async_exec()
        if response.has_error():
            raise RuntimeError(f"{call.model_name()} failed: {response.error().message()}")
        return pb_utils.get_output_tensor_by_name(response, "velocity").as_numpy()


class Overloaded(RuntimeError):
    """Refused at once because too much is in progress."""


class Cancelled(RuntimeError):
    """The client went away, or its deadline passed."""


# Exception class -> the name of its code in pb_utils.TritonError, which Triton adds to the module only after import.
_CODES = {ValueError: "INVALID_ARG", NoDenoiser: "NOT_FOUND", Overloaded: "UNAVAILABLE", Cancelled: "CANCELLED"}


class _Stream:
    """One request's responses (stepper.Sink)."""

    def __init__(self, request: object) -> None:
        self._sender = request.get_response_sender()
        self._errors_as_outputs = ERRORS_AS_OUTPUTS in json.loads(request.parameters() or "{}")
        timeout_us = request.timeout()
        self._deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else None

    def cancelled(self) -> Exception | None:
        if self._sender.is_cancelled():
            return Cancelled("the client cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            return Cancelled("the request's deadline has passed")
        return None

    def step(self, trajectory: Trajectory) -> None:
        outputs = [
            pb_utils.Tensor("step", np.array([trajectory.step], np.int32)),
            pb_utils.Tensor("total", np.array([trajectory.total], np.int32)),
            pb_utils.Tensor("t", np.array([trajectory.t], np.float32)),
            pb_utils.Tensor("path", np.array([trajectory.path.encode()], np.object_)),
        ]
        if trajectory.preview_due:
            outputs.append(pb_utils.Tensor("latents", trajectory.latents))
        self._sender.send(pb_utils.InferenceResponse(outputs), flags=_FINAL if trajectory.done else 0)

    def fail(self, error: Exception) -> None:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "INTERNAL")
        if self._errors_as_outputs:
            answer = pb_utils.InferenceResponse(
                [pb_utils.Tensor("path", np.array([code.encode(), str(error).encode()], np.object_))]
            )
        else:
            answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, code)))
        self._sender.send(answer, flags=_FINAL)


def _tensors(request: object, names: list[str]) -> dict[str, np.ndarray]:
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}


def _deployed_num_latents(folder: Path) -> int | None:
    path = folder / _PRESET_FILE
    return int(json.loads(path.read_text())["num_latents"]) if path.is_file() else None

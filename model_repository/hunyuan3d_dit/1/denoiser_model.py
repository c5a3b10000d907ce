"""Triton's Python backend around a denoiser (configs/cpu.pbtxt, configs/torch.pbtxt); a TensorRT plan needs none of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import batching
import parameters
import triton_python_backend_utils as pb_utils

# Runtime -> the module with its Options, Denoiser, LIBRARY and how tensors become its arrays; only the one that is asked for
# is imported.
RUNTIMES = {"onnxruntime": "onnxruntime_denoiser", "torch": "torch_denoiser"}
_TRITONS_OWN = "FORCE_CPU_ONLY_INPUT_TENSORS"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items() if name != _TRITONS_OWN}
        name, model_file = given.pop("runtime", None), given.pop("model_file", "")
        if name not in RUNTIMES:
            raise pb_utils.TritonModelException(f"runtime must be one of {', '.join(RUNTIMES)}, got {name!r}")
        try:
            self._runtime = importlib.import_module(RUNTIMES[name])
        except ModuleNotFoundError as error:
            raise pb_utils.TritonModelException(
                f"runtime {name} must have its packages in the server's Python, missing {error.name}\n"
                'hint: pip install "hunyuan3d-triton[export]" there'
            ) from error
        path = Path(args["model_repository"]) / args["model_version"] / model_file
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._denoiser = self._runtime.Denoiser(path, parameters.parse(self._runtime.Options, given))

    def execute(self, requests: list) -> list:
        batch = [
            {name: self._runtime.to_array(pb_utils.get_input_tensor_by_name(request, name)) for name in self._inputs}
            for request in requests
        ]
        results = batching.velocities(batch, self._denoiser.evaluate, self._runtime.LIBRARY)
        return [self._response(request.request_id(), result) for request, result in zip(requests, results, strict=True)]

    def _response(self, request_id: str, result: object) -> pb_utils.InferenceResponse:
        if isinstance(result, Exception):
            pb_utils.Logger.log_error(f"request {request_id!r} failed: {result!r}")
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([self._runtime.to_tensor(pb_utils.Tensor, "velocity", result)])

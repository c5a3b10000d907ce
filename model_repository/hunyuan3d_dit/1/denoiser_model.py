"""Triton's Python backend around a denoiser (configs/cpu.pbtxt); TensorRT serves this model without any of it."""

from __future__ import annotations

import json
from pathlib import Path

import triton_python_backend_utils as pb_utils
from onnxruntime_denoiser import Denoiser

_PARAMETERS = ("runtime", "model_file", "threads")


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        if set(parameters) != set(_PARAMETERS) or parameters["runtime"] != "onnxruntime":
            raise pb_utils.TritonModelException(
                f"parameters must be {', '.join(_PARAMETERS)} with runtime onnxruntime, got {parameters}"
            )
        path = Path(args["model_repository"]) / args["model_version"] / parameters["model_file"]
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._denoiser = Denoiser(path, threads=int(parameters["threads"]))

    def execute(self, requests: list) -> list:
        batch = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs} for request in requests
        ]
        return [_response(result) for result in self._denoiser.velocity(batch)]


def _response(result: object) -> pb_utils.InferenceResponse:
    if isinstance(result, Exception):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([pb_utils.Tensor("velocity", result)])

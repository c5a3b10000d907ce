"""Triton's Python backend around the image encoder (configs/cpu.pbtxt); a TensorRT plan needs none of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "hunyuan3d_dit" / "1"))

import encoder
import onnx_graph
import parameters


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        given = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
        path = Path(args["model_repository"]) / args["model_version"] / given.pop("model_file")
        self._encoder = encoder.Encoder(path, parameters.parse(onnx_graph.Options, given))

    def execute(self, requests: list) -> list:
        pixels = [pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        return [_response(result) for result in self._encoder.contexts(pixels)]


def _response(result: object) -> pb_utils.InferenceResponse:
    if isinstance(result, Exception):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([pb_utils.Tensor("context", result)])

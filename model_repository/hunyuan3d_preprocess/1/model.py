"""Triton around image_preprocessing: image files in, the encoder's pixels out."""

from __future__ import annotations

import json
from pathlib import Path

import image_preprocessing
import triton_python_backend_utils as pb_utils

CONDITIONER = "hunyuan3d_conditioner"
_MANIFEST = "manifest.json"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # The encoder that is deployed beside this model says what it takes.
        path = Path(args["model_repository"]).parent / CONDITIONER / args["model_version"] / _MANIFEST
        serving = json.loads(path.read_text())["serving"]
        self._size, self._views = serving["image_size"], serving["views"]

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def _respond(self, request: object) -> pb_utils.InferenceResponse:
        try:
            images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
            if not 1 <= len(images) <= self._views:
                raise ValueError(f"image must hold 1 to {self._views} views, got {len(images)}")
            pixels = image_preprocessing.pixels(images, self._size)
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:  # this request's error, and nobody else's
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])

"""Triton's side of preprocessing: image files -> the pixels that the image encoder takes."""

from __future__ import annotations

import json
from pathlib import Path

import image_preprocessing
import parameters
import triton_python_backend_utils as pb_utils

CONDITIONER = "hunyuan3d_conditioner"
_MANIFEST = "manifest.json"
_MORE_VIEWS = "an encoder for several views of one object: hunyuan3d-export conditioner --views 4, then deploy it"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters.parse(parameters.NoOptions, parameters.of_config(json.loads(args["model_config"])))
        # The manifest of the deployed encoder says how large its pictures are and how many views it takes.
        path = Path(args["model_repository"]).parent / CONDITIONER / args["model_version"] / _MANIFEST
        serving = json.loads(path.read_text())["serving"]
        self._size, self._views = serving["image_size"], serving["views"]

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def _respond(self, request: object) -> object:
        try:
            return self._encode(image_preprocessing.pixels(self._decode(request), self._size))
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:  # only this request fails
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _decode(self, request: object) -> list[bytes]:
        """The files of the request's views. Raises ValueError when the encoder does not take so many."""
        images = list(pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1))
        if not 1 <= len(images) <= self._views:
            most = "1 picture" if self._views == 1 else f"1 to {self._views} pictures"
            hint = f"\nhint: {_MORE_VIEWS}" if self._views == 1 and images else ""
            raise ValueError(f"image must hold {most}, got {len(images)}{hint}")
        return images

    def _encode(self, pixels: object) -> object:
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])

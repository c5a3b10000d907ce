"""The image encoder on ONNX Runtime (configs/cpu.pbtxt): requests of equal shape are one batch. Knows nothing of Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from batching import InvalidInput, in_groups
from onnx_graph import Options, open_graph


class Encoder:
    """One ONNX graph.

    Raises FileNotFoundError when the graph is not deployed.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self._session = open_graph(path, options)
        views = self._session.get_inputs()[0].shape[1]
        self._single_view = isinstance(views, int)

    def contexts(self, requests: Sequence[np.ndarray]) -> list[np.ndarray | InvalidInput]:
        """For each request, pixels [B, V, 3, P, P] float32 -> context [B, T, 1536] float16, or the reason there is none."""
        return in_groups([{"pixels": pixels} for pixels in requests], self._encode, self._problem, np)

    def _encode(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        (context,) = self._session.run(["context"], dict(tensors))
        return context

    def _problem(self, tensors: Mapping[str, np.ndarray]) -> InvalidInput | None:
        pixels = tensors["pixels"]
        most = 1 if self._single_view else 4
        if 0 in pixels.shape or pixels.shape[1] > most:
            return InvalidInput(f"pixels must be of 1 to {most} views, got shape {list(pixels.shape)}")
        if not np.isfinite(pixels).all():
            return InvalidInput("pixels must be finite, got NaN or Inf")
        return None

"""The image encoder on ONNX Runtime (configs/cpu.pbtxt): requests of equal shape are one batch. Knows nothing of Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime


class InvalidInput(ValueError):
    """A request the network cannot take; its own fault, not the server's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """threads: of one evaluation, 0 for every core."""

    threads: int


class Encoder:
    """One ONNX graph.

    Raises FileNotFoundError when the graph is not deployed.
    """

    def __init__(self, path: Path, options: Options) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"graph must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --artifacts DIR"
            )
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = options.threads
        self._session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
        views = self._session.get_inputs()[0].shape[1]
        self._single_view = isinstance(views, int)

    def contexts(self, requests: Sequence[np.ndarray]) -> list[np.ndarray | InvalidInput]:
        """For each request, pixels [B, V, 3, P, P] float32 -> context [B, T, 1536] float16, or the reason there is none."""
        results: list[np.ndarray | InvalidInput | None] = [self._problem(pixels) for pixels in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, pixels in enumerate(requests):
            if results[index] is None:
                groups.setdefault(pixels.shape[1:], []).append(index)
        for members in groups.values():
            (context,) = self._session.run(["context"], {"pixels": np.concatenate([requests[index] for index in members])})
            ends = np.cumsum([len(requests[index]) for index in members])
            for index, part in zip(members, np.split(context, ends[:-1]), strict=True):
                results[index] = part
        return results

    def _problem(self, pixels: np.ndarray) -> InvalidInput | None:
        most = 1 if self._single_view else 4
        if 0 in pixels.shape or pixels.shape[1] > most:
            return InvalidInput(f"pixels must be of 1 to {most} views, got shape {list(pixels.shape)}")
        if not np.isfinite(pixels).all():
            return InvalidInput("pixels must be finite, got NaN or Inf")
        return None

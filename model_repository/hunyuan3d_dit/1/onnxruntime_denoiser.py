"""The denoiser on ONNX Runtime: numpy in, numpy out, requests of equal shape as one batch. Knows nothing of Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

Tensors = Mapping[str, np.ndarray]


class InvalidInput(ValueError):
    """A request the network cannot take; its own fault, not the server's."""


class Denoiser:
    """One ONNX graph. threads 0 takes every core.

    Raises FileNotFoundError when the graph is not deployed.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"graph must be deployed, found none at {path}\nhint: hunyuan3d-export deploy")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def velocity(self, requests: Sequence[Tensors]) -> list[np.ndarray | InvalidInput]:
        """For each request, latents [B, L, 64], t [B, 1] or [B], ... -> velocity [B, L, 64], or the reason there is none."""
        results: list[np.ndarray | InvalidInput | None] = [_problem(tensors) for tensors in requests]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, tensors in enumerate(requests):
            if results[index] is None:
                shapes = tuple(tensors[name].shape[1:] for name in sorted(tensors))
                groups.setdefault(shapes, []).append(index)
        for members in groups.values():
            batch = [requests[index] for index in members]
            sizes = [len(tensors["latents"]) for tensors in batch]
            outputs = np.split(self._run(batch), np.cumsum(sizes)[:-1])
            for index, output in zip(members, outputs, strict=True):
                results[index] = output
        return [result for result in results if result is not None]

    def _run(self, batch: Sequence[Tensors]) -> np.ndarray:
        stacked = {name: np.concatenate([tensors[name] for tensors in batch]) for name in batch[0]}
        feeds = {name: value if value.ndim > 2 else value.reshape(-1) for name, value in stacked.items()}
        (velocity,) = self._session.run(["velocity"], feeds)
        return velocity


def _problem(tensors: Tensors) -> InvalidInput | None:
    for name, value in tensors.items():
        if value.size == 0:
            return InvalidInput(f"{name} must not be empty, got shape {list(value.shape)}")
        if not np.isfinite(value).all():
            return InvalidInput(f"{name} must be finite, got NaN or Inf")
    if tensors["t"].min() < 0 or tensors["t"].max() > 1:
        return InvalidInput(f"t must be in [0, 1], got {tensors['t'].min():g} to {tensors['t'].max():g}")
    return None

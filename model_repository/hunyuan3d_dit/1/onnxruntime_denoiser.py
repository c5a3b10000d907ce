"""The denoiser on ONNX Runtime (configs/cpu.pbtxt). Knows nothing of Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx_graph import Options, open_graph

__all__ = ["LIBRARY", "Denoiser", "Options", "to_array", "to_tensor"]

LIBRARY = np


def to_array(tensor: Any) -> np.ndarray:
    """A tensor of Triton's as an array."""
    return tensor.as_numpy()


def to_tensor(kind: Any, name: str, array: np.ndarray) -> Any:
    """An array as a tensor of `kind`, Triton's class."""
    return kind(name, array)


class Denoiser:
    """One ONNX graph.

    Raises FileNotFoundError when the graph is not deployed.
    """

    def __init__(self, path: Path, options: Options) -> None:
        self._session = open_graph(path, options)

    def evaluate(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """latents [B, L, 64], t [B], context [B, T, 1536] and the graph's scale [B], if any -> velocity [B, L, 64]."""
        (velocity,) = self._session.run(["velocity"], tensors)
        return velocity

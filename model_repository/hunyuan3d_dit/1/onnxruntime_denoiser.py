"""The denoiser on ONNX Runtime (configs/cpu.pbtxt). Knows nothing of Triton."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

LIBRARY = np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """threads: of one evaluation, 0 for every core."""

    threads: int


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
        if not path.is_file():
            raise FileNotFoundError(
                f"graph must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --artifacts DIR"
            )
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = options.threads
        self._session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])

    def evaluate(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """latents [B, L, 64], t [B], context [B, T, 1536] and the graph's scale [B], if any -> velocity [B, L, 64]."""
        (velocity,) = self._session.run(["velocity"], tensors)
        return velocity

"""The runtime `onnxruntime`: an ONNX graph on ONNX Runtime's CPU kernels (configs/cpu.pbtxt). Knows nothing of Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

LIBRARY = np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """threads: how many compute one evaluation, 0 for as many as there are cores."""

    threads: int


def to_array(tensor: Any) -> np.ndarray:
    """The array of a Triton tensor, without a copy."""
    return tensor.as_numpy()


def to_tensor(tensor_class: Any, name: str, array: np.ndarray) -> Any:
    """A Triton tensor of an array; tensor_class is pb_utils.Tensor."""
    return tensor_class(name, array)


class Network:
    """One ONNX graph, of which `outputs` are computed.

    Raises FileNotFoundError when the graph is not deployed, ValueError when it lacks one of the outputs.
    """

    def __init__(self, path: Path, options: Options, outputs: Sequence[str]) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"graph must be deployed, found none at {path}\nhint: hunyuan3d-export deploy --artifacts DIR"
            )
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = options.threads
        # Threads that spin start the next operator sooner. Once an evaluation has ended they must stop, because the server and
        # the sampler need the cores then.
        session_options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
        session_options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(str(path), session_options, providers=["CPUExecutionProvider"])
        self._outputs = list(outputs)
        found = [tensor.name for tensor in self._session.get_outputs()]
        if not set(outputs) <= set(found):
            raise ValueError(f"graph must have the config's outputs {', '.join(outputs)}, got {', '.join(found)}")

    @property
    def fixed_sizes(self) -> dict[str, dict[int, int]]:
        """Of each input, the sizes that are the same in every request: axis -> size. Axis 0, the batch, is never among them."""
        return {
            tensor.name: {axis: size for axis, size in enumerate(tensor.shape) if axis > 0 and isinstance(size, int)}
            for tensor in self._session.get_inputs()
        }

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One evaluation: inputs by name -> outputs by name, all of them [B, ...]."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(tensors)), strict=True))

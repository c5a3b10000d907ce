"""ONNX Runtime reads and writes the memory of torch's tensors, so a call copies nothing to or from the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ..files import ONNX_FILE
from ..runners import Tensors
from .rows import Skip

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16}
_TORCH = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def require_provider(device: torch.device) -> str:
    """The provider for this device. Raises Skip when this ONNX Runtime lacks it."""
    provider = _PROVIDERS[device.type]
    if provider not in onnxruntime.get_available_providers():
        raise Skip(f"this ONNX Runtime has no {provider}; pip install onnxruntime-gpu")
    return provider


class BoundRunner:
    """Runs the graphs of an artifacts folder (a runners.Runner). Raises Skip if the device's provider is missing."""

    def __init__(self, artifacts: Path, device: torch.device) -> None:
        self._provider = require_provider(device)
        self._artifacts = artifacts
        self._device = device
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, model: str, tensors: Tensors) -> dict[str, Tensor]:
        session = self._session(model)
        binding = session.io_binding()
        place = (self._device.type, self._device.index or 0)
        inputs = {name: value.contiguous() for name, value in tensors.items()}
        for name, value in inputs.items():
            binding.bind_input(name, *place, _NUMPY[value.dtype], tuple(value.shape), value.data_ptr())
        outputs = self._outputs(session, inputs)
        for name, value in outputs.items():
            binding.bind_output(name, *place, _NUMPY[value.dtype], tuple(value.shape), value.data_ptr())
        if self._device.type == "cuda":
            # The session waits for its own stream before it returns, so only torch's work on the inputs needs a wait here.
            torch.cuda.current_stream(self._device).synchronize()
        session.run_with_iobinding(binding)
        return outputs

    def _outputs(self, session: onnxruntime.InferenceSession, inputs: Tensors) -> dict[str, Tensor]:
        """Empty tensors for the outputs. The graph names its free axes, and the inputs give their sizes."""
        sizes = {
            axis: size
            for tensor in session.get_inputs()
            for axis, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
        }
        return {
            tensor.name: torch.empty(
                [sizes.get(axis, axis) for axis in tensor.shape], dtype=_TORCH[tensor.type], device=self._device
            )
            for tensor in session.get_outputs()
        }

    def _session(self, model: str) -> onnxruntime.InferenceSession:
        if model not in self._sessions:
            path = self._artifacts / model / ONNX_FILE
            session = onnxruntime.InferenceSession(str(path), providers=[self._provider])
            # ONNX Runtime only warns if a provider's libraries are missing, and uses the CPU: the time would be wrong.
            if session.get_providers()[0] != self._provider:
                raise Skip(f"ONNX Runtime could not load its {self._provider}: its CUDA or cuDNN libraries are missing")
            self._sessions[model] = session
        return self._sessions[model]

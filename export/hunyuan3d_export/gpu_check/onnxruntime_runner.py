"""ONNX Runtime on torch's own memory: nothing is copied between a call's tensors and the device."""

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


class BoundRunner:
    """The denoiser graphs below an artifacts folder (runners.Runner). Raises Skip without the device's provider."""

    def __init__(self, artifacts: Path, device: torch.device) -> None:
        self._provider = _PROVIDERS[device.type]
        if self._provider not in onnxruntime.get_available_providers():
            raise Skip(f"this ONNX Runtime has no {self._provider}; pip install onnxruntime-gpu")
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
        velocity = torch.empty_like(inputs["latents"])
        binding.bind_output("velocity", *place, np.float32, tuple(velocity.shape), velocity.data_ptr())
        if self._device.type == "cuda":
            # The session runs on a stream of its own and returns when that is done, so only the inputs have to be waited for.
            torch.cuda.current_stream(self._device).synchronize()
        session.run_with_iobinding(binding)
        return {"velocity": velocity}

    def _session(self, model: str) -> onnxruntime.InferenceSession:
        if model not in self._sessions:
            path = self._artifacts / model / ONNX_FILE
            session = onnxruntime.InferenceSession(str(path), providers=[self._provider])
            # A provider whose libraries are missing is dropped with no more than a warning: a CPU would be measured.
            if session.get_providers()[0] != self._provider:
                raise Skip(f"ONNX Runtime could not load its {self._provider}: its CUDA or cuDNN libraries are missing")
            self._sessions[model] = session
        return self._sessions[model]

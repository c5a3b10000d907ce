"""Runs models by ONNX Runtime, a TensorRT plan or torch, all called the same way: run(model, tensors) -> tensors.

Tensors have the contract's names. The outputs are on the device of the inputs, even when the model runs on another device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnxruntime
import torch
from torch import Tensor, nn

from .engines.runtime import Plan
from .engines.targets import Target
from .files import ONNX_FILE
from .graphs import Graph

Tensors = Mapping[str, Tensor]


class Runner(Protocol):
    """Evaluates Triton models, which it knows by their names."""

    def run(self, model: str, tensors: Tensors) -> dict[str, Tensor]:
        """All outputs of one evaluation of `model`, by name."""


class OnnxRunner:
    """Runs the graphs below an artifacts folder on ONNX Runtime's CPU kernels. A graph is loaded when it first runs."""

    def __init__(self, artifacts: Path) -> None:
        self._artifacts = artifacts
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, model: str, tensors: Tensors) -> dict[str, Tensor]:
        if model not in self._sessions:
            path = self._artifacts / model / ONNX_FILE
            self._sessions[model] = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        session = self._sessions[model]
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {name: value.cpu().numpy() for name, value in tensors.items()})
        return _at(tensors, {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)})


class PlanRunner:
    """Runs the plans of a folder on the first GPU. A plan is loaded at its first run and gets memory for its largest shapes."""

    def __init__(self, plans: Path, target: Target) -> None:
        self._plans = plans
        self._target = target
        self._loaded: dict[str, Plan] = {}

    def run(self, model: str, tensors: Tensors) -> dict[str, Tensor]:
        if model not in self._loaded:
            self._loaded[model] = Plan(self._plans / model / self._target.plan_file, self._target.library)
        return _at(tensors, self._loaded[model].run(tensors))


class TorchRunner:
    """Runs a loaded torch network: for each of its graphs, the module that the graph was traced from."""

    def __init__(self, network: nn.Module, graphs: Mapping[str, Graph], *, device: str = "cpu") -> None:
        network = network.to(device)
        self._device = device
        self._calls: dict[str, tuple[Callable[..., Any], list[str]]] = {
            graph.spec.name: (graph.module(network), [tensor.name for tensor in graph.spec.outputs])
            for graph in graphs.values()
        }

    @torch.inference_mode()
    def run(self, model: str, tensors: Tensors) -> dict[str, Tensor]:
        call, names = self._calls[model]
        found = call(**{name: value.to(self._device) for name, value in tensors.items()})
        return _at(tensors, dict(zip(names, found if len(names) > 1 else (found,), strict=True)))


def _at(inputs: Tensors, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs on the device of the inputs."""
    device = next(iter(inputs.values())).device
    return {name: value.to(device) for name, value in outputs.items()}

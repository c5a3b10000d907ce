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

from hunyuan3d_client import contract

from .engines.runtime import Plan
from .engines.targets import Target
from .files import ONNX_FILE
from .graphs import Graph
from .precisions import WIRE_DTYPES
from .progress import ComparisonWatch

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


class WatchedRunner:
    """A runner whose evaluations a watch is told of."""

    def __init__(self, runner: Runner, watch: ComparisonWatch) -> None:
        self._runner, self._watch = runner, watch

    def run(self, model: str, tensors: Tensors) -> dict[str, Tensor]:
        outputs = self._runner.run(model, tensors)
        self._watch.advance(work_of(tensors))
        return outputs


class DryRunner:
    """Answers with zeros and adds up the work, so that the checks of any network can be counted before they run."""

    def __init__(self, spec: contract.ModelSpec) -> None:
        self._spec = spec
        self.work = 0.0

    def run(self, _model: str, tensors: Tensors) -> dict[str, Tensor]:
        self.work += work_of(tensors)
        sizes: dict[str, int] = {}
        for tensor in self._spec.inputs:
            if tensor.name in tensors:
                named = zip(tensor.dims, tensors[tensor.name].shape, strict=False)
                sizes |= {dim: size for dim, size in named if isinstance(dim, str)}
        return {
            tensor.name: torch.zeros(
                [sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in tensor.dims], dtype=WIRE_DTYPES[tensor.dtype]
            )
            for tensor in self._spec.outputs
        }


def work_of(tensors: Tensors) -> float:
    """The tokens of one evaluation's inputs. A picture counts about as many as it has patches of 14 x 14 pixels."""
    return float(sum(value.numel() // value.shape[-1] for value in tensors.values() if value.numel()))


def _at(inputs: Tensors, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs on the device of the inputs."""
    device = next(iter(inputs.values())).device
    return {name: value.to(device) for name, value in outputs.items()}

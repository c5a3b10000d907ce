"""TensorRT plans on this machine's GPU, called like a Hunyuan3DDiT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hunyuan3d_client import contract

from .files import PLAN_FILE
from .reference_sampler import NamedDenoiser
from .tensorrt_api import TensorRT
from .tensorrt_log import Log, log_of
from .tensorrt_targets import Target

if TYPE_CHECKING:
    import tensorrt

_TORCH_DTYPES = {"FP16": torch.float16, "FP32": torch.float32}


class PlanLoadError(ValueError):
    """TensorRT cannot load or run the plan on this machine."""


class LoadedEngine(NamedTuple):
    """An engine, and the runtime that must live as long as it."""

    runtime: tensorrt.Runtime
    engine: tensorrt.ICudaEngine


def load_engine(plan: Path, trt: TensorRT) -> LoadedEngine:
    """The plan in the GPU's memory. Raises PlanLoadError, with the library's reasons, when it does not load here."""
    log = log_of(trt)
    runtime = trt.Runtime(log.logger)
    engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise PlanLoadError(
            f"{plan} must load on this machine, got:\n  {log.reasons()}\n"
            f"hint: it needs the GPU and the library it was built for: hunyuan3d-export info {plan}"
        )
    return LoadedEngine(runtime, engine)


class EngineDenoiser(NamedDenoiser):
    """The plans below a folder, on the first GPU. They load on first use, each with the memory of its largest shapes."""

    def __init__(self, plans: Path, target: Target) -> None:
        self._plans = plans
        self._library = target.library
        self._loaded: dict[str, _Plan] = {}

    def _run(self, model: str, tensors: dict[str, Tensor]) -> Tensor:
        if model not in self._loaded:
            self._loaded[model] = _Plan(self._plans / model / PLAN_FILE, self._library)
        return self._loaded[model](tensors)


class _Plan:
    """One plan with its execution context and a stream of its own: on the default one TensorRT synchronises every call."""

    def __init__(self, path: Path, trt: TensorRT) -> None:
        self._path = path
        self._log: Log = log_of(trt)
        self._runtime, self._engine = load_engine(path, trt)
        context: tensorrt.IExecutionContext | None = self._engine.create_execution_context()
        if context is None:
            raise PlanLoadError(
                f"{path} must get its memory, got:\n  {self._log.reasons()}\nhint: build it with a smaller --profile"
            )
        self._context = context
        self._stream = torch.cuda.Stream()

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """velocity [B, L, 64] float32 on the GPU, in the order of the caller's stream."""
        inputs = {name: _on_gpu(name, value) for name, value in tensors.items()}
        velocity = torch.empty_like(inputs["latents"])
        for name, value in inputs.items():
            self._require(self._context.set_input_shape(name, tuple(value.shape)), f"take {name} {list(value.shape)}")
            self._require(self._context.set_tensor_address(name, value.data_ptr()), f"have an input {name}")
        self._require(self._context.set_tensor_address("velocity", velocity.data_ptr()), "have an output velocity")
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        self._require(self._context.execute_async_v3(self._stream.cuda_stream), "run")
        for value in (*inputs.values(), velocity):
            value.record_stream(self._stream)  # freed by the caller, its memory must outlast this call
        caller.wait_stream(self._stream)
        return velocity

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise PlanLoadError(
                f"{self._path} must {what}, got:\n  {self._log.reasons()}\n"
                f"hint: its profile is in hunyuan3d-export info {self._path}"
            )


def _on_gpu(name: str, value: Tensor) -> Tensor:
    spec = next(spec for spec in (*contract.denoiser(guided=True).inputs, contract.GUIDANCE) if spec.name == name)
    return value.to("cuda", _TORCH_DTYPES[spec.dtype]).contiguous()

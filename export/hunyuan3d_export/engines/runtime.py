"""Loads and runs TensorRT plans on this machine's GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .api import TensorRT
from .log import Log, log_of

if TYPE_CHECKING:
    import tensorrt

# TensorRT's name of a type -> torch's type.
_TORCH_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class PlanLoadError(ValueError):
    """TensorRT cannot load or run the plan on this machine."""


class LoadedEngine(NamedTuple):
    """An engine, and the runtime that must live as long as the engine."""

    runtime: tensorrt.Runtime
    engine: tensorrt.ICudaEngine


def load_engine(plan: Path, trt: TensorRT) -> LoadedEngine:
    """Loads the plan into the GPU's memory. Raises PlanLoadError, with the library's reasons, when that fails."""
    log = log_of(trt)
    runtime = trt.Runtime(log.logger)
    engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise PlanLoadError(
            f"{plan} must load on this machine, got:\n  {log.reasons()}\n"
            f"hint: it needs the GPU and the library it was built for: hunyuan3d-export info {plan}"
        )
    return LoadedEngine(runtime, engine)


class Plan:
    """One plan with its execution context. It has a CUDA stream of its own, because TensorRT synchronises every call on the
    default stream."""

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
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        # Dtypes and modes are compared by name, because each of the two libraries has its own enumeration classes.
        self._dtypes = {name: _TORCH_DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name).name == "OUTPUT"]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Evaluates the plan and returns all outputs on the GPU. Inputs of another dtype or device are converted.

        Work that the caller then puts on its current stream sees finished outputs. Raises PlanLoadError for a tensor that the
        plan lacks or a shape outside its profile.
        """
        inputs = {name: self._on_gpu(name, value) for name, value in tensors.items()}
        for name, value in inputs.items():
            self._require(self._context.set_input_shape(name, tuple(value.shape)), f"take {name} {list(value.shape)}")
            self._require(self._context.set_tensor_address(name, value.data_ptr()), f"have an input {name}")
        outputs = {name: self._empty(name) for name in self._outputs}
        for name, value in outputs.items():
            self._require(self._context.set_tensor_address(name, value.data_ptr()), f"have an output {name}")
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        self._require(self._context.execute_async_v3(self._stream.cuda_stream), "run")
        for value in (*inputs.values(), *outputs.values()):
            value.record_stream(self._stream)  # a tensor that the caller frees must keep its memory until this call has run
        caller.wait_stream(self._stream)
        return outputs

    def _on_gpu(self, name: str, value: Tensor) -> Tensor:
        self._require(name in self._dtypes, f"have an input {name}")
        return value.to("cuda", self._dtypes[name]).contiguous()

    def _empty(self, name: str) -> Tensor:
        """Memory for an output. TensorRT knows its shape once the shapes of all inputs are set."""
        shape = self._context.get_tensor_shape(name)
        return torch.empty([shape[axis] for axis in range(len(shape))], dtype=self._dtypes[name], device="cuda")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise PlanLoadError(
                f"{self._path} must {what}, got:\n  {self._log.reasons()}\n"
                f"hint: its profile is in hunyuan3d-export info {self._path}"
            )

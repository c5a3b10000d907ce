"""The runtimes' names in rows, and what each of them needs of a machine."""

from __future__ import annotations

import shutil

import torch

from .rows import Skip

TORCH, COMPILED, ONNX_RUNTIME, TENSORRT = "torch", "torch.compile", "ONNX Runtime", "TensorRT"


def require(runtime: str, device: torch.device) -> None:
    """Raises Skip where this machine cannot run the runtime. Ask before exporting graphs, which takes seconds and gigabytes."""
    if runtime == COMPILED:
        _require_compiler()
    if runtime == ONNX_RUNTIME:
        from .onnxruntime_runner import require_provider

        require_provider(device)
    if runtime == TENSORRT:
        _require_tensorrt(device)


def _require_compiler() -> None:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        raise Skip("torch.compile needs a C compiler, and none is on the PATH")


def _require_tensorrt(device: torch.device) -> None:
    from ..engines.targets import TargetMissing, find_target

    if device.type != "cuda":
        raise Skip(f"TensorRT runs on a GPU, and this run is on {device}")
    try:
        find_target("tensorrt")
    except TargetMissing as error:
        raise Skip(str(error).splitlines()[0]) from error

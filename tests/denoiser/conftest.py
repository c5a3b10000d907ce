"""Both Python runtimes of the denoisers over one set of weights, and requests as Triton hands them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import batching
import numpy as np
import onnxruntime_denoiser
import parameters
import pytest
import torch
import torch_denoiser

from hunyuan3d_client import contract
from hunyuan3d_export.dit import save_checkpoint
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.dit.network import example_inputs
from hunyuan3d_export.files import ONNX_FILE

Evaluate = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def checkpoint(micro: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    save_checkpoint(micro.load(torch.float32), path, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def in_torch(checkpoint: Path) -> Callable[..., torch_denoiser.Denoiser]:
    """in_torch("dtype=bf16", ...): the torch runtime with these parameters."""
    return lambda *texts: torch_denoiser.Denoiser(
        checkpoint, parameters.parse(torch_denoiser.Options, torch_parameters(["device=cpu", *texts]))
    )


@pytest.fixture(scope="session", params=["onnxruntime", "torch"])
def evaluate(request: pytest.FixtureRequest, artifacts: Callable[..., Path], in_torch: Callable[..., Any]) -> Evaluate:
    """evaluate(requests): the guided velocities by one runtime, numpy in and out."""
    if request.param == "torch":
        denoiser: Any = in_torch()
    else:
        denoiser = onnxruntime_denoiser.Denoiser(
            artifacts() / contract.DIT_GUIDED / ONNX_FILE, onnxruntime_denoiser.Options(threads=2)
        )
    library = {"torch": torch, "onnxruntime": np}[request.param]

    def run(requests: list[Mapping[str, np.ndarray]]) -> list[Any]:
        arrays = [{name: library.asarray(value) for name, value in tensors.items()} for tensors in requests]
        results = batching.velocities(arrays, denoiser.evaluate, library)
        return [result if isinstance(result, Exception) else np.asarray(result) for result in results]

    return run


@pytest.fixture(scope="session")
def request_of() -> Callable[..., dict[str, np.ndarray]]:
    """request_of((B, L, T), seed=0): tensors of a guided request; t and the scale are [B, 1]."""

    def make(sizes: tuple[int, int, int], *, seed: int = 0) -> dict[str, np.ndarray]:
        inputs = {name: value.numpy() for name, value in example_inputs(sizes, seed=seed).items()}
        return {**inputs, "t": inputs["t"][:, None], "guidance_scale": np.linspace(1, 5, sizes[0], dtype=np.float32)[:, None]}

    return make

"""Both Python runtimes of a denoiser over the same weights, and requests as Triton hands them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import batching
import numpy as np
import onnx_graph
import parameters
import pytest
import torch
import torch_network

from hunyuan3d_client import contract
from hunyuan3d_export.dit import save_checkpoint
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.dit.network import example_inputs
from hunyuan3d_export.files import ONNX_FILE

Evaluate = Callable[..., list[Any]]
OUTPUTS = [tensor.name for tensor in contract.denoiser(guided=True).outputs]


@pytest.fixture(scope="session")
def checkpoint(micro: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    save_checkpoint(micro.load(torch.float32), path, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def in_torch(checkpoint: Path) -> Callable[..., torch_network.Network]:
    """in_torch("dtype=bf16", ..., graph="guided"): the torch runtime with these parameters."""

    def network(*texts: str, graph: str = "guided") -> torch_network.Network:
        texts_of = {"network": "dit", "graph": graph, **torch_parameters(["device=cpu", *texts])}
        return torch_network.Network(checkpoint, parameters.parse(torch_network.Options, texts_of), OUTPUTS)

    return network


@pytest.fixture(scope="session")
def graph_inputs() -> Callable[..., batching.Inputs]:
    """graph_inputs(fixed_sizes, library): the guided denoiser's inputs, as its config describes them."""
    tensors = contract.denoiser(guided=True).inputs
    config = [{"name": spec.name, **({"reshape": {"shape": []}} if spec.dims == ("B",) else {})} for spec in tensors]
    return lambda fixed_sizes, library: batching.Inputs(config, "t in 0..1", fixed_sizes, library)


@pytest.fixture(scope="session", params=["onnxruntime", "torch"])
def evaluate(
    request: pytest.FixtureRequest,
    artifacts: Callable[..., Path],
    in_torch: Callable[..., Any],
    graph_inputs: Callable[..., batching.Inputs],
) -> Evaluate:
    """evaluate(requests): the guided velocity of each request by one runtime, or its error. All arrays are NumPy arrays."""
    if request.param == "torch":
        network: Any = in_torch()
    else:
        path = artifacts() / contract.DIT_GUIDED / ONNX_FILE
        network = onnx_graph.Network(path, onnx_graph.Options(threads=2), OUTPUTS)
    library = {"torch": torch, "onnxruntime": np}[request.param]
    inputs = graph_inputs(network.fixed_sizes, library)

    def prepared(tensors: Mapping[str, np.ndarray]) -> Any:
        try:
            return inputs.prepare({name: library.asarray(value) for name, value in tensors.items()})
        except batching.InvalidInput as error:
            return error

    def run(requests: list[Mapping[str, np.ndarray]]) -> list[Any]:
        results = batching.evaluate([prepared(tensors) for tensors in requests], network.run, library)
        return [result if isinstance(result, Exception) else np.asarray(result["velocity"]) for result in results]

    return run


@pytest.fixture(scope="session")
def request_of() -> Callable[..., dict[str, np.ndarray]]:
    """request_of((B, L, T), seed=0): the tensors of a guided request; t and the scale are [B, 1]."""

    def make(sizes: tuple[int, int, int], *, seed: int = 0) -> dict[str, np.ndarray]:
        inputs = {name: value.numpy() for name, value in example_inputs(sizes, seed=seed).items()}
        return {**inputs, "t": inputs["t"][:, None], "guidance_scale": np.linspace(1, 5, sizes[0], dtype=np.float32)[:, None]}

    return make

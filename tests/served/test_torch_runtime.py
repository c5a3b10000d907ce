"""A real server runs the checkpoint itself with --model-config-name torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hunyuan3d_client import Client
from hunyuan3d_client.errors import InvalidInput
from hunyuan3d_export.checks import relative_l2
from hunyuan3d_export.dit import Hunyuan3DDiT
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.dit.network import TOLERANCES, example_inputs
from hunyuan3d_export.dit.reference_sampler import sample, sigmas
from hunyuan3d_export.repository_from_artifacts import deploy_checkpoint
from hunyuan3d_export.server.embedded import EmbeddedServer, ServerOptions, ServerStartError

pytestmark = pytest.mark.served

Make = Callable[..., np.ndarray]
TORCH = ServerOptions(config="torch")
EVALUATION, SAMPLING = TOLERANCES["fp32"].evaluation, TOLERANCES["fp32"].sampling


@pytest.fixture(scope="module")
def torch_client(micro: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    repository = tmp_path_factory.mktemp("torch") / "repository"
    deploy_checkpoint(micro, repository, torch=torch_parameters(["device=cpu", "attention_backend=chunked", "threads=1"]))
    with EmbeddedServer(repository, TORCH) as endpoints, Client(endpoints.grpc, timeout_s=120) as client:
        yield client


@pytest.mark.parametrize("sizes", [(1, 40, 19), (3, 5, 1), (11, 6, 4)], ids=str)
def test_denoise(sizes: tuple[int, int, int], torch_client: Client, model: Hunyuan3DDiT) -> None:
    inputs, scale = example_inputs(sizes), torch.linspace(0.5, 6, sizes[0])
    arrays = [inputs[name].numpy() for name in ("latents", "t", "context")]
    plain = torch_client.denoise(*arrays)
    assert plain.dtype == np.float32 and relative_l2(torch.tensor(plain), model(**inputs)) <= EVALUATION
    guided = torch_client.denoise(*arrays, guidance_scale=scale.numpy())
    assert relative_l2(torch.tensor(guided), model.guided(**inputs, guidance_scale=scale)) <= EVALUATION


def test_samples_of_several_callers(torch_client: Client, model: Hunyuan3DDiT, tokens: Make, noise: Make) -> None:
    """The samples share batches, and each caller gets its own result."""
    contexts, starts = [tokens(1, 7, seed=i) for i in range(4)], [noise(1, 9, seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda both: torch_client.sample(both[0], latents=both[1], steps=12, guidance_scale=3.0),
                zip(contexts, starts, strict=True),
            )
        )
    for context, start, latents in zip(contexts, starts, found, strict=True):
        expected = sample(
            model,
            torch.from_numpy(context),
            torch.from_numpy(start),
            sigmas("flow_match", 12),
            guidance_scale=3.0,
            path="two-batch",
        )
        assert relative_l2(torch.tensor(latents), expected) <= SAMPLING


def test_a_bad_request_is_its_own_error(torch_client: Client, tokens: Make, noise: Make) -> None:
    with pytest.raises(InvalidInput, match="must be finite"):
        torch_client.denoise(noise(1, 4) * np.nan, 0.5, tokens(1, 3))
    assert torch_client.denoise(noise(1, 4), 0.5, tokens(1, 3)).shape == (1, 4, 64)


def test_what_the_machine_lacks_is_said_at_the_start(micro: Any, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    deploy_checkpoint(micro, repository, torch=torch_parameters(["device=cpu", "attention_backend=sage"]))
    with pytest.raises(ServerStartError, match='Please install "sageattention"'):
        EmbeddedServer(repository, TORCH).start()

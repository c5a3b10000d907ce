"""Real servers on this machine's CPU, each started once for all tests that use it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc

from hunyuan3d_client import Client, contract
from hunyuan3d_export.dit import Hunyuan3DDiT
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch gets one thread for the expected values, because a server runs beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def served(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A server of both graphs of the micro weights."""
    repository = tmp_path_factory.mktemp("served") / "repository"
    deploy(artifacts(), repository)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def served_plain(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A server of the plain graph alone."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(artifacts() / contract.DIT, folder / "artifacts" / contract.DIT)
    deploy(folder / "artifacts", folder / "repository")
    with EmbeddedServer(folder / "repository") as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def served_distilled(artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A server of guidance-distilled weights with the preset v2-0-turbo."""
    repository = tmp_path_factory.mktemp("distilled") / "repository"
    deploy(artifacts(distilled=True), repository)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


@pytest.fixture(scope="session")
def client(served: Endpoints) -> Iterator[Client]:
    with Client(served.grpc, timeout_s=120) as client:
        yield client


@pytest.fixture(scope="session")
def raw(served: Endpoints) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """A client of tritonclient itself, for requests that our client would not send."""
    with tritonclient.grpc.InferenceServerClient(served.grpc) as client:
        yield client


@pytest.fixture(scope="session")
def model(micro: Any) -> Hunyuan3DDiT:
    return micro.load(torch.float32)


@pytest.fixture(scope="session")
def tokens() -> Callable[..., np.ndarray]:
    """tokens(B, T, seed=0): a float16 context."""
    return lambda batch, length, seed=0: np.random.default_rng(seed).standard_normal((batch, length, 1536)).astype(np.float16)


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """noise(B, L, seed=0): float32 latents."""
    return lambda batch, length, seed=0: np.random.default_rng(seed).standard_normal((batch, length, 64), dtype=np.float32)

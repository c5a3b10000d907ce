"""A real server of the shape decoder: latents -> keys and values -> field, by graphs and by the checkpoint itself."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hunyuan3d_client import contract
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy, deploy_checkpoint
from hunyuan3d_export.runners import OnnxRunner
from hunyuan3d_export.server.embedded import EmbeddedServer, ServerOptions
from hunyuan3d_export.shapevae.weights import ShapeVAESource

pytestmark = pytest.mark.served

Tensors = dict[str, np.ndarray]
SOURCE = ShapeVAESource(preset="tiny", seed=5)


@pytest.fixture(scope="module")
def onnx_folder(root: Path) -> Path:
    folder = root / "build" / "test" / "vae-tiny-fp32-op"
    export_onnx(SOURCE, folder)
    return folder


@pytest.fixture(scope="module")
def served(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton.InferenceServerClient]:
    repository = tmp_path_factory.mktemp("decoder") / "repository"
    deploy(onnx_folder, repository)
    with EmbeddedServer(repository) as endpoints, triton.InferenceServerClient(endpoints.grpc) as client:
        yield client


def call(client: triton.InferenceServerClient, model: str, tensors: Tensors) -> Tensors:
    inputs = [triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)) for name, value in tensors.items()]
    for tensor, value in zip(inputs, tensors.values(), strict=True):
        tensor.set_data_from_numpy(value)
    answer = client.infer(model, inputs)
    return {output.name: answer.as_numpy(output.name).copy() for output in answer.get_response().outputs}


def latents(batch: int, length: int, seed: int = 0) -> Tensors:
    values = np.random.default_rng(seed).standard_normal((batch, length, contract.LATENT_CHANNELS))
    return {"latents": values.astype(np.float32)}


def queries(batch: int, points: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.01, 1.01, (batch, points, 3)).astype(np.float32)


@pytest.mark.parametrize(("batch", "length", "points"), [(1, 12, 256), (3, 7, 5), (2, 1, 1)])
def test_the_served_field_is_onnx_runtimes(
    batch: int, length: int, points: int, served: triton.InferenceServerClient, onnx_folder: Path
) -> None:
    runner = OnnxRunner(onnx_folder)
    asked = latents(batch, length)
    shape = call(served, contract.VAE, asked)
    expected = runner.run(contract.VAE, {"latents": torch.from_numpy(asked["latents"])})
    for name, value in expected.items():
        np.testing.assert_allclose(shape[name], value.numpy(), rtol=0, atol=1e-5)
    tensors = {"queries": queries(batch, points), **shape}
    found = call(served, contract.FIELD, tensors)["field"]
    wanted = runner.run(contract.FIELD, {name: torch.from_numpy(value) for name, value in tensors.items()})["field"].numpy()
    assert found.dtype == np.float32 and found.shape == (batch, points)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_requests_of_one_bucket_share_a_batch_and_others_keep_their_own_results(served: triton.InferenceServerClient) -> None:
    """Six callers pad their points to one bucket by repeating the last point; a seventh does not pad."""
    bucket = contract.POINT_BUCKETS[0]
    shapes = [call(served, contract.VAE, latents(1, 9, seed)) for seed in range(7)]
    points = [queries(1, count, seed) for seed, count in enumerate((3, 50, 256, 100, 7, 255, 77))]
    sent = [np.pad(each, ((0, 0), (0, bucket - each.shape[1]), (0, 0)), mode="edge") for each in points[:6]] + points[6:]
    alone = [
        call(served, contract.FIELD, {"queries": each, **shape})["field"] for each, shape in zip(points, shapes, strict=True)
    ]
    before = executions(served)
    together: list[np.ndarray] = []
    for _ in range(5):
        with ThreadPoolExecutor(7) as pool:
            answers = pool.map(
                lambda both: call(served, contract.FIELD, {"queries": both[0], **both[1]}), zip(sent, shapes, strict=True)
            )
            together = [answer["field"] for answer in answers]
    rows, calls = (after - start for after, start in zip(executions(served), before, strict=True))
    assert rows == 35 and calls < 35, "requests share evaluations"
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=0, atol=1e-5)


def executions(client: triton.InferenceServerClient) -> tuple[int, int]:
    (found,) = client.get_inference_statistics(contract.FIELD).model_stats
    return found.inference_count, found.execution_count


def test_bad_requests_are_refused_with_their_reason(served: triton.InferenceServerClient) -> None:
    shape = call(served, contract.VAE, latents(1, 4))
    most = contract.AXES["P"].max
    bad = {
        f"queries must be of 1 to {most} points": {"queries": queries(1, most + 1), **shape},
        "queries must be finite": {"queries": np.full((1, 2, 3), np.nan, np.float32), **shape},
        "unexpected shape for input 'k'": {"queries": queries(1, 2), **shape, "k": np.zeros((1, 3, 4, 64), np.float32)},
    }
    for message, tensors in bad.items():
        with pytest.raises(InferenceServerException, match=message):
            call(served, contract.FIELD, tensors)
    assert call(served, contract.FIELD, {"queries": queries(1, most), **shape})["field"].shape == (1, most)


def test_the_checkpoint_itself_is_served(tmp_path: Path) -> None:
    deploy_checkpoint(SOURCE, tmp_path, torch=torch_parameters(["device=cpu", "threads=1"]))
    decoder = SOURCE.load(torch.float32)
    asked, points = latents(2, 6), queries(2, 40)
    expected = decoder.field(torch.from_numpy(points), *decoder.keys_values(torch.from_numpy(asked["latents"])))
    with (
        EmbeddedServer(tmp_path, ServerOptions(config="torch")) as endpoints,
        triton.InferenceServerClient(endpoints.grpc) as client,
    ):
        shape = call(client, contract.VAE, asked)
        found = call(client, contract.FIELD, {"queries": points, **shape})["field"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)

"""A real server of the shape decoder: latents -> keys and values -> field -> mesh, by graphs and by the checkpoint itself."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hunyuan3d_client import Client, Mesh, contract
from hunyuan3d_export.dit.configs import torch_parameters
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy, deploy_checkpoint
from hunyuan3d_export.runners import OnnxRunner
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints, ServerOptions
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
def endpoints(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    repository = tmp_path_factory.mktemp("decoder") / "repository"
    deploy(onnx_folder, repository)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


@pytest.fixture(scope="module")
def served(endpoints: Endpoints) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(endpoints.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def client(endpoints: Endpoints) -> Iterator[Client]:
    with Client(endpoints.grpc, timeout_s=500) as client:
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


@pytest.fixture
def dense_field(official: types.ModuleType, build: Callable[..., Any]) -> Callable[[np.ndarray, int], np.ndarray]:
    """dense_field(latents, R): the values of the official code's VAE and VanillaVolumeDecoder at every point of the grid."""

    def field(asked: np.ndarray, resolution: int) -> np.ndarray:
        decoder = SOURCE.load(torch.float32)
        theirs = build(decoder.config, decoder.state_dict(), torch.float32)
        dense = importlib.import_module(f"{official.__package__}.volume_decoders").VanillaVolumeDecoder()
        scaled = theirs(torch.from_numpy(asked) / SOURCE.serving().scale_factor)
        values: torch.Tensor = dense(scaled, theirs.geo_decoder, bounds=1.01, octree_resolution=resolution, enable_pbar=False)
        return values[0].numpy()

    return field


def triangles(faces: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, np.sort(faces, axis=1).tolist()))


@pytest.mark.parametrize("resolution", [20, pytest.param(64, marks=pytest.mark.slow)])
def test_the_mesh_is_scikit_images_of_the_official_field(
    resolution: int, client: Client, dense_field: Callable[[np.ndarray, int], np.ndarray]
) -> None:
    """All of scikit-image's triangles are there, and the others close the surface where it runs through the box."""
    asked = latents(1, 12)["latents"]
    found = client.decode(asked, resolution=resolution, keep=0, method="dense", format="ply").to_trimesh()
    wanted, faces, _, _ = marching_cubes(dense_field(asked, resolution), 0.0)
    cell = 2.02 / resolution
    distances, places = cKDTree(found.vertices).query(wanted * cell - 1.01)  # upstream divides by R + 1, which shrinks shapes
    assert distances.max() < 1e-3 * cell
    ours, theirs = triangles(found.faces), triangles(places[faces])
    assert len(theirs - ours) <= 1e-4 * len(theirs), "but for values within 1e-6 of 0, whose signs differ"
    closing = found.vertices[np.array(sorted(ours - theirs))]
    assert (np.abs(closing).max(axis=(1, 2)) > 1.01 - 1.01 * cell).mean() > 0.999
    assert found.is_watertight and found.volume > 0


def test_following_the_surface_gives_the_dense_mesh(client: Client) -> None:
    """Half of all cells have a piece of the surface of these random weights, so nothing lies between the coarse points unseen."""
    asked = latents(1, 12)["latents"]
    meshes = [client.decode(asked, resolution=24, keep=0.1, method=method) for method in contract.MESH_METHODS]
    counts = [(mesh.vertices, mesh.faces, mesh.statistics["components"]) for mesh in meshes]
    assert counts[0] == counts[1] and meshes[0].statistics["evaluations"] <= meshes[1].statistics["evaluations"]


def test_eight_decodes_at_once_share_the_fields_calls(served: triton.InferenceServerClient, client: Client) -> None:
    shapes = [latents(1, 40, seed)["latents"] for seed in range(8)]
    alone = [client.decode(each, resolution=16) for each in shapes]
    share = 1.0
    for _ in range(5):  # on a busy machine the eight may not run at the same time
        before = executions(served)
        with ThreadPoolExecutor(8) as pool:
            together: list[Mesh] = list(pool.map(lambda each: client.decode(each, resolution=16), shapes))
        rows, calls = (after - start for after, start in zip(executions(served), before, strict=True))
        assert [mesh.faces for mesh in together] == [mesh.faces for mesh in alone]
        share = min(share, calls / rows)
        if share < 0.7:
            break
    assert share < 0.7


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

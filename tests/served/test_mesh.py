"""Latents and pictures become meshes on a real server. Its decoder is a formula: see sphere_decoder.py."""

from __future__ import annotations

import io
import json
import queue
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import trimesh
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

sys.path.insert(0, str(Path(__file__).parent))

from sphere_decoder import EMPTY, FULL, NOT_A_NUMBER, latents_of, radius_of, write

from hunyuan3d_client import (
    Client,
    DeadlineExceeded,
    InvalidInput,
    Mesh,
    MeshProgress,
    ModelFailed,
    Step,
    cli,
    contract,
)
from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints, loadable_models
from hunyuan3d_export.shapevae import PRESETS
from hunyuan3d_export.shapevae.weights import ShapeVAESource

pytestmark = pytest.mark.served

ROCKET = Path(skimage.__file__).parent / "data" / "rocket.jpg"
SAMPLING = {"steps": 6, "num_latents": 7, "seed": 3}
WAIT_S = 120.0


@pytest.fixture(scope="module")
def repository(root: Path, artifacts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro denoisers, a tiny image encoder, and a decoder of spheres."""
    folder = tmp_path_factory.mktemp("meshes") / "repository"
    cache = root / "build" / "test"
    export_onnx(ShapeVAESource(preset="tiny", seed=5), cache / "vae-tiny-fp32-op")
    export_onnx(ConditionerSource(views=4), cache / "conditioner-fp32-op-4")
    deploy(artifacts(), folder)
    deploy(cache / "conditioner-fp32-op-4", folder)
    assert not {contract.MESH, contract.PICTURE_MESH, contract.PICTURE_MESH_UNARY} & set(loadable_models(folder, "cpu"))
    deploy(cache / "vae-tiny-fp32-op", folder)
    write(folder, PRESETS["tiny"].config.geo_heads)
    return folder


@pytest.fixture(scope="module")
def endpoints(repository: Path) -> Iterator[Endpoints]:
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


@pytest.fixture(scope="module")
def client(endpoints: Endpoints) -> Iterator[Client]:
    with Client(endpoints.grpc, timeout_s=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def raw(endpoints: Endpoints) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(endpoints.grpc) as client:
        yield client


def check_sphere(mesh: Mesh, latents: np.ndarray, *, cells: float = 0.05) -> None:
    """The mesh is a closed sphere of the latents' radius, within a fraction of a cell."""
    found = mesh.to_trimesh()
    assert (len(found.vertices), len(found.faces)) == (mesh.vertices, mesh.faces)
    cell = 2.02 / mesh.statistics["resolution"]
    np.testing.assert_allclose(np.linalg.norm(found.vertices, axis=1), radius_of(latents), rtol=0, atol=cells * cell)
    assert mesh.watertight and found.is_watertight and found.volume > 0


def tensors_of(images: list[bytes], **options: object) -> dict[str, np.ndarray]:
    tensors = {"image": np.array([*images, None], np.object_)[:-1]}
    specs = {spec.name: spec for spec in contract.MODELS[contract.PICTURE_MESH].inputs}
    return tensors | {name: np.array([value], specs[name].numpy_dtype) for name, value in options.items()}


def inputs_of(tensors: dict[str, np.ndarray]) -> list[triton.InferInput]:
    inputs = [triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)) for name, value in tensors.items()]
    return [tensor.set_data_from_numpy(value) for tensor, value in zip(inputs, tensors.values(), strict=True)]


def test_all_models_are_served(client: Client) -> None:
    assert {model.name for model in client.health().models if model.ready} == set(contract.MODELS) - {contract.BACKGROUND}


@pytest.mark.parametrize("format", contract.MESH_FORMATS)
def test_a_decode_gives_a_file_of_each_format(format: str, client: Client, tmp_path: Path) -> None:
    latents = latents_of(0.4)
    mesh = client.decode(latents, resolution=48, format=format)
    assert mesh.format == format and mesh.latents is None
    check_sphere(mesh, latents)
    assert mesh.save(tmp_path / f"a.{format}").read_bytes() == mesh.data


def test_progress_comes_before_the_mesh(client: Client) -> None:
    *progress, mesh = client.decode_stream(latents_of(-0.2), resolution=100)
    assert isinstance(mesh, Mesh) and all(isinstance(each, MeshProgress) for each in progress)
    assert progress[0].stage == "keys and values" and progress[-1].stage == "file" and progress[-1].levels == 2
    assert mesh.statistics["evaluations"] < 101**3 / 4 and len(progress) == mesh.statistics["waves"] + 2


def test_the_options_change_the_mesh(client: Client) -> None:
    latents = latents_of(0.1)
    plain = client.decode(latents, resolution=40)
    few = client.decode(latents, resolution=40, max_faces=200)
    assert abs(few.faces - 200) <= 20 < plain.faces
    dense = client.decode(latents, resolution=40, method="dense")
    assert dense.vertices == plain.vertices and dense.statistics["evaluations"] > plain.statistics["evaluations"]
    smaller = client.decode(latents, resolution=40, level=0.4)  # the field falls by 4 a unit
    reach = [np.abs(mesh.to_trimesh().vertices).max() for mesh in (plain, smaller)]
    assert abs(reach[0] - reach[1] - 0.1) < 0.01


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits until the condition holds. Fails with `what` if it does not hold within 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def field_rows(client: triton.InferenceServerClient) -> int:
    """How many calls hunyuan3d_field has answered, each of one row."""
    (found,) = client.get_inference_statistics(contract.FIELD).model_stats
    return int(found.inference_count)


def test_eight_decodes_at_once_keep_their_own_shapes(client: Client) -> None:
    shapes = [latents_of(first) for first in np.linspace(-1, 1, 8)]
    with ThreadPoolExecutor(8) as pool:
        meshes = list(pool.map(lambda latents: client.decode(latents, resolution=64), shapes))
    for mesh, latents in zip(meshes, shapes, strict=True):
        check_sphere(mesh, latents)


def test_unary_decodes_run_at_the_same_time(raw: triton.InferenceServerClient) -> None:
    """The unary model must not wait for one response while others could begin: a short decode ends before a long one."""

    def unary(resolution: int, method: bytes) -> None:
        options = {"resolution": np.array([resolution], np.int32), "method": np.array([method], np.object_)}
        raw.infer(contract.MESH_UNARY, inputs_of({"latents": latents_of(0.5), **options}), client_timeout=WAIT_S)

    before = field_rows(raw)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(unary, 128, b"dense")  # 2 million points
        until(lambda: field_rows(raw) > before, "the long decode must begin")
        unary(16, b"follow")
        assert not long.done()
        long.result()


def metric(endpoints: Endpoints, name: str, labels: str = "") -> float:
    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and labels in line)


def test_metrics_count_the_work(client: Client, endpoints: Endpoints) -> None:
    names = ("hunyuan3d_mesh_evaluations_total", "hunyuan3d_mesh_waves_total", "hunyuan3d_mesh_faces_sum")
    before = [metric(endpoints, name) for name in names]
    mesh = client.decode(latents_of(0.3), resolution=32)
    until(lambda: metric(endpoints, names[-1]) > before[-1], "Triton refreshes its metrics every 2 s")
    grown = [metric(endpoints, name) - start for name, start in zip(names, before, strict=True)]
    assert grown == [mesh.statistics["evaluations"], mesh.statistics["waves"], mesh.faces]
    for part in ("keys and values", "field", "surface", "file"):
        assert metric(endpoints, "hunyuan3d_mesh_seconds_count", f'part="{part}"') > 0


@pytest.mark.parametrize(
    ("latents", "kind", "text"),
    [
        (latents_of(0, third=NOT_A_NUMBER), ModelFailed, "NaN or infinite"),
        (latents_of(0, second=EMPTY), InvalidInput, "no surface"),
        (latents_of(0, second=FULL), InvalidInput, "no surface"),
    ],
    ids=["NaN", "empty", "full"],
)
def test_a_field_without_a_surface(latents: np.ndarray, kind: type[Exception], text: str, client: Client) -> None:
    with pytest.raises(kind, match=rf"{text}(.|\n)*\nhint: "):
        client.decode(latents, resolution=32)
    check_sphere(client.decode(latents_of(0.2), resolution=32), latents_of(0.2))


def test_leaving_a_decode_stops_it_within_a_wave(
    client: Client, raw: triton.InferenceServerClient, endpoints: Endpoints
) -> None:
    for progress in client.decode_stream(latents_of(0.5), resolution=200, method="dense"):  # 8 million points
        if isinstance(progress, MeshProgress) and progress.evaluations:
            break
    rows = field_rows(raw)
    until(lambda: metric(endpoints, "hunyuan3d_mesh_active_decodes") == 0, "the decode must end")
    assert field_rows(raw) - rows < 40, "calls of 4096 points after the client has left"


def test_a_deadline_ends_a_decode(client: Client, endpoints: Endpoints) -> None:
    with pytest.raises(DeadlineExceeded):
        client.decode(latents_of(0.5), resolution=300, method="dense", timeout_s=1)
    until(
        lambda: metric(endpoints, "hunyuan3d_mesh_active_decodes") == 0,
        "the decode must end, of which 27 million points are left",
    )


def malformed(generator: random.Random) -> dict[str, np.ndarray]:
    """A request with one thing wrong that Triton itself lets through."""
    tensors = {"latents": latents_of(0.1), "resolution": np.array([24], np.int32)}
    changes: list[tuple[str, np.ndarray]] = [
        ("latents", np.full((1, 3, 64), generator.choice([np.nan, np.inf, -np.inf]), np.float32)),
        ("latents", np.zeros((generator.choice([0, 2, 3]), 3, 64), np.float32)),
        ("latents", np.zeros((1, generator.choice([0, 4097, 5000]), 64), np.float32)),
        ("resolution", np.array([generator.choice([-1, 0, 7, 1025, 2**31 - 1])], np.int32)),
        ("format", np.array([generator.choice([b"", b"fbx", b"GLB", b"\xff\xfe", b"glb\0"])], np.object_)),
        ("method", np.array([generator.choice([b"", b"none", b"Dense"])], np.object_)),
        ("max_faces", np.array([generator.choice([-5, 1, 3])], np.int32)),
        ("keep", np.array([generator.choice([-0.1, 1.1, np.nan, np.inf])], np.float32)),
        ("level", np.array([generator.choice([-1, 1, np.nan, np.inf])], np.float32)),
    ]
    name, value = generator.choice(changes)
    return {**tensors, name: value}


def test_malformed_requests_are_errors_and_the_server_stays_up(client: Client, raw: triton.InferenceServerClient) -> None:
    generator = random.Random(7)
    for _ in range(200):
        with pytest.raises(InferenceServerException) as caught:
            raw.infer(contract.MESH_UNARY, inputs_of(malformed(generator)), client_timeout=WAIT_S)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT" and " must be " in caught.value.message()
    check_sphere(client.decode(latents_of(0.2), resolution=32), latents_of(0.2))


def test_a_picture_becomes_a_mesh_in_one_call(client: Client, raw: triton.InferenceServerClient) -> None:
    mesh = client.generate(ROCKET, **SAMPLING, resolution=48)
    assert mesh.format == "glb" and mesh.latents is not None
    np.testing.assert_array_equal(mesh.latents, client.sample(client.condition(ROCKET), **SAMPLING))
    check_sphere(mesh, mesh.latents)
    tensors = tensors_of([ROCKET.read_bytes()], **SAMPLING, resolution=48)
    for outputs in (None, [triton.InferRequestedOutput("mesh")]):
        found = raw.infer(contract.PICTURE_MESH_UNARY, inputs_of(tensors), outputs=outputs, client_timeout=WAIT_S)
        assert found.as_numpy("mesh").tobytes() == mesh.data
    assert streamed(raw, tensors)[-1]["mesh"].tobytes() == mesh.data
    stages = list(client.generate_stream(ROCKET, **SAMPLING, resolution=48, preview_every=0))
    kinds = [type(stage) for stage in stages]
    assert kinds == sorted(kinds, key=[Step, MeshProgress, Mesh].index) and set(kinds) == {Step, MeshProgress, Mesh}
    assert stages[-1].data == mesh.data


def streamed(client: triton.InferenceServerClient, tensors: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every response of the ensemble hunyuan3d."""
    answers: queue.Queue[Any] = queue.Queue()
    found: list[dict[str, np.ndarray]] = []
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(contract.PICTURE_MESH, inputs_of(tensors))
    while not found or "mesh" not in found[-1]:
        result, error = answers.get(timeout=WAIT_S)
        assert error is None, error
        found.append({output.name: result.as_numpy(output.name) for output in result.get_response().outputs})
    client.stop_stream()
    return found


def test_a_mesh_error_of_an_ensemble_reaches_its_caller(raw: triton.InferenceServerClient) -> None:
    tensors = tensors_of([ROCKET.read_bytes()], **SAMPLING, resolution=4000)
    with pytest.raises(InferenceServerException, match="resolution must be in 8..1024, got 4000"):
        raw.infer(contract.PICTURE_MESH_UNARY, inputs_of(tensors), client_timeout=WAIT_S)


def test_the_documents_call_over_http(endpoints: Endpoints, client: Client, root: Path, tmp_path: Path) -> None:
    """The sh block of docs/mesh.md, which is one script, in a folder with a picture."""
    (script,) = re.findall(r"^```sh\n(.*?)^```", (root / "docs" / "mesh.md").read_text(), re.DOTALL | re.MULTILINE)
    assert script.count("localhost:8000") == 1
    shutil.copy(ROCKET, tmp_path / "picture.png")
    command = script.replace("localhost:8000", endpoints.http)
    subprocess.run(["sh", "-euc", command], cwd=tmp_path, timeout=WAIT_S, check=True)
    mesh = Mesh((tmp_path / "chair.glb").read_bytes(), "glb", {}).to_trimesh()
    latents = client.sample(client.condition(ROCKET))
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), radius_of(latents), rtol=0, atol=0.01)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hunyuan3d", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.app()
    return int(ended.value.code or 0)


def test_the_commands(endpoints: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = ["--steps", "6", "--num-latents", "7", "--seed", "3", "--url", endpoints.grpc]
    meshing = ["--resolution", "48", "--max-faces", "300"]
    glb, latents, again = tmp_path / "chair.glb", tmp_path / "latents.npy", tmp_path / "again.ply"
    made = ["generate", str(ROCKET), "--out", str(glb), "--save-latents", str(latents)]
    assert run_cli(monkeypatch, *made, *sampling, *meshing) == 0
    assert run_cli(monkeypatch, "decode", str(latents), "--out", str(again), "--url", endpoints.grpc, *meshing) == 0
    faces = [len(trimesh.load_mesh(io.BytesIO(path.read_bytes()), file_type=path.suffix[1:]).faces) for path in (glb, again)]
    assert faces[0] == faces[1] <= 330
    only = tmp_path / "only.npy"
    assert run_cli(monkeypatch, "generate", str(ROCKET), "--out", str(only), *sampling) == 0
    np.testing.assert_array_equal(np.load(only), np.load(latents))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run_cli(monkeypatch, "decode", str(latents), "--out", str(tmp_path / "x.fbx"), "--url", endpoints.grpc) == 2
    assert run_cli(monkeypatch, "generate", str(ROCKET), "--out", str(tmp_path / "x.npy"), *sampling, *meshing) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "no file and no part of one"


def test_neighbours_of_a_bad_request_get_their_meshes(client: Client) -> None:
    errors: list[Exception] = []

    def bad() -> None:
        try:
            client.decode(latents_of(0, third=NOT_A_NUMBER), resolution=64)
        except ModelFailed as error:
            errors.append(error)

    threads = [threading.Thread(target=bad) for _ in range(3)]
    for thread in threads:
        thread.start()
    check_sphere(client.decode(latents_of(0.2), resolution=64), latents_of(0.2))
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert json.dumps(client.decode(latents_of(0.2), resolution=16).statistics)

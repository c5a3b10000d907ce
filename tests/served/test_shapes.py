"""The shipped weights pass the quality gate through a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan3d_client import Client
from hunyuan3d_client.pictures import png
from hunyuan3d_client.shapes import decode_points
from hunyuan3d_export.commands.photograph import photograph
from hunyuan3d_export.conditioner.weights import ConditionerSource
from hunyuan3d_export.dit import PRESETS, load_checkpoint
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints
from hunyuan3d_export.shapes import CHECKPOINT, PROMPTS, embed_prompt
from hunyuan3d_export.shapes.decoding import Decoder, served_decoder
from hunyuan3d_export.shapes.gate import torch_decoder
from hunyuan3d_export.shapes.mesh_quality import MeshQuality
from hunyuan3d_export.shapes.meshes import Triangles, measure_mesh
from hunyuan3d_export.shapes.metrics import nearest_prompt
from hunyuan3d_export.shapes.quality import QUICK_PROMPTS, evaluate, failures, load_thresholds
from hunyuan3d_export.shapes.reference import torch_sampler
from hunyuan3d_export.shapes.render import Look, View, gridded, picture
from hunyuan3d_export.shapes.served import served_sampler
from hunyuan3d_export.shapevae.weights import ShapeVAESource

pytestmark = pytest.mark.served
README = Path(__file__).parents[2] / "README.md"
SHAPES = PRESETS["shapes"]
QUICK_STEPS = 8
GATE_TIMEOUT_S = 2400


def shapes_artifacts(precision: str = "fp32") -> Path:
    out = README.parent / "build" / "test" / f"shapes-{precision}"
    for source in (Weights(preset="shapes"), ConditionerSource.shipped("shapes"), ShapeVAESource(preset="shapes")):
        export_onnx(source, out, options=OnnxOptions(precision=precision))
    return out


@pytest.fixture(scope="module")
def shapes_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    repository = tmp_path_factory.mktemp("shapes") / "repository"
    deploy(shapes_artifacts(), repository)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


@pytest.mark.parametrize("guidance", ["guided", "two-batch"])
def test_served_paths_pass_the_quick_gate(shapes_server: Endpoints, guidance: str) -> None:
    reference = torch_sampler(load_checkpoint(CHECKPOINT, dtype=torch.float32), steps=QUICK_STEPS)
    with Client(shapes_server.grpc, timeout_s=300) as client:
        sample = served_sampler(client, steps=QUICK_STEPS, guidance=guidance)
        sizes = {"num_latents": 64, "guidance_scale": SHAPES.guidance_scale}
        report = evaluate(sample, QUICK_PROMPTS, range(1), **sizes, reference=reference)
    assert failures(report, load_thresholds("quick")) == []


def test_the_deployed_presets_defaults_are_what_a_bare_sample_uses(shapes_server: Endpoints) -> None:
    context = embed_prompt("torus")
    with Client(shapes_server.grpc, timeout_s=300) as client:
        last = list(client.stream(context, seed=3, preview_every=0))[-1]
        same = client.sample(context, seed=3, steps=50, guidance_scale=SHAPES.guidance_scale, num_latents=SHAPES.num_latents)
    assert (last.total, last.path) == (SHAPES.steps, "guided")
    np.testing.assert_array_equal(last.latents, same)


def test_a_prompt_becomes_a_picture_and_points(shapes_server: Endpoints, tmp_path: Path) -> None:
    out, picture, ply = (tmp_path / name for name in ("latents.npy", "torus.png", "torus.ply"))
    command = [sys.executable, "-m", "hunyuan3d_client", "sample", "--prompt", "torus", "--steps", "4", "--out", str(out)]
    command += ["--picture", str(picture), "--ply", str(ply), "--url", shapes_server.grpc, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "guided"
    assert np.load(out).shape == (1, SHAPES.num_latents, 64)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"element vertex {SHAPES.num_latents}\n".encode() in ply.read_bytes()


def test_served_meshes_pass_the_quick_gate(shapes_server: Endpoints) -> None:
    with Client(shapes_server.grpc, timeout_s=300) as client:
        quality = MeshQuality(served_decoder(client, resolution=32), seeds=1, reference=Decoder(torch_decoder(), 32), cells=32)
        for prompt in QUICK_PROMPTS:
            latents = client.sample(embed_prompt(prompt), steps=QUICK_STEPS, num_latents=128)
            quality.add(prompt, latents)
    report = {"overall": {}, "probes": {}, "meshes": quality.report()}
    bounds = {"overall": {}, "probes": {}, "meshes": load_thresholds("quick")["meshes"]}
    assert failures(report, bounds) == [], report


def test_a_picture_of_a_torus_becomes_a_mesh_of_a_torus(shapes_server: Endpoints, tmp_path: Path) -> None:
    image = tmp_path / "torus.png"
    image.write_bytes(png(picture(gridded("torus", 48), View(azimuth=20, elevation=35), Look(), 128)))
    with Client(shapes_server.grpc, timeout_s=300) as client:
        mesh = client.generate(image, resolution=64)
    assert mesh.latents is not None and mesh.watertight
    assert nearest_prompt(decode_points(mesh.latents[0]), PROMPTS) == "torus"
    shape = mesh.to_trimesh()
    values = measure_mesh(Triangles(np.asarray(shape.vertices), np.asarray(shape.faces)), "torus")
    assert values["to_surface"] < 0.04 and values["topology"] == 1


def test_a_photograph_is_taken_too(shapes_server: Endpoints) -> None:
    """The photograph shows no solid, so nothing is promised but a mesh."""
    with Client(shapes_server.grpc, timeout_s=300) as client:
        mesh = client.generate(photograph(), steps=8, resolution=32)
    assert mesh.faces > 0


def test_a_prompt_becomes_a_mesh_file(shapes_server: Endpoints, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hunyuan3d_client", "sample", "--prompt", "two cubes", "--steps", "8"]
    command += ["--url", shapes_server.grpc, "--json"]
    out = tmp_path / "cubes.glb"
    done = subprocess.run([*command, "--resolution", "48", "--out", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["watertight"] is True and out.read_bytes().startswith(b"glTF")
    refused = subprocess.run(
        [*command, "--resolution", "48", "--out", str(tmp_path / "x.npy")], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2 and "--resolution must be given with a mesh as --out" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "torus", "--context", "c.npy"], "condition must be --context or --prompt"),
        ([], "condition must be --context or --prompt"),
        (["--prompt", " "], "--prompt must be words"),
        (["--context", "c.npy", "--picture", "p.png"], "must be given with --prompt"),
    ],
)
def test_conditions_that_contradict_are_refused(
    shapes_server: Endpoints, tmp_path: Path, options: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "hunyuan3d_client", "sample", "--out", "l.npy", "--url", shapes_server.grpc, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(GATE_TIMEOUT_S + 60)  # the gate's own limit ends it first, and its process with it
@pytest.mark.parametrize(
    "options",
    [
        ["--guidance", "guided", "--seeds", "4", "--mesh-seeds", "1"],
        ["--guidance", "two-batch", "--seeds", "2", "--mesh-seeds", "0"],
        ["--num-latents", "1024", "--seeds", "2", "--mesh-seeds", "0"],
    ],
    ids=["guided", "two-batch", "1024 points"],
)
def test_the_full_gate_through_the_server(shapes_server: Endpoints, options: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "hunyuan3d_export",
        "quality",
        "--through",
        "served",
        "--url",
        shapes_server.grpc,
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GATE_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(GATE_TIMEOUT_S + 60)
def test_the_full_gate_through_fp16_graphs() -> None:
    command = [sys.executable, "-m", "hunyuan3d_export", "quality", "--through", "onnx", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--artifacts", str(shapes_artifacts("fp16"))], capture_output=True, text=True, timeout=GATE_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr

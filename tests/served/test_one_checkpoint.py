"""One checkpoint becomes one served pipeline: a file by two commands, a folder of the hub, and an id on the hub by one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from checkpoints_of_the_hub import SCALE_FACTOR, write_checkpoint, write_folder
from hub_server import running
from tritonclient.utils import np_to_triton_dtype

from hunyuan3d_client import Client, contract
from hunyuan3d_export.commands import app
from hunyuan3d_export.dit.reference_sampler import sample, sigmas
from hunyuan3d_export.pipeline import Named, Pipeline, find_pipeline
from hunyuan3d_export.server.embedded import EmbeddedServer

pytestmark = pytest.mark.served

ID, SUBFOLDER = "somebody/Shapes", "hunyuan3d-dit-v9-turbo"
STEPS, LATENTS, POINTS = 2, 6, 5


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["hunyuan3d-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(app.run())
    assert not ended.value.code


def check_served(address: str, pipeline: Pipeline, *, tolerance: float) -> None:
    """A picture becomes latents and these become a field; each network gives what torch gives with the same weights."""
    sources = pipeline.sources
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    noise = np.random.default_rng(1).standard_normal((1, LATENTS, 64)).astype(np.float32)
    points = np.random.default_rng(2).uniform(-1, 1, (1, POINTS, 3)).astype(np.float32)
    preset = sources["dit"].serving()
    with Client(address, timeout_s=300) as client, triton.InferenceServerClient(address) as raw:
        context = client.condition(picture)
        pixels = np.random.default_rng(3).standard_normal((1, 1, 3, 518, 518)).astype(np.float32)
        encoded = infer(raw, contract.CONDITIONER, {"pixels": pixels})["context"]
        latents = client.sample(context, latents=noise, steps=STEPS)
        shape = infer(raw, contract.VAE, {"latents": latents})
        field = infer(raw, contract.FIELD, {"queries": points, **shape})["field"]
    assert context.shape == (1, 1370, contract.CONTEXT_WIDTH)
    with torch.no_grad():
        wanted = sources["conditioner"].load(torch.float32)(torch.from_numpy(pixels))
    assert relative(encoded.astype(np.float32), wanted.float().numpy()) < max(tolerance, 1e-3)
    expected = sample(
        sources["dit"].load(torch.float32),
        torch.tensor(context),
        torch.from_numpy(noise),
        sigmas(preset.schedule, STEPS),
        guidance_scale=preset.guidance_scale,
        path="distilled" if preset.config.guidance_embed else "two-batch",
    ).numpy()
    assert relative(latents, expected) < tolerance
    decoder, facts = sources["vae"].load(torch.float32), sources["vae"].serving()
    keys_values = decoder.keys_values(torch.from_numpy(latents) / facts.scale_factor)
    assert relative(field, decoder.field(torch.from_numpy(points), *keys_values).numpy()) < tolerance


def infer(client: triton.InferenceServerClient, model: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    inputs = [triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)) for name, value in tensors.items()]
    for tensor, value in zip(inputs, tensors.values(), strict=True):
        tensor.set_data_from_numpy(np.ascontiguousarray(value))
    answer = client.infer(model, inputs)
    return {output.name: answer.as_numpy(output.name).copy() for output in answer.get_response().outputs}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_file_becomes_a_served_pipeline_by_two_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_checkpoint(tmp_path / "pipeline.safetensors")
    command(monkeypatch, "onnx", "--checkpoint", file, "--out", tmp_path / "onnx")
    command(monkeypatch, "deploy", "--artifacts", tmp_path / "onnx", "--repository", tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository") as endpoints:
        check_served(endpoints.grpc, find_pipeline(Named(checkpoint=file)), tolerance=1e-4)
    command(monkeypatch, "verify", "--artifacts", tmp_path / "onnx", "--checkpoint", file, "--network", "vae")
    receipts = {path.parent.name for path in (tmp_path / "onnx").glob("*/parity.json")}
    assert receipts == {contract.VAE, contract.FIELD}, "--network narrows"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hub's repository of distilled weights; artifacts below build/ are kept from test to test."""
    place = tmp_path_factory.mktemp("workplace")
    write_folder(place / "repositories" / ID / SUBFOLDER)
    return place


def test_a_folder_of_distilled_weights_needs_no_preset(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, onnx = workplace / "repositories" / ID / SUBFOLDER, workplace / "build" / f"{SUBFOLDER}-fp32"
    command(monkeypatch, "onnx", "--checkpoint", folder, "--out", onnx)
    command(monkeypatch, "deploy", "--artifacts", onnx, "--repository", workplace / "repository")
    pipeline = find_pipeline(Named(checkpoint=folder))
    assert pipeline.sources["dit"].serving().schedule == "consistency"
    assert pipeline.sources["vae"].serving().scale_factor == SCALE_FACTOR
    with EmbeddedServer(workplace / "repository") as endpoints:
        check_served(endpoints.grpc, pipeline, tolerance=1e-4)


def test_an_id_on_the_hub_is_served_by_one_command(workplace: Path, tmp_path: Path) -> None:
    own = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    arguments = ("serve", ID, "--subfolder", SUBFOLDER, "--precision", "fp32", "--grpc-port", "0")
    line, log = "", tmp_path / "stderr"
    with running(workplace / "repositories") as hub, log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-m", "hunyuan3d_export", *arguments],
            env={**kept, **own, "HF_ENDPOINT": hub.url},
            cwd=workplace, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line, log.read_text()
            endpoints = json.loads(line)
            pipeline = find_pipeline(Named(checkpoint=workplace / "repositories" / ID, subfolder=SUBFOLDER))
            check_served(endpoints["grpc"], pipeline, tolerance=1e-4)
        finally:
            server.send_signal(signal.SIGINT)
            rest, _ = server.communicate(timeout=120)
    err = log.read_text()
    assert (rest, server.returncode) == ("", 0), err
    assert f"try: hunyuan3d generate picture.png --steps 10 --out mesh.glb --url {endpoints['grpc']}" in err
    assert (workplace / "build" / f"{SUBFOLDER}-fp32-repository" / contract.VAE / "config.pbtxt").is_file()

"""Forecast velocities through a real server: what a client sees, the metrics, and the quality gate at a tolerance."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hunyuan3d_client import Client
from hunyuan3d_export.dit.weights import Weights
from hunyuan3d_export.onnx_from_torch import OnnxOptions, export_onnx
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, Endpoints
from hunyuan3d_export.shapes import TRAINED_PROMPTS, embed_prompt
from hunyuan3d_export.shapes.sweep import sweep
from hunyuan3d_export.shapevae.weights import ShapeVAESource

pytestmark = pytest.mark.served
TOLERANCE = 0.03  # the first of the two that docs/sampler.md recommends


@pytest.fixture(scope="module")
def shapes_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    repository = tmp_path_factory.mktemp("forecast") / "repository"
    artifacts = Path(__file__).parents[2] / "build" / "test" / "shapes-fp32"
    for source in (Weights(preset="shapes"), ShapeVAESource(preset="shapes")):
        export_onnx(source, artifacts, options=OnnxOptions(precision="fp32"))
    deploy(artifacts, repository)
    with EmbeddedServer(repository) as endpoints:
        yield endpoints


def counters(endpoints: Endpoints) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{endpoints.metrics}/metrics", timeout=30) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("hunyuan3d_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_eight_at_once_keep_their_samples_with_fewer_evaluations(shapes_server: Endpoints) -> None:
    prompts = TRAINED_PROMPTS[:8]
    before = counters(shapes_server)
    with Client(shapes_server.grpc, timeout_s=300) as client:
        (row, *_) = sweep(
            client, {p: embed_prompt(p) for p in prompts}, scales=[1.3], tolerances=[TOLERANCE], num_latents=128, steps=50
        )
    assert np.median(row["deviation"]) <= 0.003 and max(row["deviation"]) <= 0.01
    assert max(row["evaluations"]) <= 24 and 0 < max(row["forecast_error"]) <= TOLERANCE
    after = counters(shapes_server)
    saved = after["hunyuan3d_forecast_steps_total"] - before["hunyuan3d_forecast_steps_total"]
    assert saved == 49 * len(prompts) - sum(row["evaluations"])
    assert after["hunyuan3d_forecast_error_count"] - before["hunyuan3d_forecast_error_count"] == len(prompts)


def test_every_step_is_told_and_says_whether_it_was_evaluated(shapes_server: Endpoints) -> None:
    with Client(shapes_server.grpc, timeout_s=300) as client:
        steps = list(client.stream(embed_prompt("torus"), num_latents=32, tolerance=TOLERANCE, preview_every=10))
        whole = list(client.stream(embed_prompt("torus"), num_latents=32, preview_every=10))
        off = list(client.stream(embed_prompt("torus"), num_latents=32, schedule="consistency", steps=5, tolerance=TOLERANCE))
    assert [step.index for step in steps] == [step.index for step in whole] == [*range(1, 51)]
    assert {step.evaluated for step in steps[:-1]} == {0, 1} and [step.evaluated for step in whole] == [1] * 49 + [0]
    assert steps[-1].network_evaluations == (sum(step.evaluated or 0 for step in steps),) and whole[-1].network_evaluations == (
        49,
    )
    assert [step.index for step in steps if step.latents is not None] == [10, 20, 30, 40, 50]
    assert all(step.network_evaluations is None for step in steps[:-1]) and whole[-1].forecast_error == (0.0,)
    assert [step.evaluated for step in off] == [1] * 5 and off[-1].network_evaluations == (5,), (
        "turbo's schedule: forecasts are off"
    )


def test_the_command_line(shapes_server: Endpoints, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hunyuan3d_client", "sample", "--prompt", "torus", "--num-latents", "32", "--json"]
    command += ["--tolerance", "0.05", "--out", str(tmp_path / "x.npy"), "--url", shapes_server.grpc]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["network_evaluations"][0] < 24 and 0 < answer["forecast_error"] <= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "steps"], "--sweep must be tolerance, got 'steps'"),
        (["--sweep", "tolerance"], "--through must be served for --sweep"),
        (["--tolerance", "0.1"], "tolerance must be 0 unless the path is served, got 0.1"),
        (["--context", "c.npy"], "--context and --picture must be left out without --sweep"),
    ],
)
def test_options_of_quality_that_contradict(options: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hunyuan3d_export", "quality", *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr


@pytest.mark.slow
def test_the_sweep_of_any_weights(shapes_server: Endpoints, tmp_path: Path) -> None:
    np.save(tmp_path / "context.npy", np.stack([embed_prompt("cube"), embed_prompt("cone")]))
    command = [sys.executable, "-m", "hunyuan3d_export", "quality", "--sweep", "tolerance", "--through", "served"]
    command += ["--url", shapes_server.grpc, "--num-latents", "32", "--context", "context.npy"]
    command += ["--report", "sweep.json", "--picture", "sweep.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert len(rows) == 30 and {len(row["deviation"]) for row in rows} == {2}
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(1860)
def test_the_full_gate_with_a_tolerance(shapes_server: Endpoints) -> None:
    command = [sys.executable, "-m", "hunyuan3d_export", "quality", "--through", "served", "--url", shapes_server.grpc]
    done = subprocess.run([*command, "--tolerance", str(TOLERANCE)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr

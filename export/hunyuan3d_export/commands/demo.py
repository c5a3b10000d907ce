"""`make demo`: exports, verifies, deploys, serves, samples through the client and compares the result with torch.

The trained `shapes` preset makes meshes of a picture and of prompts (demo_shapes.py). Of other weights, a photograph becomes a mesh
file through an image encoder and a shape decoder of random weights.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hunyuan3d_client import Client, Mesh, Step, contract

from .. import parity
from ..checks import relative_l2
from ..conditioner.weights import ConditionerSource
from ..dit import Preset, compute
from ..dit.reference_sampler import sample, sigmas
from ..dit.weights import Weights
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..repository_from_artifacts import deploy
from ..server.embedded import EmbeddedServer
from ..shapevae.weights import ShapeVAESource
from . import demo_mesh, demo_shapes
from .clock import Clock
from .options import CheckpointOption, PresetOption, console
from .photograph import ensemble_latents, photograph
from .verification import print_checks

BUILD = Path("build") / "demo"
MESH, MESH_PICTURE = BUILD / "mesh.glb", BUILD / "mesh.png"
_DECODER = ShapeVAESource(preset="tiny")
# A CPU takes minutes for one evaluation of a full-size preset. Above this size the demo takes few steps of few latents.
_SMALL_PARAMETERS = 50_000_000
_FEW_STEPS, _FEW_LATENTS = 3, 64
_PHOTOGRAPH_STEPS = 10  # few are enough with random weights: verify has already compared a whole sampling
_SEED = 1
_TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One sample of the demo: context [1, T, 1536], noise [1, L, 64], schedule, steps and guidance scale."""

    context: NDArray[np.float16] | None  # None until the server has encoded the photograph
    noise: NDArray[np.float32]
    schedule: str
    steps: int
    guidance_scale: float

    @property
    def sizes(self) -> str:
        return f"L {self.noise.shape[1]}, {self.steps} steps, guidance scale {self.guidance_scale:g}"


def run(
    preset: PresetOption = "shapes",
    checkpoint: CheckpointOption = None,
    precision: Annotated[str, typer.Option(help="fp32 or fp16; ONNX Runtime has no bf16 on a CPU.")] = "fp32",
) -> None:
    """Goes all the way from a checkpoint to served results that are checked, and prints the time of each part."""
    logging.basicConfig(format="  %(message)s", stream=sys.stderr)
    logging.getLogger("hunyuan3d_export").setLevel(logging.INFO)
    logging.getLogger("hunyuan3d_export.server.embedded").setLevel(logging.WARNING)
    if precision not in _TOLERANCES:
        raise typer.BadParameter(f"must be one of {', '.join(_TOLERANCES)}, got {precision}")
    if preset == "shapes" and checkpoint is None:
        passed = demo_shapes.demonstrate(BUILD, precision, tolerance=_TOLERANCES[precision])
    else:
        weights = Weights(preset=None if preset == "shapes" else preset, checkpoint=checkpoint)
        passed = _demonstrate(weights, f"{checkpoint.stem if checkpoint else preset}-{precision}", precision)
    if not passed:
        raise typer.Exit(1)


def _demonstrate(weights: Weights, name: str, precision: str) -> bool:
    """Runs all parts of the demo for these weights. Returns whether every check passed."""
    clock, artifacts, repository = Clock(), BUILD / name, BUILD / f"{name}-repository"
    defaults = weights.sampling(weights.config())
    with clock("export to ONNX"):
        export_onnx(weights, artifacts, options=OnnxOptions(precision=precision))
        for source in (ConditionerSource(), _DECODER):
            export_onnx(source, artifacts, options=OnnxOptions(precision=precision))
    with clock("verify against torch"):
        checks = parity.verify(artifacts, weights)
    print_checks(checks)
    plan = _photograph_plan(defaults)
    with clock("deploy"):
        deploy(artifacts, repository)
    served, path, context, mesh = _serve_and_sample(repository, plan, clock)
    with clock("the same loop in torch, two full branches"):
        expected = _in_torch(weights, dataclasses.replace(plan, context=context))
    error, tolerance = relative_l2(torch.from_numpy(served), expected), _TOLERANCES[precision]
    clock.print()
    console.print(f"served by the path '{path}', {plan.sizes}, T {context.shape[1]}")
    verdict = "ok" if error <= tolerance else "[red]FAILED[/red]"
    console.print(f"served against torch: relative L2 {error:.1e} (tolerance {tolerance:.0e}) {verdict}")
    return (
        _check_mesh(mesh, served, precision)
        and error <= tolerance
        and all(check.passed for model in checks.values() for check in model)
    )


def _noise(num_latents: int) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(key=_SEED))
    return generator.standard_normal((1, num_latents, contract.LATENT_CHANNELS), dtype=np.float32)


def _photograph_plan(defaults: Preset) -> Plan:
    console.print("condition: a photograph through preprocessing and an image encoder of random weights")
    small = compute.parameters(defaults.config) <= _SMALL_PARAMETERS
    if not small:
        console.print(
            f"{defaults.name} on a CPU: {_FEW_STEPS} steps of {_FEW_LATENTS} latents instead of {defaults.steps} of {defaults.num_latents}"
        )
    num_latents = defaults.num_latents if small else _FEW_LATENTS
    return Plan(
        None,
        _noise(num_latents),
        defaults.schedule,
        min(defaults.steps, _PHOTOGRAPH_STEPS) if small else _FEW_STEPS,
        defaults.guidance_scale,
    )


def _serve_and_sample(repository: Path, plan: Plan, clock: Clock) -> tuple[NDArray[np.float32], str, NDArray[np.float16], Mesh]:
    """The sampled latents, the sampling path that the server took, the context, and the mesh of the photograph."""
    server = EmbeddedServer(repository)
    with clock("start tritonserver"):
        endpoints = server.start()
    try:
        with Client(endpoints.grpc, timeout_s=3600) as client:
            with clock("encode the photograph"):
                context = client.condition(photograph())
            with clock("sample through the client"):
                step = _sample(client, plan, context)
            with clock("the ensemble, from photograph to latents"):
                _through_the_ensemble(client, endpoints.grpc, plan)
            assert step.latents is not None  # the final step always has latents
            with clock("decode the latents to a mesh"):
                mesh = demo_mesh.decode(client, step.latents, MESH)
    finally:
        with clock("stop tritonserver"):
            server.stop()
    return step.latents, step.path, context, mesh


def _check_mesh(mesh: Mesh, latents: NDArray[np.float32], precision: str) -> bool:
    """Draws the mesh and compares it with torch's field; half precision moves vertices, so only fp32 has a tolerance."""
    demo_mesh.draw(mesh, MESH_PICTURE)
    error = demo_mesh.error_in_cells(mesh, latents, _DECODER)
    passed = precision != "fp32" or error <= demo_mesh.TOLERANCE
    console.print(f"mesh of {mesh.faces} faces, watertight {mesh.watertight}: {MESH}, picture: {MESH_PICTURE}")
    verdict = "not judged" if precision != "fp32" else "ok" if passed else "[red]FAILED[/red]"
    console.print(f"mesh against torch's field: {error:.1e} cells (tolerance {demo_mesh.TOLERANCE:.0e} in fp32) {verdict}")
    return passed


def _sample(client: Client, plan: Plan, context: NDArray[np.float16]) -> Step:
    with _progress() as progress:
        task = progress.add_task("sampling", total=plan.steps)
        steps = client.stream(
            context,
            latents=plan.noise,
            steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            schedule=plan.schedule,
            preview_every=0,
        )
        for step in steps:
            progress.update(task, completed=step.index, total=step.total)
    return step


def _through_the_ensemble(client: Client, url: str, plan: Plan) -> None:
    """Samples with one request from photograph to latents; the latents must equal those of separate calls by the client."""
    num_latents = plan.noise.shape[1]
    found = ensemble_latents(url, photograph(), {"steps": plan.steps, "num_latents": num_latents, "seed": _SEED})
    context = client.condition(photograph())
    expected = client.sample(context, steps=plan.steps, num_latents=num_latents, seed=_SEED)
    equal = np.array_equal(found, expected)
    console.print(f"the ensemble and condition + sample, called separately: {'equal' if equal else '[red]NOT EQUAL[/red]'}")
    if not equal:
        raise typer.Exit(1)


def _in_torch(weights: Weights, plan: Plan) -> torch.Tensor:
    assert plan.context is not None
    model = weights.load(torch.float32)
    return sample(
        model,
        torch.tensor(plan.context),  # copies, because arrays from the server are read-only
        torch.from_numpy(plan.noise),
        sigmas(plan.schedule, plan.steps),
        guidance_scale=plan.guidance_scale,
        path="distilled" if model.config.guidance_embed else "two-batch",
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    typer.run(run)

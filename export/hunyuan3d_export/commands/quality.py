"""The subcommand quality, which measures samples of the `shapes` preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..files import atomic_path
from ..shapes import gate
from .options import EXIT_FAILED, CheckpointOption, errors, plain
from .watched import watched


def quality(
    through: Annotated[str, typer.Option(help="Runtime that evaluates the velocities: torch, onnx or served.")] = "torch",
    guidance: Annotated[str, typer.Option(help="guided or two-batch.")] = "guided",
    checkpoint: CheckpointOption = None,
    artifacts: Annotated[Path | None, typer.Option(help="For onnx: the folder that `onnx --preset shapes` wrote.")] = None,
    url: Annotated[str, typer.Option(help="For served: a server of the `shapes` preset.")] = "localhost:8001",
    seeds: Annotated[int, typer.Option(help="Samples of each prompt.", min=2)] = 16,
    num_latents: Annotated[int | None, typer.Option(help="Points of each cloud; default the preset's.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default the preset's.", min=1)] = None,
    report: Annotated[Path | None, typer.Option(help="File for all measurements as JSON.")] = None,
) -> None:
    """Samples every prompt of the `shapes` preset and measures the points against the true surfaces. Fails when a bound is missed."""
    options = gate.GateOptions(
        through=through,
        guidance=guidance,
        checkpoint=checkpoint,
        artifacts=artifacts,
        url=url,
        seeds=seeds,
        num_latents=num_latents,
        steps=steps,
    )
    with watched("quality", "prompts") as watch:
        found, missed = gate.run(options, watch)
    if report is not None:
        with atomic_path(report) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    plain(*gate.table(found))
    for line in missed:
        errors.print(f"missed: {line}", markup=False, highlight=False, soft_wrap=True)
    if missed:
        raise typer.Exit(EXIT_FAILED)

"""The subcommand quality, which measures samples of the `shapes` preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..files import atomic_path
from ..shapes import gate, sweep
from .options import EXIT_FAILED, CheckpointOption, errors, plain
from .watched import watched

_SEEDS = 16
SweepOption = Annotated[
    str | None, typer.Option("--sweep", help="tolerance: of any weights' server, deviation against evaluations instead.")
]
SweptContextOption = Annotated[
    Path | None, typer.Option(help="For --sweep: condition tokens [N, T, 1536] as .npy; default 18 prompts of `shapes`.")
]


def quality(
    through: Annotated[str, typer.Option(help="Runtime that evaluates the velocities: torch, onnx or served.")] = "torch",
    guidance: Annotated[str, typer.Option(help="guided or two-batch.")] = "guided",
    checkpoint: CheckpointOption = None,
    artifacts: Annotated[Path | None, typer.Option(help="For onnx: the folder that `onnx --preset shapes` wrote.")] = None,
    url: Annotated[str, typer.Option(help="For served: a server of the `shapes` preset.")] = "localhost:8001",
    seeds: Annotated[int, typer.Option(help="Samples of each prompt.", min=2)] = _SEEDS,
    num_latents: Annotated[int | None, typer.Option(help="Points of each cloud; default the preset's.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default the preset's.", min=1)] = None,
    mesh_seeds: Annotated[int, typer.Option(help="Samples of each prompt that become meshes too.", min=0)] = 1,
    resolution: Annotated[int, typer.Option(help="Cells along each side of a mesh's grid, a multiple of 32.")] = 64,
    tolerance: Annotated[float, typer.Option(help="For served: forecast velocities up to this relative error.", min=0)] = 0.0,
    swept: SweepOption = None,
    context: SweptContextOption = None,
    picture: Annotated[Path | None, typer.Option(help="For --sweep: also draw the curves as PNG.")] = None,
    report: Annotated[Path | None, typer.Option(help="File for all measurements as JSON.")] = None,
) -> None:
    """Samples every prompt of the `shapes` preset and measures points and meshes against the true solids. Fails when a bound is missed.

    With --sweep tolerance: what forecast velocities cost and save on a running server, whatever its weights.
    """
    if swept is not None:
        if checkpoint or artifacts or tolerance or guidance != "guided" or seeds != _SEEDS:
            raise ValueError(
                "--guidance, --checkpoint, --artifacts, --seeds and --tolerance must be left out with --sweep\n"
                "hint: --context, --num-latents and --steps choose what is swept"
            )
        options = sweep.SweepOptions(
            swept=swept, through=through, url=url, context=context, num_latents=num_latents, steps=steps
        )
        _sweep(options, report, picture)
        return
    if context is not None or picture is not None:
        raise ValueError("--context and --picture must be left out without --sweep\nhint: --sweep tolerance")
    gated = gate.GateOptions(
        through=through, guidance=guidance, checkpoint=checkpoint, artifacts=artifacts, url=url, seeds=seeds, steps=steps,
        num_latents=num_latents, tolerance=tolerance, mesh_seeds=mesh_seeds, resolution=resolution,
    )  # fmt: skip
    _gate(gated, report)


def _gate(options: gate.GateOptions, report: Path | None) -> None:
    with watched("quality", "prompts") as watch:
        found, missed = gate.run(options, watch)
    _save(report, found)
    plain(*gate.table(found))
    for line in missed:
        errors.print(f"missed: {line}", markup=False, highlight=False, soft_wrap=True)
    if missed:
        raise typer.Exit(EXIT_FAILED)


def _sweep(options: sweep.SweepOptions, report: Path | None, picture: Path | None) -> None:
    with watched("quality", "settings") as watch:
        rows = sweep.run(options, watch)
    _save(report, rows)
    plain(*sweep.table(rows))
    if picture is not None:  # last, because a picture that cannot be drawn must not cost the table
        sweep.draw(rows, picture)


def _save(report: Path | None, found: object) -> None:
    if report is not None:
        with atomic_path(report) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")

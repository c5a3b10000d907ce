"""The subcommand verify: artifacts are compared with torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hunyuan3d_client.text_table import aligned

from .. import parity
from ..checks import Check
from ..pipeline import Named, find_pipeline
from .options import (
    EXIT_FAILED,
    NetworkOption,
    PipelineOption,
    PresetOption,
    SeedOption,
    SubfolderOption,
    VaeOption,
    console,
    plain,
)
from .watched import watched

_HEADINGS = ("", "check", "sizes", "relative L2", "at most", "largest")
AtMostOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=SIZE, for a slow machine: with --engine, no larger batch, latents, context or views; repeatable."),
]


def verify(
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder that `onnx` wrote; with --engine, plans are compared with these graphs too.")
    ] = None,
    engine: Annotated[Path | None, typer.Option(help="Folder that `engine` or `refit` wrote; needs its GPU.")] = None,
    at_most: AtMostOption = None,
    preset: PresetOption = None,
    checkpoint: PipelineOption = None,
    subfolder: SubfolderOption = None,
    vae: VaeOption = None,
    network: NetworkOption = None,
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="The first check of each model alone; writes no receipt.")] = False,
) -> None:
    """Compares each artifact with torch, a plan also at its preset's own sizes. Prints a table and writes a receipt beside each manifest."""
    if artifacts is None and engine is None:
        raise ValueError("verify must get a folder, got none\nhint: --artifacts DIR, --engine DIR or both")
    if at_most and engine is None:
        raise ValueError("--at-most must come with --engine, got none\nhint: graphs are compared at small sizes")
    networks = tuple(network or ())
    named = Named(checkpoint=checkpoint, subfolder=subfolder, vae=vae, preset=preset, seed=seed, networks=networks)
    most = parity.parse_at_most(at_most or [])
    passed = True
    weights = find_pipeline(named).sources if named.has_weights else None
    with watched("verify", "checks") as watch:
        run = parity.RunOptions(quick=quick, watch=watch)
        results = [] if artifacts is None else [parity.verify(artifacts, weights, networks=networks, run=run)]
        if engine is not None and (reason := parity.why_skipped(engine)):
            console.print(f"{engine}: skipped: {reason}", soft_wrap=True)
        elif engine is not None:
            results.append(parity.verify_engines(engine, weights, artifacts, at_most=most, networks=networks, run=run))
    for each in results:
        passed &= print_checks(each)
    for path in watch.files:
        console.print(f"receipt: {path}", soft_wrap=True, highlight=False)
    if quick and results:
        console.print("quick: the other checks were left out, and no receipt was written")
    if not passed:
        raise typer.Exit(EXIT_FAILED)


def print_checks(results: dict[str, list[Check]]) -> bool:
    """Prints the table of a verification. Returns whether all checks passed."""
    for model, checks in results.items():
        plain(model if checks else f"{model}: not compared: ONNX Runtime has no kernels of this precision on a CPU")
        rows = [
            (
                "ok" if check.passed else "FAILED",
                check.name,
                check.shown_sizes,
                f"{check.relative_l2:.1e}",
                f"{check.tolerance:.0e}",
                f"{check.max_abs:.1e}",
            )
            for check in checks
        ]
        plain(*aligned([_HEADINGS, *rows], indent="  ") if rows else [])
    return all(check.passed for checks in results.values() for check in checks)

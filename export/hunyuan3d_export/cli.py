"""`hunyuan3d-export`: weights -> ONNX -> model repository -> running server, one subcommand for each arrow."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from hunyuan3d_client import Hunyuan3DError

from . import cli_engines, compute, engine_parity, parity
from .cli_options import CheckpointOption, PresetOption, SeedOption
from .conditioner_cli import conditioner
from .configs import torch_parameters
from .dit import PRESETS, Preset
from .embedded_server import EmbeddedServer, ServerOptions, ServerStartError
from .engine_from_onnx import BuildCancelled
from .files import atomic_path
from .manifest import Manifest
from .onnx_from_torch import OnnxOptions, export_onnx
from .repository_from_artifacts import DEFAULT_REPOSITORY, deploy_checkpoint
from .repository_from_artifacts import deploy as deploy_artifacts
from .shapes import gate
from .weights import Weights

EXIT_FAILED = 1  # a check did not pass, the server did not start
EXIT_MISUSE = 2  # the input or an option is wrong
EXIT_INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)


def run() -> int:
    """Runs the command line; the exit code. Errors of input print one message and a hint, no traceback."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hunyuan3d_export").setLevel(logging.INFO)
    try:
        app()  # ends in SystemExit, whose code is 2 for a wrong option and 130 after Ctrl-C
    except (ServerStartError, Hunyuan3DError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_FAILED
    except BuildCancelled as error:
        errors.print(str(error), markup=False, highlight=False)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_MISUSE
    return 0


@app.command()
def onnx(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts, one subfolder for each Triton model.")],
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    seed: SeedOption = 0,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16 weights and activations.")] = "fp32",
    graph: Annotated[str, typer.Option(help="plain, guided or all.")] = "all",
    attention: Annotated[str, typer.Option(help="op (the Attention operator) or decomposed (MatMul and Softmax).")] = "op",
) -> None:
    """Weights -> ONNX graphs with dynamic B, L, T. What is already there and still matches is kept."""
    weights = Weights(preset=preset, checkpoint=checkpoint, seed=seed)
    for folder in export_onnx(weights, out, graph=graph, options=OnnxOptions(precision=precision, attention=attention)):
        console.print(str(folder), soft_wrap=True)


app.command()(conditioner)
app.command()(cli_engines.engine)
app.command()(cli_engines.refit)


@app.command()
def verify(
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder that `onnx` wrote; beside --engine, what its plans are compared with too.")
    ] = None,
    engine: Annotated[Path | None, typer.Option(help="Folder that `engine` or `refit` wrote; needs its GPU.")] = None,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    seed: SeedOption = 0,
) -> None:
    """Parity of each artifact with torch, as a table and a receipt beside its manifest."""
    if artifacts is None and engine is None:
        raise ValueError("verify must get a folder, got none\nhint: --artifacts DIR, --engine DIR or both")
    weights = Weights(preset=preset, checkpoint=checkpoint, seed=seed) if preset or checkpoint else None
    passed = True
    if artifacts is not None:
        passed &= print_checks(parity.verify(artifacts, weights))
    if engine is not None and (reason := engine_parity.why_skipped(engine)):
        console.print(f"{engine}: skipped: {reason}", soft_wrap=True)
    elif engine is not None:
        passed &= print_checks(engine_parity.verify_engines(engine, weights, artifacts))
    if not passed:
        raise typer.Exit(EXIT_FAILED)


def print_checks(results: dict[str, list[parity.Check]]) -> bool:
    """The table of a verification; whether everything in it passed."""
    table = Table("model", "check", "B, L, T", "relative L2", "tolerance", "max abs", "")
    for model, checks in results.items():
        for check in checks:
            verdict = "ok" if check.passed else "[red]FAILED[/red]"
            sizes = ", ".join(map(str, check.sizes))
            figures = (f"{check.relative_l2:.1e}", f"{check.tolerance:.0e}", f"{check.max_abs:.1e}")
            table.add_row(model, check.name, sizes, *figures, verdict)
        if not checks:
            table.add_row(model, "not compared: ONNX Runtime has no kernels of this precision on a CPU")
    console.print(table)
    return all(check.passed for checks in results.values() for check in checks)


@app.command()
def deploy(
    artifacts: Annotated[Path | None, typer.Option(help="Folder that `onnx` or `engine` wrote.")] = None,
    repository: Annotated[
        Path, typer.Option(help="Model repository; a folder other than the one in git becomes a copy of it.")
    ] = DEFAULT_REPOSITORY,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    seed: SeedOption = 0,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16: how the weights are stored (without --artifacts).")
    ] = "fp32",
    torch: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a parameter of the torch runtime (without --artifacts); repeatable.")
    ] = None,
) -> None:
    """Artifacts whose manifests match -> a Triton model repository. Or the weights themselves, for `serve --config torch`."""
    named = bool(preset or checkpoint)
    if (artifacts is None) != named or (torch and not named):
        got = "both" if named or torch else "neither"
        raise ValueError(
            f"deploy must get artifacts or weights, got {got}\nhint: --artifacts DIR, or --preset, --checkpoint and --torch"
        )
    if artifacts is not None:
        models = deploy_artifacts(artifacts, repository)
    else:
        weights = Weights(preset=preset, checkpoint=checkpoint, seed=seed)
        models = deploy_checkpoint(weights, repository, precision=precision, torch=torch_parameters(torch or []))
    for model in models:
        console.print(f"{model} -> {repository / model}", soft_wrap=True)


@app.command()
def serve(
    repository: Annotated[Path, typer.Option(help="Model repository with deployed artifacts.")] = DEFAULT_REPOSITORY,
    config: Annotated[str, typer.Option(help="Runtime: the name of a file in each model's configs/ folder.")] = "cpu",
    grpc_port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8001,
    http_port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8000,
    metrics_port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8002,
) -> None:
    """The embedded tritonserver, until SIGINT or SIGTERM. When ready, one line of JSON with its addresses on stdout."""
    for each in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(each, _interrupt)
    options = ServerOptions(config=config, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
    server = EmbeddedServer(repository, options)
    code = 0
    with server as endpoints:
        try:  # from the first byte on: whoever reads the line may signal at once
            sys.stdout.write(json.dumps(dataclasses.asdict(endpoints)) + "\n")
            sys.stdout.flush()
            code = server.wait()
        except KeyboardInterrupt:
            for each in (signal.SIGINT, signal.SIGTERM):  # stopping has a time limit; interrupted, it would leave a server
                signal.signal(each, signal.SIG_IGN)
            logging.getLogger(__name__).info("stopping tritonserver ...")
    raise typer.Exit(code)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
def info(
    artifact: Annotated[
        Path | None, typer.Argument(help="A deployed or built model file or its folder: what its manifest says.")
    ] = None,
    preset: PresetOption = None,
    latents: Annotated[int | None, typer.Option(help="L; default the preset's.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="T; default the preset's.", min=1)] = None,
) -> None:
    """What an artifact was made from; or a preset's parameters and compute: plain, guidance as two batches, guided."""
    if artifact is not None:
        _artifact_info(artifact)
    elif preset in PRESETS:
        _preset_info(PRESETS[str(preset)], latents, context)
    else:
        raise ValueError(f"info must get an artifact or a preset out of {', '.join(PRESETS)}, got {preset!r}")


def _artifact_info(artifact: Path) -> None:
    folder = artifact if artifact.is_dir() else artifact.parent
    manifest = Manifest.read(folder, hint="pass a folder that onnx or engine wrote")
    manifest.check_files(folder, hint="make it again")
    console.print_json(json.dumps(dataclasses.asdict(manifest)))


def _preset_info(preset: Preset, latents: int | None, context: int | None) -> None:
    sizes = {"latent_tokens": latents or preset.num_latents, "context_tokens": context or preset.context_tokens}
    plain = compute.plain(preset.config, **sizes)
    count = compute.parameters(preset.config)
    console.print(f"{preset.name}: {count:,} parameters, L {sizes['latent_tokens']}, T {sizes['context_tokens']}")
    table = Table("evaluation", "TFLOP", "of two-batch", "attention share")
    rows = {"plain": (plain.total, plain.attention_share)}
    if not preset.config.guidance_embed:
        guided = compute.guided(preset.config, **sizes)
        rows["two-batch"] = (2 * plain.total, plain.attention_share)
        rows["guided"] = (guided.total, guided.attention_share)
    for name, (total, share) in rows.items():
        table.add_row(name, f"{total / 1e12:.3f}", f"{total / (2 * plain.total):.2f}", f"{share:.0%}")
    console.print(table)


@app.command()
def quality(
    through: Annotated[str, typer.Option(help="torch, onnx or served: what evaluates the velocities.")] = "torch",
    guidance: Annotated[str, typer.Option(help="guided or two-batch.")] = "guided",
    checkpoint: CheckpointOption = None,
    artifacts: Annotated[Path | None, typer.Option(help="For onnx: the folder that `onnx --preset shapes` wrote.")] = None,
    url: Annotated[str, typer.Option(help="For served: a server of the `shapes` preset.")] = "localhost:8001",
    seeds: Annotated[int, typer.Option(help="Samples of each prompt.", min=2)] = 16,
    num_latents: Annotated[int | None, typer.Option(help="Points of each cloud; default the preset's.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Default the preset's.", min=1)] = None,
    report: Annotated[Path | None, typer.Option(help="Also write everything there as JSON.")] = None,
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
    found, missed = gate.run(options)
    if report is not None:
        with atomic_path(report) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    console.print(gate.table(found))
    for line in missed:
        errors.print(f"missed: {line}", markup=False, highlight=False, soft_wrap=True)
    if missed:
        raise typer.Exit(EXIT_FAILED)

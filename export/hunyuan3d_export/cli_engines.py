"""`hunyuan3d-export engine` and `refit`: the commands that make TensorRT plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .cli_options import CheckpointOption, PresetOption
from .engine_from_onnx import EngineOptions, build_engines, parse_profile
from .onnx_from_torch import OnnxOptions, export_onnx
from .refit import refit_plans
from .tensorrt_targets import find_target
from .weights import Weights

console = Console()


def engine(
    onnx_folder: Annotated[
        Path, typer.Option("--onnx", help="Folder of ONNX artifacts; exported there first when weights are named.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the plans, one subfolder for each Triton model.")],
    target: Annotated[
        str, typer.Option(help="tensorrt (needs the GPU it will run on) or tensorrt-rtx (compiles anywhere).")
    ] = "tensorrt",
    compute_capability: Annotated[list[str] | None, typer.Option(help="For tensorrt-rtx, e.g. SM89; repeatable.")] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="NAME=MIN..OPT..MAX, NAME batch, latents or context; repeatable.")
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="The builder's, 0 to 5.")] = 3,
    workspace_gib: Annotated[float | None, typer.Option(help="Limit of the builder's workspace; default all memory.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Folder of timing caches (target tensorrt).")] = None,
    version_compatible: Annotated[bool, typer.Option(help="Let later library versions run the plan.")] = False,
    hardware_compatible: Annotated[
        bool, typer.Option(help="Let other GPUs since Ampere run the plan (target tensorrt).")
    ] = False,
    weight_stripped: Annotated[bool, typer.Option("--weight-stripped", help="Leave the weights out; see `refit`.")] = False,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    precision: Annotated[str, typer.Option(help="Of the export, when weights are named.")] = "fp16",
) -> None:
    """ONNX -> TensorRT plans, strongly typed, one optimization profile over B, L and T. Unchanged plans are kept."""
    found = find_target(target, tuple(compute_capability or ()))  # first: without it nothing is written
    options = EngineOptions(
        profile=parse_profile(profile or []),
        optimization_level=optimization_level,
        workspace_bytes=None if workspace_gib is None else int(workspace_gib * 2**30),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        weight_stripped=weight_stripped,
        timing_cache=timing_cache,
    )
    if preset or checkpoint:
        export_onnx(Weights(preset=preset, checkpoint=checkpoint), onnx_folder, options=OnnxOptions(precision=precision))
    for folder in build_engines(onnx_folder, out, found, options):
        console.print(str(folder), soft_wrap=True)


def refit(
    plan: Annotated[Path, typer.Option(help="Folder of plans that `engine --weight-stripped` wrote.")],
    onnx_folder: Annotated[
        Path, typer.Option("--onnx", help="Folder of ONNX artifacts; exported there first when weights are named.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the plans, one subfolder for each Triton model.")],
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    precision: Annotated[str, typer.Option(help="Of the export, when weights are named.")] = "fp16",
) -> None:
    """Weight-stripped plans + ONNX -> plans with these weights, without a build. On the GPU they are for."""
    if preset or checkpoint:
        export_onnx(Weights(preset=preset, checkpoint=checkpoint), onnx_folder, options=OnnxOptions(precision=precision))
    for folder in refit_plans(plan, onnx_folder, out):
        console.print(str(folder), soft_wrap=True)

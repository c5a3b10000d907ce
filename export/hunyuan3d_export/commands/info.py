"""The subcommand info: what an artifact was made from, or the size and compute of a preset."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..dit import PRESETS, Preset, compute
from ..dit.config import GUIDED_FORMS
from ..engines.memory import PlanMemory
from ..files import VERSION
from ..identity import weights_of
from ..manifest import NAME as MANIFEST
from ..manifest import Manifest
from ..networks import network_of
from .options import PresetOption, console


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
    print_memory(manifest)


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


def print_memory(manifest: Manifest) -> None:
    """Prints what a plan needs of the GPU's memory, where its manifest says so."""
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

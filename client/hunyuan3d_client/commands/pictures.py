"""The subcommands that begin with pictures: cutout, generate, batch."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TextColumn

from .. import contract, errors
from ..array_files import WRITTEN, save, writable
from ..batch import Summary
from ..blocking import Client
from ..environment import DEFAULT_URL
from ..mesh import Mesh, MeshProgress
from ..options import BatchOptions, GenerateOptions
from ..requests import Step
from . import connecting, console
from .following import followed, last_latents, mesh_facts, step_facts
from .options import MESH_SUFFIXES, AnyOutput, Json, KeepBackground, Timeout, Url, takes

_MESH_OPTIONS = [spec.name for spec in contract.MESH_OPTIONS]


@connecting.connects
def cutout(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP.")],
    out: Annotated[Path, typer.Option(help="Where the PNG goes, with transparency around the subject. Whole or not at all.")],
    url: Url = DEFAULT_URL,
    timeout_s: Timeout = None,
    as_json: Json = False,
) -> None:
    """Cut the subject out of a photograph, as `generate` does before it encodes a picture."""
    started = time.perf_counter()
    with console.reported(), writable(out, (".png",)) as partial, connecting.client(url) as client:
        found = client.cutout(image, timeout_s=timeout_s)
        partial.write_bytes(found.data)
    facts = {"background": found.background, "subject_share": found.subject_share}
    console.report(out, started, facts, as_json=as_json)


@connecting.connects
@takes(GenerateOptions)
def generate(
    images: Annotated[
        list[str],
        typer.Argument(help="PNG, JPEG or WebP; up to four are the views front, left, back, right.", metavar="IMAGE..."),
    ],
    out: AnyOutput = Path("mesh.glb"),
    save_latents: Annotated[
        Path | None, typer.Option(help="With a mesh: also write its latents, .npy or .safetensors, for `hunyuan3d decode`.")
    ] = None,
    keep_background: KeepBackground = False,
    *,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Make a mesh, or latents alone, from a picture. Options left out are the deployed preset's and the server's."""
    started = time.perf_counter()
    options["remove_background"] = False if keep_background else None
    meshing = {name: options[name] for name in _MESH_OPTIONS if options.get(name) is not None}
    with console.reported(), contextlib.ExitStack() as files:
        partial = files.enter_context(writable(out, (*MESH_SUFFIXES, *WRITTEN)))
        only_latents = out.suffix in WRITTEN
        if only_latents and (meshing or save_latents):
            named = ", ".join([*meshing, *(["save_latents"] if save_latents else [])])
            raise errors.invalid("--out", f"a mesh ({', '.join(MESH_SUFFIXES)}) beside {named}", str(out), "--out mesh.glb")
        beside = files.enter_context(writable(save_latents, option="--save-latents")) if save_latents else None
        client = files.enter_context(connecting.client(url))
        step, mesh = followed(_generated(client, images, options, None if only_latents else out.suffix[1:]))
        if mesh is None:
            save(partial, out.suffix, "latents", last_latents(step))
        else:
            partial.write_bytes(mesh.data)
        if save_latents and beside:
            save(beside, save_latents.suffix, "latents", last_latents(step))
    facts = {"shape": list(last_latents(step).shape)} if mesh is None else mesh_facts(mesh)
    console.report(out, started, {**facts, **step_facts(step)}, as_json=as_json)


@connecting.connects
@takes(BatchOptions)
def batch(
    pictures: Annotated[str, typer.Argument(help="A folder, a glob in quotes, or a JSONL file with `image` and options.")],
    out: Annotated[Path, typer.Option(help="The folder of the results and of ledger.jsonl.")],
    keep_background: KeepBackground = False,
    *,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Generate from many pictures. The same command again resumes. Exit code 1 if a picture failed; the ledger says why."""
    options["remove_background"] = False if keep_background else None
    with console.reported(), console.progress(TextColumn("{task.fields[rate]}")) as progress, connecting.client(url) as client:
        task = progress.add_task("pictures", total=None, rate="")
        started = time.perf_counter()

        def show_progress(state: Summary) -> None:
            rate = f"{state.done / (time.perf_counter() - started):.2f}/s, {len(state.failed)} failed"
            ended = state.done + state.skipped + len(state.failed)
            progress.update(task, completed=ended, total=state.total, rate=rate)

        summary = client.generate_many(pictures, out=out, **options, progress=show_progress)
    for name, error in summary.failed.items():
        console.warn(f"{name}: {error}")
    facts = {**dataclasses.asdict(summary), "failed": len(summary.failed), "seconds": round(summary.seconds, 3)}
    console.print_facts(facts, as_json=as_json)
    if summary.failed:
        raise typer.Exit(1)


def _generated(
    client: Client, images: list[str], options: dict[str, Any], format: str | None
) -> Iterator[Step | MeshProgress | Mesh]:
    """The stages from pictures to a mesh in `format`; without a format to latents, which needs no shape decoder on the server."""
    if format is not None:
        yield from client.generate_stream(images, **options, format=format, preview_every=0)
        return
    yield from client._picture_stream(images, {**options, "headers": None, "preview_every": 0})

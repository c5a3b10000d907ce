"""The subcommands that begin with condition tokens or latents: denoise, sample, decode."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy.typing as npt
import typer

from .. import errors
from ..array_files import WRITTEN, load, save, writable
from ..blocking import Client
from ..environment import DEFAULT_URL
from ..mesh import Mesh, MeshProgress
from ..options import DecodeOptions, SampleOptions
from ..requests import Step
from . import connecting, console, prompts
from .following import followed, last_latents, mesh_facts, step_facts
from .options import MESH_SUFFIXES, AnyOutput, Context, Json, MeshOutput, Output, Timeout, Url, takes


@connecting.connects
def denoise(
    latents: Annotated[Path, typer.Option(help="The state [B, L, 64], float; .npy, or .npz with `latents`.")],
    t: Annotated[float, typer.Option("--t", help="Flow time in [0, 1]; 0 is noise, 1 is data.")],
    context: Context,
    out: Output,
    guidance: Annotated[float | None, typer.Option(help="Raw guidance of distilled weights.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free scale; asks for the guided model.")] = None,
    url: Url = DEFAULT_URL,
    timeout_s: Timeout = None,
    as_json: Json = False,
) -> None:
    """Evaluate the velocity once."""
    started = time.perf_counter()
    with console.reported():
        arrays = load(latents, "latents"), t, load(context, "context")
        with writable(out) as partial, connecting.client(url) as client:
            scales = {"guidance": guidance, "guidance_scale": guidance_scale}
            velocity = client.denoise(*arrays, guidance=guidance, guidance_scale=guidance_scale, timeout_s=timeout_s)
            save(partial, out.suffix, "velocity", velocity)
    given = {key: value for key, value in scales.items() if value is not None}
    console.report(out, started, {"shape": list(velocity.shape), **given}, as_json=as_json)


@connecting.connects
@takes(SampleOptions)
def sample(
    out: AnyOutput,
    context: Annotated[Path | None, typer.Option(help="Condition tokens [B, T, 1536]; .npy, or .npz with `context`.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Words, for a server of the `shapes` preset: a condition without an encoder.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="With --prompt: also draw the points, as .png or .jpg.")] = None,
    ply: Annotated[Path | None, typer.Option(help="With --prompt: also write the points of the first sample as PLY.")] = None,
    resolution: Annotated[int | None, typer.Option(help="For a mesh: cells along each side of the grid.")] = None,
    *,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Run a whole trajectory, to latents or to a mesh of them. Options left out are the deployed preset's and the server's."""
    started = time.perf_counter()
    with console.reported():
        tokens = prompts.condition(context, prompt, picture or ply)
        prompts.check_picture(picture)
        _check_resolution(resolution, out)
        options |= {name: load(options[name], name) for name in ("negative_context", "latents")}
        with writable(out, (*MESH_SUFFIXES, *WRITTEN)) as partial, connecting.client(url) as client:
            if prompt is not None:
                prompts.check_served(client.health(timeout_s=options["timeout_s"]))
            meshing = {"resolution": resolution, "timeout_s": options["timeout_s"]}
            step, mesh = followed(_sampled(client, tokens, options, None if out.suffix in WRITTEN else out.suffix[1:], meshing))
            result = last_latents(step)
            if mesh is None:
                save(partial, out.suffix, "latents", result)
            else:
                partial.write_bytes(mesh.data)
        prompts.draw(result, str(prompt), picture, ply)
    written = {name: str(path) for name, path in (("picture", picture), ("ply", ply)) if path is not None}
    made = {"shape": list(result.shape)} if mesh is None else mesh_facts(mesh)
    console.report(out, started, {**made, **step_facts(step), **written}, as_json=as_json)


@connecting.connects
@takes(DecodeOptions)
def decode(
    latents: Annotated[Path, typer.Argument(help="Latents [1, L, 64] of one shape, float; .npy, or .npz with `latents`.")],
    out: MeshOutput = Path("mesh.glb"),
    *,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Make a mesh of latents. Options that are left out take the defaults of the server's config."""
    started = time.perf_counter()
    with console.reported():
        shape = load(latents, "latents")
        with writable(out, MESH_SUFFIXES) as partial, connecting.client(url) as client:
            _, mesh = followed(client.decode_stream(shape, **options, format=out.suffix[1:]))
            partial.write_bytes(cast(Mesh, mesh).data)
    console.report(out, started, mesh_facts(mesh), as_json=as_json)


def _sampled(
    client: Client, context: npt.NDArray[Any], options: dict[str, Any], format: str | None, meshing: dict[str, Any]
) -> Iterator[Step | MeshProgress | Mesh]:
    """The stages from condition tokens to latents and, with a format, on to a mesh of the one sample."""
    if format is not None and context.ndim == 3 and len(context) > 1:
        raise errors.invalid("--context", "of one sample for a mesh", f"{len(context)} samples", "--out latents.npy")
    last = None
    for last in client.stream(context, **options, preview_every=0):
        yield last
    if format is not None:
        yield from client.decode_stream(cast(Step, last).latents, **meshing, format=format)


def _check_resolution(resolution: int | None, out: Path) -> None:
    """Raises InvalidInput for a resolution that no mesh would use."""
    if resolution is not None and out.suffix in WRITTEN:
        raise errors.invalid("--resolution", "given with a mesh as --out", f"--out {out}", "--out mesh.glb")

"""The `hunyuan3d` command: health, denoise, sample, generate. Arrays in as .npy, .npz or .safetensors, out as .npy or .safetensors."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import grpc
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import contract, errors
from .blocking import Client
from .cli_files import load, replacing, save
from .grpc_transport import GrpcTransport
from .requests import Step
from .round_robin import RoundRobin
from .transport import Health

EXIT_CODES: Mapping[type[errors.Hunyuan3DError], int] = {
    errors.InvalidInput: 2,
    errors.ServerUnavailable: 3,
    errors.ModelNotReady: 3,
    errors.Overloaded: 4,
    errors.DeadlineExceeded: 5,
    errors.ModelFailed: 6,
    errors.Cancelled: 130,
}
_EXITS = (
    "Exit codes: 0 done; 2 bad usage, input or file; 3 server unavailable or model not ready; 4 overloaded; "
    "5 deadline passed; 6 model failed; 130 cancelled."
)

_URL = "localhost:8001"

app = typer.Typer(no_args_is_help=True, add_completion=False, help=f"Talk to a Hunyuan3D-2 Triton server.\n\n{_EXITS}")
stdout = Console()
stderr = Console(stderr=True)

Url = Annotated[
    str, typer.Option(envvar="HUNYUAN3D_URL", help="gRPC address HOST:PORT of the server, or of several with commas between.")
]
Timeout = Annotated[float | None, typer.Option(help="Seconds to wait for the whole answer; left out: 300.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Context = Annotated[
    Path, typer.Option(help="Condition tokens [T, 1536] or [B, T, 1536], float; .npy, or .npz or .safetensors with `context`.")
]
Output = Annotated[Path, typer.Option(help="Where the result goes, .npy or .safetensors; it appears whole or not at all.")]


@dataclasses.dataclass(frozen=True)
class _Connection:
    """How to reach a server, beside its address."""

    ca: bytes | None
    headers: dict[str, str]

    def client(self, url: str) -> Client:
        """For one address, or several with commas between, which must have the same models."""
        credentials = None if self.ca is None else grpc.ssl_channel_credentials(self.ca)
        transports = [GrpcTransport(each, credentials=credentials, headers=self.headers) for each in url.split(",")]
        return Client(transport=transports[0] if len(transports) == 1 else RoundRobin(transports))


_connection: contextvars.ContextVar[_Connection] = contextvars.ContextVar("connection")


@app.callback()
def connection(
    ca: Annotated[
        Path | None,
        typer.Option(envvar="HUNYUAN3D_CA", help="PEM of the authority behind the server's certificate: turns TLS on."),
    ] = None,
    header: Annotated[
        str | None,
        typer.Option(envvar="HUNYUAN3D_HEADER", help="'name: value', sent with every call: a token, the server's key."),
    ] = None,
) -> None:
    with _reported():
        name, separator, value = (header or "").partition(": ")
        if header is not None and not (name and separator and value):
            raise errors.invalid("--header", "'name: value'", "another form", "--header 'authorization: Bearer TOKEN'")
        _connection.set(_Connection(ca.read_bytes() if ca else None, {name.lower(): value} if header else {}))


@app.command()
def health(url: Url = _URL, timeout_s: Timeout = 10.0, as_json: Json = False) -> None:
    """Say what each server has loaded, from which file and with which settings; exit code 3 if it is not ready."""
    states = []
    with _reported():
        for each in url.split(","):
            with _client(each) as client:
                states.append((each, client.health(timeout_s=timeout_s)))
    for each, state in states:
        if as_json:
            _print_json({"url": each, **dataclasses.asdict(state)})
        else:
            stdout.print(_table(each, state))
    if not all(state.live and state.ready for _, state in states):
        stderr.print("the server must be ready, got live but not ready\nhint: its log names the model that failed to load")
        raise typer.Exit(EXIT_CODES[errors.ModelNotReady])


@app.command()
def denoise(
    latents: Annotated[Path, typer.Option(help="The state [B, L, 64], float; .npy, or .npz with `latents`.")],
    t: Annotated[float, typer.Option("--t", help="Flow time in [0, 1]; 0 is noise, 1 is data.")],
    context: Context,
    out: Output,
    guidance: Annotated[float | None, typer.Option(help="Raw guidance of distilled weights.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free scale; asks for the guided model.")] = None,
    url: Url = _URL,
    timeout_s: Timeout = None,
    as_json: Json = False,
) -> None:
    """Evaluate the velocity once."""
    started = time.perf_counter()
    with _reported():
        arrays = load(latents, "latents"), t, load(context, "context")
        with replacing(out) as partial, _client(url) as client:
            scales = {"guidance": guidance, "guidance_scale": guidance_scale}
            velocity = client.denoise(*arrays, guidance=guidance, guidance_scale=guidance_scale, timeout_s=timeout_s)
            save(partial, out.suffix, "velocity", velocity)
    _report(out, velocity, started, {key: value for key, value in scales.items() if value is not None}, as_json=as_json)


@app.command()
def sample(
    out: Output,
    context: Annotated[Path | None, typer.Option(help="Condition tokens [B, T, 1536]; .npy, or .npz with `context`.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Words, for a server of the `shapes` preset: a condition without an encoder.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="With --prompt: also draw the points as PNG.")] = None,
    ply: Annotated[Path | None, typer.Option(help="With --prompt: also write the points of the first sample as PLY.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the schedule.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free scale, or raw guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Sample i draws its noise from seed + i.")] = 0,
    num_latents: Annotated[int | None, typer.Option(help="L of the drawn noise.")] = None,
    latents: Annotated[Path | None, typer.Option(help="Initial noise [B, L, 64] instead of a seed.")] = None,
    negative_context: Annotated[Path | None, typer.Option(help="Replaces the zeros of the unconditional branch.")] = None,
    schedule: Annotated[str | None, typer.Option(help=" or ".join(contract.SCHEDULES))] = None,
    url: Url = _URL,
    timeout_s: Timeout = None,
    as_json: Json = False,
) -> None:
    """Run a whole trajectory. Options left out take the deployed preset's defaults."""
    started = time.perf_counter()
    with _reported():
        tokens, negative = _condition(context, prompt, picture or ply), load(negative_context, "negative_context")
        noise = load(latents, "latents")
        with replacing(out) as partial, _client(url) as client:
            trajectory = client.stream(
                tokens,
                steps=steps,
                guidance_scale=guidance_scale,
                seed=seed,
                num_latents=num_latents,
                latents=noise,
                negative_context=negative,
                schedule=schedule,
                preview_every=0,
                timeout_s=timeout_s,
            )
            step, result = _saved(trajectory, partial, out.suffix)
        _draw(result, str(prompt), picture, ply)
    _report(out, result, started, {"steps": step.total, "path": step.path}, as_json=as_json)


@app.command()
def generate(
    images: Annotated[
        list[str],
        typer.Argument(help="PNG, JPEG or WebP; up to four are the views front, left, back, right.", metavar="IMAGE..."),
    ],
    out: Output = Path("latents.npy"),
    steps: Annotated[int | None, typer.Option(help="Steps of the schedule.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free scale, or raw guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    num_latents: Annotated[int | None, typer.Option(help="L of the drawn noise.")] = None,
    schedule: Annotated[str | None, typer.Option(help=" or ".join(contract.SCHEDULES))] = None,
    url: Url = _URL,
    timeout_s: Timeout = None,
    as_json: Json = False,
) -> None:
    """Latents from a picture, through the server's image encoder and sampler. Options left out are the deployed preset's."""
    started = time.perf_counter()
    with _reported(), replacing(out) as partial, _client(url) as client:
        trajectory = client.generate_stream(
            images,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            num_latents=num_latents,
            schedule=schedule,
            preview_every=0,
            timeout_s=timeout_s,
        )
        step, result = _saved(trajectory, partial, out.suffix)
    _report(out, result, started, {"steps": step.total, "path": step.path}, as_json=as_json)


def _table(url: str, state: Health) -> Table:
    table = Table("model", "version", "ready", "runs", "file", "batch", "settings", title=f"Triton {state.version} at {url}")
    for model in state.models:
        settings = ", ".join(f"{name} {value}" for name, value in model.parameters.items())
        settings = "told to holders of the server's key alone" if model.restricted else settings
        batch = str(model.max_batch_size or "")
        table.add_row(model.name, model.version, "yes" if model.ready else "no", model.platform, model.file, batch, settings)
    return table


def _client(url: str) -> Client:
    return _connection.get().client(url)


def _saved(trajectory: Iterator[Step], partial: Path, suffix: str) -> tuple[Step, npt.NDArray[Any]]:
    """The final step and its latents, written, after a progress bar on a terminal."""
    with _progress() as progress:
        task = progress.add_task("sampling", total=None)
        for step in trajectory:
            progress.update(
                task, completed=step.index, total=step.total, description=f"sampling ({step.path}, batch {step.batch})"
            )
    result = cast(npt.NDArray[Any], step.latents)  # the final step always carries them
    save(partial, suffix, "latents", result)
    return step, result


def _condition(context: Path | None, prompt: str | None, drawing: Path | None) -> npt.NDArray[Any]:
    """The condition of `sample`: a file's, or a prompt's words."""
    if (context is None) == (prompt is None):
        raise errors.invalid("condition", "--context or --prompt", "both" if context else "neither", "name one of them")
    if prompt is None:
        if drawing is not None:
            raise errors.invalid("--picture and --ply", "given with --prompt", str(drawing), "only `shapes` latents are points")
        return cast(npt.NDArray[Any], load(context, "context"))
    from hunyuan3d_export.shapes import embed_prompt  # numpy alone; the same distribution

    try:
        return embed_prompt(prompt)
    except ValueError as error:
        raise errors.invalid("--prompt", "words", repr(prompt), 'for example --prompt "two flat tori"') from error


def _draw(latents: npt.NDArray[Any], prompt: str, picture: Path | None, ply: Path | None) -> None:
    if picture is None and ply is None:
        return
    from hunyuan3d_export.shapes import decode_points, pictures

    clouds = decode_points(latents)
    if ply is not None:
        pictures.save_ply(clouds[0], ply)
    if picture is not None:
        try:
            pictures.save_grid({f"{prompt} {i}" if i else prompt: cloud for i, cloud in enumerate(clouds)}, picture)
        except ImportError as error:
            raise errors.invalid(
                "--picture", "drawn by matplotlib", str(error), 'pip install "hunyuan3d-triton[shapes]"'
            ) from error


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Errors as text on stderr and an exit code, without a traceback."""
    try:
        yield
    except errors.Hunyuan3DError as error:
        stderr.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from None
    except OSError as error:
        stderr.print(f"file must be usable, got {error}\nhint: check the path", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=stderr, disable=not stderr.is_terminal)


def _report(out: Path, array: npt.NDArray[Any], started: float, more: Mapping[str, object], *, as_json: bool) -> None:
    facts = {"out": str(out), "shape": list(array.shape), "seconds": round(time.perf_counter() - started, 3), **more}
    if as_json:
        _print_json(facts)
    else:
        stdout.print(", ".join(f"{key} {value}" for key, value in facts.items()), markup=False, highlight=False, soft_wrap=True)


def _print_json(value: object) -> None:
    stdout.print(json.dumps(value), markup=False, highlight=False, soft_wrap=True)

"""The `hunyuan3d` command: health, denoise, sample, decode, cutout, generate, batch.

Annotations are not postponed here (no `from __future__ import annotations`): typer reads them from signatures that _takes has
extended, where Python does not evaluate text.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.metadata
import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import contract, errors
from .array_files import WRITTEN, load, save, writable
from .batch import Summary
from .blocking import Client
from .environment import DEFAULT_URL, Connection, timeout_s_from_env
from .health_report import health_lines
from .install import install_hint
from .mesh import Mesh, MeshProgress
from .options import BatchOptions, DecodeOptions, GenerateOptions, SampleOptions, expanded, options_of, show
from .requests import Step
from .shapes import decode_points, embed_prompt, pictures
from .shapes.words import ATTRIBUTES, NOUNS, unknown_words
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
    "5 deadline passed; 6 model failed; 130 cancelled. Of batch: 1 a picture failed; 130 and 143 stopped by Ctrl-C and SIGTERM."
)

_PROMPTED = "shapes"  # the only preset that was trained on words

app = typer.Typer(no_args_is_help=True, help=f"Talk to a Hunyuan3D-2 Triton server.\n\n{_EXITS}")
stdout = Console()
stderr = Console(stderr=True)

Url = Annotated[
    str, typer.Option(envvar="HUNYUAN3D_URL", help="gRPC address HOST:PORT of the server, or of several with commas between.")
]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds to wait for the whole answer; left out: HUNYUAN3D_TIMEOUT_S, or 300.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]
Context = Annotated[
    Path, typer.Option(help="Condition tokens [T, 1536] or [B, T, 1536], float; .npy, or .npz or .safetensors with `context`.")
]
Output = Annotated[Path, typer.Option(help="Where the result goes, .npy or .safetensors; it appears whole or not at all.")]
_MESH_SUFFIXES = tuple(f".{name}" for name in contract.MESH_FORMATS)
MeshOutput = Annotated[
    Path,
    typer.Option(help=f"Where the mesh goes; its ending names the format: {', '.join(_MESH_SUFFIXES)}. Whole or not at all."),
]
AnyOutput = Annotated[
    Path,
    typer.Option(
        help=f"Where the result goes, whole or not at all: a mesh ({', '.join(_MESH_SUFFIXES)}), or latents ({', '.join(WRITTEN)})."
    ),
]

F = TypeVar("F", bound=Callable[..., Any])
# Types of options on the command line, where they differ from Python's: an array is a file, and a seed is one number.
_SHELL_TYPES = {"latents": Path | None, "negative_context": Path | None, "seed": int}
# --header sends headers with every call, and --keep-background turns the removal off.
_NOT_IN_SHELL = {"headers", "progress", "remove_background"}
_NAMED_BY_THE_ENDING = {"format"}  # of --out, but a batch's --out is a folder
KeepBackground = Annotated[
    bool, typer.Option("--keep-background", help="Encode the whole picture: the server would cut the subject out.")
]


def _takes(kind: type) -> Callable[[F], F]:
    """A decorator for a command of `**options`: it takes the options of `kind`, with their texts as help."""
    hidden = _NOT_IN_SHELL if kind is BatchOptions else _NOT_IN_SHELL | _NAMED_BY_THE_ENDING
    options = [
        dataclasses.replace(o, type=Annotated[_SHELL_TYPES.get(o.name, o.type), typer.Option(help=o.text)])
        for o in options_of(kind)
        if o.name not in hidden
    ]
    return lambda command: show(command, expanded(command, options))


_connection: contextvars.ContextVar[Connection] = contextvars.ContextVar("connection")
_PANEL = "Connection"
# The options of the connection: before the command, and after each command too.
_CONNECTING: Mapping[str, tuple[Any, Any]] = {
    "header": (
        Annotated[
            list[str],
            typer.Option(
                help="'name: value', sent with every call: a token, the server's key. Repeatable; adds to HUNYUAN3D_HEADER.",
                rich_help_panel=_PANEL,
            ),
        ],
        (),
    ),
    "tls": (
        Annotated[bool, typer.Option("--tls", help="TLS with the authorities that gRPC trusts.", rich_help_panel=_PANEL)],
        False,
    ),
    "ca": (
        Annotated[
            Path | None,
            typer.Option(help="PEM of the authority behind the server's certificate: turns TLS on.", rich_help_panel=_PANEL),
        ],
        None,
    ),
    "cert": (
        Annotated[Path | None, typer.Option(help="PEM of your own certificate, for mutual TLS.", rich_help_panel=_PANEL)],
        None,
    ),
    "key": (Annotated[Path | None, typer.Option(help="PEM of the key of --cert.", rich_help_panel=_PANEL)], None),
}


def _connects(command: F) -> F:
    """A decorator for a command: it takes the options of the connection, which add to those before the command."""

    @functools.wraps(command)
    def call(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in _CONNECTING}
        with _reported():
            before = Connection.from_env() if command.__name__ == "connection" else _connection.get()
            headers = (*before.headers, *(given.pop("header") or ()))
            kept = {name: value for name, value in given.items() if value}
            _connection.set(dataclasses.replace(before, headers=headers, **kept))
        return command(**arguments)

    signature = inspect.signature(command)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in _CONNECTING.items()
    ]
    return show(cast(F, call), signature.replace(parameters=[*signature.parameters.values(), *options]))


def _print_version(wanted: bool) -> None:
    if wanted:
        stdout.print(importlib.metadata.version("hunyuan3d-triton"), highlight=False)
        raise typer.Exit


@app.callback()
@_connects
def connection(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
@_connects
def health(
    url: Url = DEFAULT_URL,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait for each server.")] = 10.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="The settings of each model too.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each server has loaded, and from which file. Exit code 3 if a server is not ready."""
    states: list[tuple[str, Health | errors.Hunyuan3DError]] = []
    with _reported():
        for each in url.split(","):
            with _client(each) as client:
                states.append((each.strip(), _state(client, timeout_s)))
    for each, state in states:
        if isinstance(state, errors.Hunyuan3DError):
            if as_json:
                _print_json({"url": each, "live": False, "ready": False, "error": type(state).__name__, "message": str(state)})
            stderr.print(f"{type(state).__name__}: {each}: {state}", markup=False, highlight=False, soft_wrap=True)
        elif as_json:
            _print_json({"url": each, **dataclasses.asdict(state)})
        else:
            for line in health_lines(each, state, verbose=verbose):
                stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    if not all(isinstance(state, Health) and state.live and state.ready for _, state in states):
        stderr.print("A server is not ready.\nhint: its log names the model that failed to load")
        raise typer.Exit(EXIT_CODES[errors.ModelNotReady])


@app.command()
@_connects
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
    with _reported():
        arrays = load(latents, "latents"), t, load(context, "context")
        with writable(out) as partial, _client(url) as client:
            scales = {"guidance": guidance, "guidance_scale": guidance_scale}
            velocity = client.denoise(*arrays, guidance=guidance, guidance_scale=guidance_scale, timeout_s=timeout_s)
            save(partial, out.suffix, "velocity", velocity)
    given = {key: value for key, value in scales.items() if value is not None}
    _report(out, started, {"shape": list(velocity.shape), **given}, as_json=as_json)


@app.command()
@_connects
@_takes(SampleOptions)
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
    with _reported():
        tokens = _condition(context, prompt, picture or ply)
        _check_picture(picture)
        _check_resolution(resolution, out)
        options |= {name: load(options[name], name) for name in ("negative_context", "latents")}
        with writable(out, (*_MESH_SUFFIXES, *WRITTEN)) as partial, _client(url) as client:
            if prompt is not None:
                _check_served(client.health(timeout_s=options["timeout_s"]))
            meshing = {"resolution": resolution, "timeout_s": options["timeout_s"]}
            step, mesh = _followed(
                _sampled(client, tokens, options, None if out.suffix in WRITTEN else out.suffix[1:], meshing)
            )
            result = cast(npt.NDArray[Any], cast(Step, step).latents)
            if mesh is None:
                save(partial, out.suffix, "latents", result)
            else:
                partial.write_bytes(mesh.data)
        _draw(result, str(prompt), picture, ply)
    written = {name: str(path) for name, path in (("picture", picture), ("ply", ply)) if path is not None}
    made = {"shape": list(result.shape)} if mesh is None else _mesh_facts(mesh)
    _report(out, started, {**made, **_step_facts(step), **written}, as_json=as_json)


@app.command()
@_connects
@_takes(DecodeOptions)
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
    with _reported():
        shape = load(latents, "latents")
        with writable(out, _MESH_SUFFIXES) as partial, _client(url) as client:
            _, mesh = _followed(client.decode_stream(shape, **options, format=out.suffix[1:]))
            partial.write_bytes(cast(Mesh, mesh).data)
    _report(out, started, _mesh_facts(mesh), as_json=as_json)


@app.command()
@_connects
def cutout(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP.")],
    out: Annotated[Path, typer.Option(help="Where the PNG goes, with transparency around the subject. Whole or not at all.")],
    url: Url = DEFAULT_URL,
    timeout_s: Timeout = None,
    as_json: Json = False,
) -> None:
    """Cut the subject out of a photograph, as `generate` does before it encodes a picture."""
    started = time.perf_counter()
    with _reported(), writable(out, (".png",)) as partial, _client(url) as client:
        found = client.cutout(image, timeout_s=timeout_s)
        partial.write_bytes(found.data)
    facts = {"background": found.background, "subject_share": found.subject_share}
    _report(out, started, facts, as_json=as_json)


@app.command()
@_connects
@_takes(GenerateOptions)
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
    with _reported(), contextlib.ExitStack() as files:
        partial = files.enter_context(writable(out, (*_MESH_SUFFIXES, *WRITTEN)))
        only_latents = out.suffix in WRITTEN
        if only_latents and (meshing or save_latents):
            named = ", ".join([*meshing, *(["save_latents"] if save_latents else [])])
            raise errors.invalid("--out", f"a mesh ({', '.join(_MESH_SUFFIXES)}) beside {named}", str(out), "--out mesh.glb")
        beside = files.enter_context(writable(save_latents, option="--save-latents")) if save_latents else None
        client = files.enter_context(_client(url))
        step, mesh = _followed(_generated(client, images, options, None if only_latents else out.suffix[1:]))
        if mesh is None:
            shape = list(_latents(step, partial, out.suffix).shape)
        else:
            partial.write_bytes(mesh.data)
        if save_latents and beside:
            _latents(step, beside, save_latents.suffix)
    facts: dict[str, object] = {"shape": shape} if mesh is None else _mesh_facts(mesh)
    _report(out, started, {**facts, **_step_facts(step)}, as_json=as_json)


@app.command()
@_connects
@_takes(BatchOptions)
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
    with _reported(), _progress(TextColumn("{task.fields[rate]}")) as progress, _client(url) as client:
        task = progress.add_task("pictures", total=None, rate="")
        started = time.perf_counter()

        def show_progress(state: Summary) -> None:
            rate = f"{state.done / (time.perf_counter() - started):.2f}/s, {len(state.failed)} failed"
            ended = state.done + state.skipped + len(state.failed)
            progress.update(task, completed=ended, total=state.total, rate=rate)

        summary = client.generate_many(pictures, out=out, **options, progress=show_progress)
    for name, error in summary.failed.items():
        stderr.print(f"{name}: {error}", markup=False, highlight=False, soft_wrap=True)
    facts = {**dataclasses.asdict(summary), "failed": len(summary.failed), "seconds": round(summary.seconds, 3)}
    if as_json:
        _print_json(facts)
    else:
        stdout.print(", ".join(f"{key} {value}" for key, value in facts.items()), markup=False, highlight=False, soft_wrap=True)
    if summary.failed:
        raise typer.Exit(1)


def _state(client: Client, timeout_s: float) -> Health | errors.Hunyuan3DError:
    """A server's health, or why it cannot be told: one server that is down hides no other."""
    try:
        return client.health(timeout_s=timeout_s)
    except errors.InvalidInput:
        raise
    except errors.Hunyuan3DError as error:
        return error


def _client(url: str) -> Client:
    """A client of one address, or of several servers with the same models, whose addresses have commas between."""
    transport = dataclasses.replace(_connection.get(), url=url).transport()
    return Client(transport=transport, timeout_s=timeout_s_from_env())


_MESH_OPTIONS = [spec.name for spec in contract.MESH_OPTIONS]


def _generated(
    client: Client, images: list[str], options: dict[str, Any], format: str | None
) -> Iterator[Step | MeshProgress | Mesh]:
    """The stages from pictures to a mesh in `format`; without a format to latents, which needs no shape decoder on the server."""
    if format is not None:
        yield from client.generate_stream(images, **options, format=format, preview_every=0)
        return
    yield from client._picture_stream(images, {**options, "headers": None, "preview_every": 0})


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


def _followed(answers: Iterator[Any]) -> tuple[Step | None, Mesh | None]:
    """Follow the stages with a progress bar for each, if there is a terminal: the last step and the mesh, where there are any."""
    last, mesh = None, None
    with _progress() as progress:
        bars: dict[str, Any] = {}
        for answer in answers:
            if isinstance(answer, Mesh):
                mesh = answer
                continue
            last = answer if isinstance(answer, Step) else last
            name, done, total, text = _shown(answer)
            if name not in bars:
                bars[name] = progress.add_task(name, total=None)
            progress.update(bars[name], completed=done, total=total or None, description=text)
        if mesh is not None:
            progress.update(bars["meshing"], completed=1, total=1, description=f"meshing ({mesh.faces} faces)")
    return last, mesh


def _shown(answer: Step | MeshProgress) -> tuple[str, int, int, str]:
    """A bar's name, how far it is, where it ends, and its text."""
    if isinstance(answer, Step):
        return "sampling", answer.index, answer.total, f"sampling ({answer.path}, batch {answer.batch})"
    return "meshing", answer.level, answer.levels, f"meshing ({answer.stage}, {answer.evaluations} points)"


def _latents(step: Step | None, partial: Path, suffix: str) -> npt.NDArray[Any]:
    """Save the latents of a trajectory's last step, which always has them."""
    result = cast(npt.NDArray[Any], cast(Step, step).latents)
    save(partial, suffix, "latents", result)
    return result


def _mesh_facts(mesh: Mesh | None) -> dict[str, object]:
    known = cast(Mesh, mesh)
    told = {name: known.statistics[name] for name in ("background", "subject_share") if name in known.statistics}
    return {"vertices": known.vertices, "faces": known.faces, "watertight": known.watertight, **told}


def _step_facts(step: Step | None) -> dict[str, object]:
    last = cast(Step, step)
    facts: dict[str, object] = {"steps": last.total, "path": last.path}
    if last.network_evaluations is not None and last.forecast_error is not None:
        facts |= {"network_evaluations": list(last.network_evaluations), "forecast_error": max(last.forecast_error)}
    return facts


def _condition(context: Path | None, prompt: str | None, drawing: Path | None) -> npt.NDArray[Any]:
    """The condition tokens of the command `sample`: from a file, or of a prompt's words."""
    if (context is None) == (prompt is None):
        raise errors.invalid("condition", "--context or --prompt", "both" if context else "neither", "name one of them")
    if prompt is None:
        if drawing is not None:
            raise errors.invalid("--picture and --ply", "given with --prompt", str(drawing), "only `shapes` latents are points")
        return cast(npt.NDArray[Any], load(context, "context"))
    try:
        tokens = embed_prompt(prompt)
    except ValueError as error:
        raise errors.invalid("--prompt", "words", repr(prompt), 'for example --prompt "two flat tori"') from error
    if unknown := unknown_words(prompt):
        known = f"{', '.join(ATTRIBUTES)} and a noun: {', '.join(NOUNS)}"
        raise errors.invalid("--prompt", f"words out of {known}", ", ".join(unknown), 'for example --prompt "two flat tori"')
    return tokens


def _check_served(state: Health) -> None:
    """A prompt means something only to the weights of `shapes`; other weights would draw noise."""
    if state.preset != _PROMPTED:
        served = next((str(state.weights[name]) for name in contract.DENOISERS if name in state.weights), "unknown weights")
        hint = "deploy and serve the preset shapes, or give --context to this server"
        raise errors.invalid("--prompt", f"sent to a server of the preset {_PROMPTED}", f"a server of {served}", hint)


def _check_picture(path: Path | None) -> None:
    """Raises InvalidInput for a picture of no known kind, before the sampling."""
    if path is not None:
        try:
            pictures.picture_format(path)
        except ValueError as error:
            raise errors.invalid("--picture", " or ".join(pictures.FORMATS), str(path), "--picture tori.png") from error


def _check_resolution(resolution: int | None, out: Path) -> None:
    """Raises InvalidInput for a resolution that no mesh would use."""
    if resolution is not None and out.suffix in WRITTEN:
        raise errors.invalid("--resolution", "given with a mesh as --out", f"--out {out}", "--out mesh.glb")


def _draw(latents: npt.NDArray[Any], prompt: str, picture: Path | None, ply: Path | None) -> None:
    if picture is None and ply is None:
        return
    clouds = decode_points(latents)
    if ply is not None:
        pictures.save_ply(clouds[0], ply)
    if picture is not None:
        try:
            pictures.save_grid({f"{prompt} {i}" if i else prompt: cloud for i, cloud in enumerate(clouds)}, picture)
        except ImportError as error:
            raise errors.invalid("--picture", "drawn by matplotlib", str(error), install_hint("shapes")) from error


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Report errors as text on stderr and as an exit code, without a traceback."""
    try:
        yield
    except errors.Hunyuan3DError as error:
        stderr.print(f"{type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from error
    except OSError as error:
        stderr.print(
            f"A file cannot be read or written: {error}\nhint: check the path", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error


def _progress(*more: ProgressColumn) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, *more, console=stderr, disable=not stderr.is_terminal)


def _report(out: Path, started: float, more: Mapping[str, object], *, as_json: bool) -> None:
    facts = {"out": str(out), **more, "seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        _print_json(facts)
    else:
        stdout.print(", ".join(f"{key} {value}" for key, value in facts.items()), markup=False, highlight=False, soft_wrap=True)


def _print_json(value: object) -> None:
    stdout.print(json.dumps(value), markup=False, highlight=False, soft_wrap=True)

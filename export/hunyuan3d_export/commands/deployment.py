"""The subcommands deploy and serve: artifacts -> a model repository -> a running server."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..dit.configs import torch_parameters
from ..graphs import OnnxOptions, Source
from ..identity import check_deployed, is_random, warn_of_random
from ..identity import deployed as deployed_in
from ..networks import NETWORKS
from ..pipeline import Named, Pipeline, find_pipeline
from ..repository_from_artifacts import DEFAULT_REPOSITORY, deploy_checkpoint
from ..repository_from_artifacts import deploy as deploy_artifacts
from ..server.embedded import EmbeddedServer, ServerOptions, ended, raw_log
from .artifacts import export_all
from .options import (
    NetworkOption,
    PipelineOption,
    PresetOption,
    SeedOption,
    SubfolderOption,
    VaeOption,
    console,
    errors,
)
from .ready import summary

logger = logging.getLogger(__name__)

_PORTS = (8001, 8000, 8002)  # gRPC, HTTP, metrics: Triton's own
_PORT = "Default {}. 0 picks a free port, and then also for the ports that are not given."
_LOOK_S = 0.2  # a running server is looked at so often: whether it has ended, and whether a signal has arrived
_KILLED = 128  # a shell's exit code of a command that signal N ended is 128 + N

StoredPrecisionOption = Annotated[
    str, typer.Option(help="fp32, fp16 or bf16: how the weights are stored (without --artifacts).")
]
TorchOption = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, a parameter of the torch runtime (without --artifacts); repeatable.")
]
RequireParityOption = Annotated[
    bool,
    typer.Option("--require-parity", help="Refuse an artifact without a receipt of `verify` that passed (with --artifacts)."),
]
ServedCheckpointArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Weights to export, deploy and serve: a file, a folder or an id on the hub. Default: what is deployed."
    ),
]
ServedRepositoryOption = Annotated[
    Path | None,
    typer.Option(help="Model repository with deployed artifacts; for named weights, a folder in build/ of their own."),
]
DeployedOption = Annotated[
    bool,
    typer.Option("--deployed", help="Serve what is deployed: an error where it comes from other weights than those named."),
]


def deploy(
    artifacts: Annotated[Path | None, typer.Option(help="Folder that `onnx` or `engine` wrote.")] = None,
    repository: Annotated[
        Path, typer.Option(help="Model repository; a folder other than the one in git becomes a copy of it.")
    ] = DEFAULT_REPOSITORY,
    preset: PresetOption = None,
    checkpoint: PipelineOption = None,
    subfolder: SubfolderOption = None,
    vae: VaeOption = None,
    network: NetworkOption = None,
    seed: SeedOption = 0,
    precision: StoredPrecisionOption = "fp32",
    torch: TorchOption = None,
    require_parity: RequireParityOption = False,
) -> None:
    """Artifacts whose manifests match -> a Triton model repository; or weights as a checkpoint, for `serve --config torch`."""
    networks = tuple(network or ())
    named = Named(checkpoint=checkpoint, subfolder=subfolder, vae=vae, preset=preset, seed=seed, networks=networks)
    if (artifacts is None) != named.has_weights or (torch and not named.has_weights):
        got = "both" if named.has_weights or torch else "neither"
        raise ValueError(
            f"deploy must get artifacts or weights, got {got}\nhint: --artifacts DIR, or --preset, --checkpoint and --torch"
        )
    if require_parity and artifacts is None:
        raise ValueError("--require-parity must come with artifacts, got weights\nhint: --artifacts DIR")
    if artifacts is not None:
        models = deploy_artifacts(artifacts, repository, require_parity=require_parity, networks=networks)
    else:
        parameters, models = torch_parameters(torch or []), []
        for source in _with_torch_runtime(find_pipeline(named), networks):
            models += deploy_checkpoint(source, repository, precision=precision, torch=parameters)
    for model in models:
        console.print(f"{model} -> {repository / model}", soft_wrap=True)


def _with_torch_runtime(pipeline: Pipeline, named: tuple[str, ...]) -> list[Source]:
    """The sources that the runtime `torch` can serve, and those that were named, whose deployment says why it cannot."""
    for name in pipeline.sources:
        if NETWORKS[name].save is None and name not in named:
            title, command = NETWORKS[name].title, NETWORKS[name].command
            logger.info("the %s has no torch runtime, left out; hint: deploy its graph, made by %s", title, command)
    return [source for name, source in pipeline.sources.items() if NETWORKS[name].save or name in named]


def serve(
    checkpoint: ServedCheckpointArgument = None,
    subfolder: SubfolderOption = None,
    vae: VaeOption = None,
    network: NetworkOption = None,
    preset: PresetOption = None,
    precision: Annotated[str | None, typer.Option(help="Of the export, when weights are named; default fp16.")] = None,
    repository: ServedRepositoryOption = None,
    deployed: DeployedOption = False,
    config: Annotated[str, typer.Option(help="Runtime: the name of a file in each model's configs/ folder.")] = "cpu",
    grpc_port: Annotated[int | None, typer.Option(help=_PORT.format(8001))] = None,
    http_port: Annotated[int | None, typer.Option(help=_PORT.format(8000))] = None,
    metrics_port: Annotated[int | None, typer.Option(help=_PORT.format(8002))] = None,
    log: Annotated[
        bool | None, typer.Option("--log/--no-log", help="The server's own log on stderr; default: unless it is a terminal.")
    ] = None,
) -> None:
    """Runs the embedded tritonserver until SIGINT or SIGTERM, on a repository or on weights that it exports and deploys first.

    Once it is ready, a line of JSON on stdout has its addresses.
    """
    grpc, http, metrics = ports(grpc_port, http_port, metrics_port)
    options = ServerOptions(config=config, grpc_port=grpc, http_port=http, metrics_port=metrics)
    named = Named(checkpoint=checkpoint, subfolder=subfolder, vae=vae, preset=preset, networks=tuple(network or ()))
    if (subfolder or network or ((vae or precision) and not deployed)) and not (checkpoint or preset or (vae and deployed)):
        raise ValueError(
            "--subfolder, --vae, --network and --precision must come with weights, got none\nhint: hunyuan3d-export serve CHECKPOINT"
        )
    if deployed:
        check_named(named, precision, repository or DEFAULT_REPOSITORY)
    elif checkpoint or preset:
        repository = repository_of(find_pipeline(named), precision or "fp16", repository)
    if not (log if log is not None else not errors.is_terminal):
        raw_log.setLevel(logging.ERROR)
    _run(EmbeddedServer(repository or DEFAULT_REPOSITORY, options))


def check_named(named: Named, precision: str | None, repository: Path) -> None:
    """Raises AnotherDeployed when `repository` holds other weights than those that were named; see identity.check_deployed."""
    digests: dict[str, str] = {}
    preset = named.preset
    if named.checkpoint or named.vae:
        sources = find_pipeline(named).sources
        identities = {name: source.identity() for name, source in sources.items()}
        digests = {NETWORKS[name].title: each["checkpoint_sha256"] for name, each in identities.items() if not is_random(each)}
        if preset and named.checkpoint and "dit" in sources:
            preset = sources["dit"].serving().name  # `custom` for a size that was never published
    check_deployed(repository, digests, preset=preset, precision=precision)


def repository_of(pipeline: Pipeline, precision: str, repository: Path | None) -> Path:
    """Exports the graphs of a pipeline that are missing or stale, and deploys all of them. Returns the repository.

    repository: None takes a folder in build/ that belongs to these weights and this precision.
    """
    artifacts = Path("build") / f"{pipeline.name}-{precision}"
    folders = export_all(pipeline, artifacts, OnnxOptions(precision=precision))
    models = {model for name in pipeline.sources for model in NETWORKS[name].models}
    for model in models - {folder.name for folder in folders}:  # of other weights that had the same name
        shutil.rmtree(artifacts / model, ignore_errors=True)
    place = repository or artifacts.with_name(f"{artifacts.name}-repository")
    deploy_artifacts(artifacts, place, networks=tuple(pipeline.sources))
    return place


def _run(server: EmbeddedServer) -> NoReturn:
    """Runs the server until it ends or a signal arrives."""
    signals = (signal.SIGINT, signal.SIGTERM)  # SIGINT too, because a shell starts background jobs with SIGINT ignored
    for each in signals:
        signal.signal(each, signal.default_int_handler)
    code, arrived = None, []
    warn_of_random(deployed_in(server.repository).values())
    with errors.status(f"starting tritonserver on {server.repository} ...") as starting, server as endpoints:
        # The handlers change before the first line is written, because the reader of that line may send a signal at once. From
        # here on they only note a signal: Python drops a KeyboardInterrupt that is raised inside a finalizer, and a second one
        # would interrupt the server's stop.
        for each in signals:
            signal.signal(each, lambda number, _frame: arrived.append(number))
        starting.stop()
        sys.stdout.write(json.dumps(dataclasses.asdict(endpoints)) + "\n")
        sys.stdout.flush()
        for line in summary(server.repository, server.options.config, endpoints):
            errors.print(line, markup=False, highlight=False, soft_wrap=True)
        while code is None and not arrived:
            code = server.wait(_LOOK_S)
        if code is None:
            logger.info("stopping tritonserver ...")
        else:
            errors.print(ended(code), markup=False, highlight=False)
    raise typer.Exit(0 if code is None else code if code >= 0 else _KILLED - code)


def ports(*given: int | None) -> tuple[int, ...]:
    """The ports for gRPC, HTTP and metrics: those that were given; else Triton's own, or free ones where a free port was asked for."""
    free = 0 in given
    return tuple((0 if free else usual) if port is None else port for port, usual in zip(given, _PORTS, strict=True))

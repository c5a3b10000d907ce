"""`hunyuan3d-export quality`: the quality gate for any path that can evaluate velocities."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

import torch

from hunyuan3d_client import Client
from hunyuan3d_client.text_table import aligned

from ..dit import PRESETS, load_checkpoint
from ..dit.reference_sampler import OnnxDenoiser
from ..progress import ComparisonWatch
from ..runners import OnnxRunner, Runner, TorchRunner
from ..shapevae import network as shapevae
from ..shapevae.weights import ShapeVAESource
from . import CHECKPOINT
from .decoding import COARSE, Decoder, served_decoder
from .mesh_quality import MeshQuality
from .meshes import Decode
from .quality import Report, Sample, evaluate, failures, load_thresholds
from .reference import Guidance, torch_sampler
from .served import served_sampler

THROUGH = ("torch", "onnx", "served")
_DECODED_AT_ONCE = 4
_METRICS = ("mean", "p95", "coverage", "accuracy", "energy")
_MESH_METRICS = ("to_surface", "from_surface", "volume", "watertight", "topology")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What to measure. None means the `shapes` preset's own number, or the shipped checkpoint.

    mesh_seeds: how many samples of each prompt become meshes, too, of this resolution.

    Raises ValueError for an unknown path or guidance, for onnx without artifacts, for artifacts without onnx, for a tolerance
    without a server, and for a resolution that is no multiple of 32.
    """

    through: str = "torch"
    guidance: str = "guided"
    checkpoint: Path | None = None
    artifacts: Path | None = None
    url: str = "localhost:8001"
    seeds: int = 16
    num_latents: int | None = None
    steps: int | None = None
    tolerance: float = 0.0
    mesh_seeds: int = 0
    resolution: int = 64

    def __post_init__(self) -> None:
        if self.through not in THROUGH:
            raise ValueError(f"through must be one of {', '.join(THROUGH)}, got {self.through!r}")
        if self.guidance not in get_args(Guidance):
            raise ValueError(f"guidance must be one of {', '.join(get_args(Guidance))}, got {self.guidance!r}")
        if (self.through == "onnx") != (self.artifacts is not None):
            raise ValueError(
                f"artifacts must be given for onnx and for nothing else, got {self.artifacts}\nhint: --artifacts DIR"
            )
        if self.tolerance and self.through != "served":
            raise ValueError(f"tolerance must be 0 unless the path is served, got {self.tolerance:g}\nhint: --through served")
        if self.resolution < COARSE or self.resolution % COARSE:
            raise ValueError(f"resolution must be a multiple of {COARSE}, got {self.resolution}")


def run(options: GateOptions, watch: ComparisonWatch | None = None) -> tuple[Report, list[str]]:
    """Returns the report over all trained prompts, and a line for each bound that it misses. watch: is told of each prompt.

    Raises CheckpointError for an unreadable checkpoint, and the client's errors when the server cannot be reached.
    """
    preset = PRESETS["shapes"]
    steps = options.steps or preset.steps
    reference = load_checkpoint(options.checkpoint or CHECKPOINT, dtype=torch.float32)
    with _path(options, steps) as (sample, decode):
        report = evaluate(
            sample,
            seeds=range(options.seeds),
            num_latents=options.num_latents or preset.num_latents,
            guidance_scale=preset.guidance_scale,
            reference=torch_sampler(reference, steps=steps),
            meshes=_meshes(options, decode),
            watch=watch,
        )
    report |= {"through": options.through, "guidance": options.guidance, "steps": steps}
    return report, failures(report, load_thresholds())


@contextlib.contextmanager
def _path(options: GateOptions, steps: int) -> Iterator[tuple[Sample, Decode]]:
    """The sampler and the shape decoder of the path."""
    guidance = cast(Guidance, options.guidance)
    if options.through == "served":
        with Client(options.url) as client:
            sample = served_sampler(client, steps=steps, guidance=guidance, tolerance=options.tolerance)
            yield sample, served_decoder(client, resolution=options.resolution)
    elif options.artifacts is not None:
        sample = torch_sampler(OnnxDenoiser(options.artifacts), steps=steps, guidance=guidance)
        yield sample, Decoder(OnnxRunner(options.artifacts), options.resolution)
    else:
        model = load_checkpoint(options.checkpoint or CHECKPOINT, dtype=torch.float32)
        yield torch_sampler(model, steps=steps, guidance=guidance), Decoder(torch_decoder(), options.resolution)


def torch_decoder() -> Runner:
    """The shipped shape decoder in torch, in float32."""
    source = ShapeVAESource(preset="shapes")
    serving = shapevae.in_precision(source.serving(), "fp32")
    return TorchRunner(source.load(torch.float32), shapevae.graphs(serving))


def _meshes(options: GateOptions, decode: Decode) -> MeshQuality | None:
    if not options.mesh_seeds:
        return None
    # In torch the path is its own reference, so its meshes are not made twice.
    reference = None if options.through == "torch" else Decoder(torch_decoder(), options.resolution)
    at_once = _DECODED_AT_ONCE if options.through == "served" else 1  # a server decodes meshes of several requests together
    return MeshQuality(decode, seeds=options.mesh_seeds, reference=reference, cells=options.resolution, at_once=at_once)


def table(report: Report) -> list[str]:
    """The report as lines: the worst prompts, all of them together, and the probes at other guidance scales."""
    worst = sorted(report["prompts"].items(), key=lambda row: -row[1]["mean"])[:5]
    rows = [*worst, (f"all {len(report['prompts'])} prompts", report["overall"])]
    rows += [(f"probes at scale {scale}", values) for scale, values in report["probes"].items()]
    cells = [
        (name, *(f"{values[metric]:.3f}" for metric in _METRICS), f"{values['deviation']:.1e}" if "deviation" in values else "")
        for name, values in rows
    ]
    title = f"{report['through']}, {report['guidance']}, {report['num_latents']} points"
    clouds = [title, *aligned([("", *_METRICS, "deviation"), *cells], indent="  ")]
    return clouds + (_mesh_table(report["meshes"]) if "meshes" in report else [])


def _mesh_table(meshes: Report) -> list[str]:
    """The worst prompts by their meshes, and all of them together."""
    worst = sorted(meshes["prompts"].items(), key=lambda row: -row[1]["to_surface"])[:5]
    rows = [*worst, (f"all {len(meshes['prompts'])} prompts", meshes["overall"])]
    cells = [
        (
            name,
            *(f"{values[metric]:.3f}" if metric in values else "not judged" for metric in _MESH_METRICS),
            f"{values['deviation']:.1e}" if "deviation" in values else "",
        )
        for name, values in rows
    ]
    title = f"meshes, {meshes['seeds']} of each prompt"
    return [title, *aligned([("", *_MESH_METRICS, "deviation"), *cells], indent="  ")]

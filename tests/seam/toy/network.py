"""The toy's parts: weights from a seed, one graph with two outputs, its proof, its configs, and the two rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hunyuan3d_client import contract
from hunyuan3d_export.checks import Check, Profile, compare, within
from hunyuan3d_export.graphs import Graph, Source
from hunyuan3d_export.manifest import Manifest, ManifestError
from hunyuan3d_export.networks import Network
from hunyuan3d_export.pbtxt import config_text, native_onnxruntime, python_onnxruntime, tensorrt
from hunyuan3d_export.runners import Runner

MODEL = "toy"
AXIS = "N"
RANGE = contract.AxisRange(1, 16, 64)
POINTS = contract.TensorSpec("points", "FP32", ("B", AXIS, 3), "positions", values=(-1, 1))
SPEC = contract.ModelSpec(
    MODEL,
    (POINTS,),
    (
        contract.TensorSpec("near", "FP32", ("B", AXIS, 8), "one half of the features"),
        contract.TensorSpec("far", "FP32", ("B", AXIS, 8), "the other half"),
    ),
)


class Toy(nn.Module):
    """points [B, N, 3] -> near, far, each [B, N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 16)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        near, far = torch.tanh(self.layer(points.to(self.layer.weight.dtype))).float().chunk(2, dim=-1)
        return near, far


@dataclasses.dataclass(frozen=True)
class ToyServing:
    """What deployment needs to know of a toy."""

    name: str = "toy"


@dataclasses.dataclass(frozen=True)
class ToySource:
    """Random weights from `seed`."""

    network: ClassVar[str] = "toy"
    checkpoint: ClassVar[Path | None] = None

    seed: int = 0

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def serving(self) -> ToyServing:
        return ToyServing()

    def load(self, dtype: torch.dtype, *, attention_backend: str = "") -> Toy:
        del attention_backend
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Toy().to(dtype).eval()


def weights_of(manifest: Manifest, given: Source | None) -> ToySource:
    source = given if isinstance(given, ToySource) else ToySource(**manifest.made_from["weights"])
    if source.identity() != manifest.made_from["weights"]:
        raise ManifestError("the toy must be made from these weights, got others\nhint: another seed")
    return source


def checks(manifest: Manifest, found_by: Runner, expected_by: Runner, *, profile: Profile, against: str) -> Iterator[Check]:
    batch, points = within(profile, (3, 5), f"B{AXIS}")
    inputs = {"points": torch.rand(batch, points, 3, generator=torch.Generator().manual_seed(1))}
    found, expected = (run.run(manifest.model, inputs) for run in (found_by, expected_by))
    tolerance = {"fp32": 1e-5, "fp16": 5e-3}[manifest.made_from["precision"]]
    for name in found:
        yield compare(f"{name}{against}", (batch, points), found[name], expected[name], tolerance=tolerance, axes=f"B{AXIS}")


def config_files(_serving: ToyServing) -> dict[str, str]:
    kinds = {"config": tensorrt, "configs/cpu": python_onnxruntime, "configs/onnxruntime": native_onnxruntime}
    return {f"{MODEL}/{path}.pbtxt": config_text(kind(SPEC)) for path, kind in kinds.items()}


def read_serving(serving: Mapping[str, Any]) -> ToyServing:
    return ToyServing(**serving)


ROW = Network[ToyServing](
    name="toy",
    title="toy",
    models=(MODEL,),
    command="python -m toy",
    code=(Path(__file__),),
    attention_forms={"op": "", "decomposed": ""},
    read_serving=read_serving,
    label=lambda serving: serving.name,
    graphs=lambda _serving: {"toy": Graph(spec=SPEC, axes=SPEC.axes, example={"B": 2, AXIS: 7})},
    weights_of=weights_of,
    checks=checks,
    configs=config_files,
    plan_sizes=lambda _serving: {"B": (1, 8), AXIS: (16,)},
    base=ToyServing(),
)

"""The groups of rows, in the order in which they tell the most. The rows of a group share a process, and with it the networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from .attention_rows import AttentionRows
from .evaluations import Evaluations
from .mesh_rows import MeshRows
from .rows import Job
from .sampling import Samplings
from .sdpa_rows import SdpaRows
from .setting import Networks, Setting


@dataclasses.dataclass(frozen=True)
class Group:
    """Jobs that run one after the other in a process of their own."""

    name: str
    jobs: list[Job]


def groups(setting: Setting) -> list[Group]:
    """Every group of a check. Nothing is measured or loaded here, so that any process can name the rows."""
    return [Group(name, list(jobs)) for name, jobs in _groups(setting)]


def _groups(setting: Setting) -> Iterator[tuple[str, Iterable[Job]]]:
    networks = Networks(setting)
    evaluations, samplings = Evaluations(setting, networks), Samplings(setting, networks)
    yield "rooflines", evaluations.rooflines()
    for preset in setting.presets:
        yield f"torch, {preset}", [*evaluations.in_torch(preset), *samplings.in_process(preset)]
    yield "SDPA", SdpaRows(setting).jobs()
    for preset in setting.presets:
        yield f"TensorRT, {preset}", evaluations.in_tensorrt(preset)
        yield f"ONNX Runtime, {preset}", evaluations.in_onnxruntime(preset)
        yield f"torch.compile, {preset}", evaluations.compiled(preset)
    for preset in setting.presets:
        yield f"served, {preset}", samplings.served(preset)
    for preset in setting.presets:
        yield f"mesh stage, {preset}", MeshRows(setting).jobs(preset)
    for preset in setting.presets:
        yield f"other precisions, {preset}", evaluations.in_other_precisions(preset)
    yield "attention", AttentionRows(setting).jobs()

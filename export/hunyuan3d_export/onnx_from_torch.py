"""torch -> ONNX: one artifact folder for each graph, with its weights file and manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from hunyuan3d_client import contract

from .dit import Hunyuan3DDiT, Preset
from .files import atomic_folder
from .manifest import Manifest, code_digest, file_digests, reusable, versions_of
from .weights import PRECISIONS, Weights

OPSET = 23  # the first with Attention and RMSNormalization
GRAPHS = ("plain", "guided")
# The form of attention in the graph -> the torch backend that traces to it.
ATTENTION_FORMS = {"op": "sdpa", "decomposed": "standard"}
MODEL_FILE = "model.onnx"
_EXAMPLE_SIZES = {"B": 2, "L": 24, "T": 37}
_TORCH_DTYPES = {"FP16": torch.float16, "FP32": torch.float32}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How to write a graph: precision fp32, fp16 or bf16 of weights and activations; attention op or decomposed."""

    precision: str = "fp32"
    attention: str = "op"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.attention not in ATTENTION_FORMS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_FORMS)}, got {self.attention!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """What is traced: a module that takes the spec's inputs; the axes' ranges; the example's sizes, none 0 or 1, which the
    exporter would take for constants. An axis without a range is fixed at its size in the example."""

    module: nn.Module
    spec: contract.ModelSpec
    axes: Mapping[str, contract.AxisRange]
    example: Mapping[str, int]


class _Guided(nn.Module):
    """Hunyuan3DDiT.guided as the forward of a module, for the tracer."""

    def __init__(self, model: Hunyuan3DDiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        return self.model.guided(latents, t, context, guidance_scale)


def export_onnx(weights: Weights, out: Path, *, graph: str = "all", options: OnnxOptions | None = None) -> list[Path]:
    """Writes the artifact folders `out`/<Triton model name>/ for one graph, or (`all`) for every graph the weights have.

    A folder whose manifest still matches is kept as it is. A new one appears whole or not at all. Returns the folders.

    Raises ValueError for a guided graph of guidance-distilled weights, CheckpointError for an unreadable checkpoint.
    """
    options = options or OnnxOptions()
    sampling = weights.sampling(weights.config())
    specs = {name: contract.denoiser(**_spec_options(name, sampling)) for name in _graphs(graph, sampling)}
    identity = weights.identity()
    made_from = {name: _made_from(identity, name, options) for name in specs}
    folders = {name: out / spec.name for name, spec in specs.items()}
    stale = [name for name in specs if not reusable(folders[name], made_from[name])]
    for name in specs.keys() - set(stale):
        logger.info("%s: unchanged, kept", folders[name])
    if stale:
        with stage("load weights"):
            backend = ATTENTION_FORMS[options.attention]
            model = weights.load(PRECISIONS[options.precision], attention_backend=backend)
        for name in stale:
            module = _Guided(model).eval() if name == "guided" else model
            traced = Graph(module=module, spec=specs[name], axes=contract.AXES, example=_EXAMPLE_SIZES)
            write_graph(traced, folders[name], made_from[name], dataclasses.asdict(sampling))
    return list(folders.values())


def _graphs(graph: str, sampling: Preset) -> tuple[str, ...]:
    if graph not in (*GRAPHS, "all"):
        raise ValueError(f"graph must be one of {', '.join(GRAPHS)}, all, got {graph!r}")
    if graph == "guided" and sampling.config.guidance_embed:
        raise ValueError(f"graph must be plain for guidance-distilled weights ({sampling.name}), got guided")
    if graph == "all":
        return ("plain",) if sampling.config.guidance_embed else GRAPHS
    return (graph,)


def _spec_options(graph: str, sampling: Preset) -> dict[str, bool]:
    return {"guided": graph == "guided", "guidance_embed": sampling.config.guidance_embed}


def _made_from(identity: dict[str, Any], graph: str, options: OnnxOptions) -> dict[str, Any]:
    here = Path(__file__).parent
    code = code_digest([Path(__file__), Path(contract.__file__), *(here / "dit").glob("*.py")])
    made_by = {"opset": OPSET, "code": code, "versions": versions_of("torch", "onnx", "onnxscript")}
    return {"weights": identity, "graph": graph, **made_by, **dataclasses.asdict(options)}


def write_graph(graph: Graph, folder: Path, made_from: dict[str, Any], serving: dict[str, Any]) -> None:
    """One artifact folder, which appears whole or not at all; `serving` is what deployment needs to know."""
    spec = graph.spec
    with atomic_folder(folder) as temporary:
        with stage(f"{spec.name}: trace and convert"):
            program = _trace(graph)
        with stage(f"{spec.name}: write weights"):
            program.save(str(temporary / MODEL_FILE), external_data=True)
            del program
        with stage(f"{spec.name}: check and digest"):
            onnx.checker.check_model(str(temporary / MODEL_FILE))
            Manifest(
                model=spec.name,
                made_from=made_from,
                serving=serving,
                versions=made_from["versions"],
                files=file_digests(temporary),
            ).write(temporary)


def _trace(graph: Graph) -> torch.onnx.ONNXProgram:
    axes = {name: torch.export.Dim(name, min=size.min, max=size.max) for name, size in graph.axes.items()}
    inputs = graph.spec.inputs
    dynamic = {tensor.name: {i: axes[dim] for i, dim in enumerate(tensor.dims) if dim in axes} for tensor in inputs}
    example = {tensor.name: torch.zeros(tensor.shape(graph.example), dtype=_TORCH_DTYPES[tensor.dtype]) for tensor in inputs}
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            graph.module,
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            external_data=True,
            output_names=[tensor.name for tensor in graph.spec.outputs],
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    return program


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    logger.info("%s ...", name)
    start = time.monotonic()
    yield
    logger.info("%s: %.1f s", name, time.monotonic() - start)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences what the exporter says on every run and nobody can act on (torchvision's absence, axes of equal size)."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
            yield
    finally:
        exporter.setLevel(level)

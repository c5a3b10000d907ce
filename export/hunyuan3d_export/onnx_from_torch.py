"""torch, or a graph that is ONNX already -> ONNX: one artifact folder for each graph of a network, with its weights and manifest."""

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
from torch import nn

from . import graphs
from .files import ONNX_FILE, atomic_folder
from .graphs import Graph, OnnxOptions, Source
from .identity import is_random
from .manifest import Manifest, code_digest, file_digests, reusable, versions_of
from .networks import NETWORKS, Network
from .precisions import PRECISIONS, WIRE_DTYPES

__all__ = ["Graph", "OnnxOptions", "export_onnx"]

OPSET = 23  # the first opset with Attention and RMSNormalization
# Smaller tensors stay in the graph's file: ONNX Runtime must see the sizes of a Split, 520 bytes for v2-0, to load a graph.
_INLINE_BYTES = 4096

logger = logging.getLogger(__name__)


def export_onnx(source: Source, out: Path, *, graph: str = "all", options: OnnxOptions | None = None) -> list[Path]:
    """Writes the artifact folder `out`/<Triton model name>/ of one graph, or of every graph that the weights have (`all`).

    A folder whose manifest still matches is kept. A new folder appears whole or not at all. Returns the folders.

    Raises ValueError for a graph that these weights do not have, CheckpointError for an unreadable checkpoint.
    """
    options = options or OnnxOptions()
    network = NETWORKS[source.network]
    serving = network.in_precision(source.serving(), options.precision)
    chosen = _chosen(graph, network, serving)
    values = graphs.resolve(network.options, options, graphs=chosen)
    how = _how_made(source, network, options)
    if is_random(how["weights"]):
        logger.warning("%s: RANDOM WEIGHTS from seed %s", network.title, how["weights"].get("seed"))
    made_from = {
        name: {
            **how,
            "graph": name,
            "spec": each.described(),
            "options": _options_of(name, network, values),
            "opset": OPSET if each.ready is None else None,  # a graph that is ready has the opset of its source
        }
        for name, each in chosen.items()
    }
    folders = {name: out / each.spec.name for name, each in chosen.items()}
    stale = [name for name in chosen if not reusable(folders[name], made_from[name])]
    for name in chosen.keys() - set(stale):
        logger.info("%s: unchanged, kept", folders[name])
    if stale:
        with _stage("load weights"):
            backend = network.attention_forms[options.attention]
            loaded = network.prepare(source.load(PRECISIONS[options.precision], attention_backend=backend), values)
        for name in stale:
            facts = dataclasses.asdict(serving)
            _write_graph(chosen[name], loaded, folders[name], made_from=made_from[name], serving=facts)
    return list(folders.values())


def _chosen(graph: str, network: Network[Any], serving: Any) -> dict[str, Graph]:
    available = dict(network.graphs(serving))
    if graph == "all":
        return available
    if graph not in available:
        names = ", ".join([*available, "all"])
        wanted = f"one of {names}" if len(available) > 1 else f"{next(iter(available))} for {network.label(serving)}"
        raise ValueError(f"graph must be {wanted}, got {graph!r}")
    return {graph: available[graph]}


def _how_made(source: Source, network: Network[Any], options: OnnxOptions) -> dict[str, Any]:
    """What all graphs of one export have in common."""
    return {
        "weights": source.identity(),
        "precision": options.precision,
        "attention": options.attention,
        "code": code_digest([Path(__file__), Path(graphs.__file__), *network.code]),
        "versions": versions_of("torch", "onnx", "onnxscript", *network.packages),
    }


def _options_of(graph: str, network: Network[Any], values: Mapping[str, str]) -> dict[str, str]:
    """The options that change this graph, with their values: another value makes the graph stale, and no other graph."""
    return {name: value for name, value in values.items() if network.options[name].changes(graph)}


def _write_graph(graph: Graph, network: nn.Module, folder: Path, *, made_from: dict[str, Any], serving: dict[str, Any]) -> None:
    """Writes one artifact folder, which appears whole or not at all."""
    spec = graph.spec
    with atomic_folder(folder) as temporary:
        _write_model(graph, network, temporary / ONNX_FILE)
        with _stage(f"{spec.name}: check and digest"):
            onnx.checker.check_model(str(temporary / ONNX_FILE))
            Manifest(
                model=spec.name,
                made_from=made_from,
                serving=serving,
                versions=made_from["versions"],
                files=file_digests(temporary),
            ).write(temporary)


def _write_model(graph: Graph, network: nn.Module, path: Path) -> None:
    name = graph.spec.name
    if graph.ready is not None:
        with _stage(f"{name}: write the graph"):
            onnx.save(graph.ready(network), str(path))
        return
    with _stage(f"{name}: trace and convert"):
        program = _trace(graph, graph.module(network))
    import onnx_ir  # comes with onnxscript, which a machine for gpu-check may lack

    with _stage(f"{name}: write weights"):
        onnx_ir.save(program.model, path, external_data=f"{path.name}.data", size_threshold_bytes=_INLINE_BYTES)


def _trace(graph: Graph, module: nn.Module) -> torch.onnx.ONNXProgram:
    axes = {name: torch.export.Dim(name, min=size.min, max=size.max) for name, size in graph.axes.items()}
    inputs = graph.spec.inputs
    dynamic = {tensor.name: {i: axes[dim] for i, dim in enumerate(tensor.dims) if dim in axes} for tensor in inputs}
    example = {tensor.name: torch.zeros(tensor.shape(graph.example), dtype=WIRE_DTYPES[tensor.dtype]) for tensor in inputs}
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            module,
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            external_data=True,
            output_names=[tensor.name for tensor in graph.spec.outputs],
            verbose=False,
        )
    assert program is not None  # with dynamo=True the exporter always returns a program
    return program


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    logger.info("%s ...", name)
    start = time.monotonic()
    yield
    logger.info("%s: %.1f s", name, time.monotonic() - start)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences the exporter's usual warnings, which users cannot act on: missing torchvision, axes of equal size."""
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

"""The device memory of a plan: asked of TensorRT where the plan loads, and otherwise estimated from the shapes in its graph."""

from __future__ import annotations

import ast
import dataclasses
import logging
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from .api import TensorRT

if TYPE_CHECKING:
    import tensorrt

# Operators whose output is their first input under another shape, so that it takes no memory of its own.
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_BYTES: Mapping[int, int] = {
    onnx.TensorProto.DOUBLE: 8,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.BOOL: 1,
}
_OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlanMemory:
    """weights_bytes: what the weights take. activation_bytes: what one execution context takes, for the largest shapes of the
    profile; None where the graph does not tell. measured: whether TensorRT gave it; otherwise it is the result of estimated()."""

    weights_bytes: int
    activation_bytes: int | None
    measured: bool

    def __str__(self) -> str:
        source = "as TensorRT says" if self.measured else "an estimate from the graph's shapes"
        found = "unknown" if self.activation_bytes is None else f"{self.activation_bytes / 2**30:.2f} GiB ({source})"
        return (
            f"device memory: weights {self.weights_bytes / 2**30:.2f} GiB; activations at the profile's largest sizes {found}"
        )


def plan_memory(plan: Path, onnx_graph: Path, largest: Mapping[str, int], trt: TensorRT | None) -> PlanMemory:
    """The memory of a plan file that was built from `onnx_graph`. largest: axis -> the largest size of the profile.

    trt: the library that can load the plan on this machine's GPU; None for a plan that only another machine can load.
    """
    weights = sum(path.stat().st_size for path in onnx_graph.parent.glob(f"{onnx_graph.name}*"))
    if trt is not None:
        from .runtime import PlanLoadError, load_engine  # needs torch

        try:
            loaded = load_engine(plan, trt)
            return PlanMemory(weights, _context_bytes(loaded.engine), measured=True)
        except PlanLoadError as error:
            logger.warning("%s; its memory is estimated", error)
    try:
        return PlanMemory(weights, estimated(onnx_graph, largest), measured=False)
    except ValueError as error:
        logger.warning("%s: the memory of activations cannot be estimated: %s", onnx_graph, error)
        return PlanMemory(weights, None, measured=False)


def _context_bytes(engine: tensorrt.ICudaEngine) -> int:
    return int(engine.device_memory_size_v2)


def estimated(onnx_graph: Path, sizes: Mapping[str, int]) -> int:
    """The most bytes that the graph's intermediate tensors take at one time, when its nodes run in their order without fusion.

    sizes: axis -> size. TensorRT fuses operators and needs less; its workspace for a kernel comes on top.
    Raises ValueError for a graph whose shapes are not all written in its axes.
    """
    graph = onnx.load(str(onnx_graph), load_external_data=False).graph
    size = {value.name: _bytes(value, sizes) for value in (*graph.value_info, *graph.output)}
    if unknown := [name for node in graph.node for name in node.output if name and name not in size]:
        raise ValueError(f"every tensor must have its shape in the graph, got none for {unknown[0]}")
    owner: dict[str, str] = {}  # a view -> the tensor whose memory it shows
    last: dict[str, int] = {}  # tensor -> the last node that reads it, or reads a view of it
    for index, node in enumerate(graph.node):
        for name in node.input:
            last[owner.get(name, name)] = index
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.node):
        alive |= {name: size[name] for name in node.output if name and name not in owner}
        peak = max(peak, sum(alive.values()))
        for name in [name for name in alive if last.get(name, index) <= index]:
            del alive[name]
    return peak


def _bytes(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> int:
    tensor = value.type.tensor_type
    dims = [
        _evaluate(ast.parse(dim.dim_param, mode="eval").body, sizes) if dim.dim_param else dim.dim_value
        for dim in tensor.shape.dim
    ]
    return math.prod(dims) * _BYTES.get(tensor.elem_type, 4)


def _evaluate(expression: ast.expr, sizes: Mapping[str, int]) -> int:
    """The value of a dimension such as 2*L + T."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, int):
        return expression.value
    if isinstance(expression, ast.Name) and expression.id in sizes:
        return sizes[expression.id]
    if isinstance(expression, ast.BinOp) and type(expression.op) in _OPERATORS:
        return _OPERATORS[type(expression.op)](_evaluate(expression.left, sizes), _evaluate(expression.right, sizes))
    raise ValueError(f"a dimension must be a sum or product of {', '.join(sizes)}, got {ast.unparse(expression)}")

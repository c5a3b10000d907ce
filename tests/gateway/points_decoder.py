"""A shape decoder for the points of `shapes`, as graphs of a formula: a soft skin around the points that the latents stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hunyuan3d_client import contract
from hunyuan3d_client.shapes import POINT_SCALE, frame

_WIDTH = 0.10  # of each point's bump
_LEVEL = 0.55  # of the sum of bumps at the surface
_OPSET = 21


def write(repository: Path, heads: int) -> None:
    """Puts the graphs in the place of those of a deployed decoder with so many heads, whose k and v are float32."""
    for model, graph in ((contract.VAE, _keys_values(heads)), (contract.FIELD, _field(heads))):
        path = repository / model / "1" / "model.onnx"
        for old in path.parent.glob("model.onnx*"):
            old.unlink()
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10), path)


def _tensor(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _constants(**values: object) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _keys_values(heads: int) -> onnx.GraphProto:
    """k and v: the latents, for each head."""
    nodes = [
        helper.make_node("Unsqueeze", ["latents", "axis"], ["one_head"]),
        helper.make_node("Tile", ["one_head", "repeats"], ["k"]),
        helper.make_node("Identity", ["k"], ["v"]),
    ]
    constants = _constants(axis=np.array([1]), repeats=np.array([1, heads, 1, 1]))
    outputs = [_tensor(name, "B", heads, "L", 64) for name in "kv"]
    return helper.make_graph(nodes, "vae", [_tensor("latents", "B", "L", 64)], outputs, constants)


def _field(heads: int) -> onnx.GraphProto:
    """clip(ln(sum over points of exp(-|query - point|^2 / (2 width^2))) - ln(level), -1, 1)."""
    node = helper.make_node
    nodes = [
        node("Gather", ["k", "first"], ["tokens"], axis=1),
        node("MatMul", ["tokens", "basis"], ["points"]),
        node("Transpose", ["points"], ["columns"], perm=[0, 2, 1]),
        node("MatMul", ["queries", "columns"], ["products"]),
        node("ReduceSumSquare", ["queries", "last"], ["query_squares"], keepdims=1),
        node("ReduceSumSquare", ["columns", "middle"], ["point_squares"], keepdims=1),
        node("Mul", ["products", "two"], ["twice"]),
        node("Add", ["query_squares", "point_squares"], ["both"]),
        node("Sub", ["twice", "both"], ["minus_squares"]),
        node("Mul", ["minus_squares", "sharpness"], ["exponents"]),
        node("ReduceLogSumExp", ["exponents", "last"], ["logarithms"], keepdims=0),
        node("Sub", ["logarithms", "threshold"], ["above"]),
        node("Clip", ["above", "least", "most"], ["field"]),
    ]
    numbers = {"two": 2.0, "sharpness": 0.5 / _WIDTH**2, "threshold": np.log(_LEVEL), "least": -1.0, "most": 1.0}
    constants = _constants(
        **{name: np.float32(value) for name, value in numbers.items()},
        basis=(frame().T / POINT_SCALE).astype(np.float32),
        first=np.array(0),
        last=np.array([-1]),
        middle=np.array([1]),
    )
    inputs = [_tensor("queries", "B", "P", 3), *(_tensor(name, "B", heads, "L", 64) for name in "kv")]
    return helper.make_graph(nodes, "field", inputs, [_tensor("field", "B", "P")], constants)

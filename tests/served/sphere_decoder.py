"""A shape decoder whose field is a formula, as graphs: its shapes are spheres, so a test knows the mesh of any latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hunyuan3d_client import contract

EMPTY, FULL, NOT_A_NUMBER = -100.0, 100.0, 100.0
_OPSET = 21


def radius_of(latents: np.ndarray) -> float:
    """The radius of the sphere of latents [1, L, 64], which their first number decides."""
    return float(0.5 + 0.2 * np.tanh(latents[0, 0, 0]))


def latents_of(first: float, *, second: float = 0.0, third: float = 0.0, length: int = 5) -> np.ndarray:
    """Latents of one shape. second: EMPTY or FULL for a field without a surface. third: NOT_A_NUMBER for one of NaN."""
    latents = np.zeros((1, length, contract.LATENT_CHANNELS), np.float32)
    latents[0, 0, :3] = first, second, third
    return latents


def write(repository: Path, heads: int) -> None:
    """Puts the graphs in the place of those of a deployed decoder with so many heads, whose k and v are float32."""
    for model, graph in ((contract.VAE, _keys_values(heads)), (contract.FIELD, _field(heads))):
        path = repository / model / "1" / "model.onnx"
        for old in path.parent.glob("model.onnx*"):
            old.unlink()
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)
        onnx.checker.check_model(made)
        onnx.save(made, path)


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
    outputs = [_tensor(name, "B", heads, "L", 64) for name in "kv"]
    constants = _constants(axis=np.array([1]), repeats=np.array([1, heads, 1, 1]))
    return helper.make_graph(nodes, "vae", [_tensor("latents", "B", "L", 64)], outputs, constants)


def _field(heads: int) -> onnx.GraphProto:
    """clip(4 (radius - |query|)), where radius = 0.5 + 0.2 tanh(k0) + relu(k1 - 50) - relu(-k1 - 50) + 0 sqrt(50 - k2)."""
    nodes = [
        helper.make_node("Slice", ["k", "starts", "ends"], ["corner"]),
        helper.make_node("Reshape", ["corner", "rows"], ["firsts"]),
        helper.make_node("Split", ["firsts"], ["k0", "k1", "k2"], axis=1, num_outputs=3),
        helper.make_node("Tanh", ["k0"], ["tanh"]),
        helper.make_node("Mul", ["tanh", "fifth"], ["varied"]),
        helper.make_node("Add", ["varied", "half"], ["usual"]),
        helper.make_node("Sub", ["k1", "fifty"], ["above"]),
        helper.make_node("Relu", ["above"], ["grown"]),
        helper.make_node("Neg", ["k1"], ["minus"]),
        helper.make_node("Sub", ["minus", "fifty"], ["below"]),
        helper.make_node("Relu", ["below"], ["shrunk"]),
        helper.make_node("Sub", ["fifty", "k2"], ["left"]),
        helper.make_node("Sqrt", ["left"], ["root"]),
        helper.make_node("Mul", ["root", "zero"], ["nothing"]),
        helper.make_node("Sum", ["usual", "grown", "nothing"], ["larger"]),
        helper.make_node("Sub", ["larger", "shrunk"], ["radius"]),
        helper.make_node("ReduceL2", ["queries", "last"], ["length"], keepdims=0),
        helper.make_node("Sub", ["radius", "length"], ["inside"]),
        helper.make_node("Mul", ["inside", "four"], ["steep"]),
        helper.make_node("Clip", ["steep", "least", "most"], ["field"]),
    ]
    numbers = {"fifth": 0.2, "half": 0.5, "fifty": 50.0, "zero": 0.0, "four": 4.0, "least": -1.0, "most": 1.0}
    constants = _constants(
        **{name: np.float32(value) for name, value in numbers.items()},
        starts=np.array([0, 0, 0, 0]),
        ends=np.array([contract.AXES["B"].max, 1, 1, 3]),
        rows=np.array([-1, 3]),
        last=np.array([2]),
    )
    inputs = [_tensor("queries", "B", "P", 3), *(_tensor(name, "B", heads, "L", 64) for name in "kv")]
    return helper.make_graph(nodes, "field", inputs, [_tensor("field", "B", "P")], constants)

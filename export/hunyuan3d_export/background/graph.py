"""Gives every saliency network one interface: levels of 0 to 255 go in, and a saliency of 0 to 1 comes out, for any batch.

The file's own nodes and weights stay as they are. Nodes before them normalise, a sigmoid follows them where the file has none, and
the outputs that nobody asks for go, with what only they need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from .families import Family

_PREFIX = "hunyuan3d_"  # of the names of the added nodes and tensors, which must differ from the file's own
_LEAST_LEVEL = 1e-6  # of what a picture is divided by: a black picture has no largest level
_FIRST_WITH_AXES_AS_INPUT = 18  # the opset since which ReduceMax takes its axes as an input


def read_model(path: Path) -> onnx.ModelProto:
    """The model in an ONNX file. Raises FileNotFoundError, ValueError for a file that holds none with one picture as its input."""
    if not path.is_file():
        raise FileNotFoundError(f"file must be an ONNX model, found nothing at {path}")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, the checker and the readers of external weights raise errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} must be an ONNX model, got: {reason}") from error
    found = [f"{each.name} {_dims(each)}" for each in _inputs(model)]
    shape = _dims(_inputs(model)[0]) if len(found) == 1 else []
    if len(shape) != 4 or shape[1] not in (3, None) or not model.graph.output:
        raise ValueError(f"{path} must take one picture [batch, 3, side, side], got {', '.join(found) or 'no input'}")
    return model


def side_of(model: onnx.ModelProto, family: Family) -> int:
    """The side of the square picture: the file's own, or the family's where the file leaves it free. Raises ValueError."""
    height, width = _dims(_inputs(model)[0])[2:]
    if height != width:
        raise ValueError(f"model must take a square picture, got {height} x {width}")
    return height or family.side


def check_family(model: onnx.ModelProto, name: str, family: Family) -> None:
    """Raises ValueError when the end of the graph shows that the file is of another family."""
    wanted = model.graph.output[0].name
    last = next((node.op_type for node in model.graph.node if wanted in node.output), "no node")
    if (last == "Sigmoid") == family.logits:
        expected = "anything but a Sigmoid" if family.logits else "a Sigmoid"
        raise ValueError(f"a model of the family {name} must end in {expected}, got {last}\nhint: --model of another family")


def takes_batches(model: onnx.ModelProto, side: int) -> bool:
    """Whether the network computes two pictures at once, whatever batch its file declares: a trace may fix the batch."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    _free_batch(freed)
    del freed.graph.output[1:]
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype(np.float32)
    try:
        session = _session(freed)
        name = session.get_inputs()[0].name
        both = session.run(None, {name: pictures})[0]
        alone = np.concatenate([session.run(None, {name: each[None]})[0] for each in pictures])
    except Exception:  # ONNX Runtime has classes of its own for each kind of failure, and all mean no
        return False
    return bool(both.shape == alone.shape and np.allclose(both, alone, atol=1e-3))


def wrapped(
    model: onnx.ModelProto, family: Family, shapes: tuple[tuple[str, list[str | int]], tuple[str, list[str | int]]]
) -> onnx.ModelProto:
    """The model with the common interface. shapes: name and dims of its input and of its output."""
    (rgb, rgb_dims), (saliency, saliency_dims) = shapes
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    picture, wanted = _inputs(model)[0].name, graph.output[0].name
    before = _normalising(rgb, picture, family, found)
    after = helper.make_node("Sigmoid" if family.logits else "Identity", [wanted], [saliency], name=f"{_PREFIX}saliency")
    nodes = [*before, *_needed(model, wanted), after]
    del graph.node[:], graph.value_info[:], graph.output[:], graph.input[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in _read_by(node)}
    weights = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    graph.input.append(helper.make_tensor_value_info(rgb, onnx.TensorProto.FLOAT, rgb_dims))
    graph.output.append(helper.make_tensor_value_info(saliency, onnx.TensorProto.FLOAT, saliency_dims))
    if found.ir_version < 4:  # before, each weight had to be an input too
        found.ir_version = 4
    return found


class Original(nn.Module):
    """The file itself on ONNX Runtime, one picture at a time, after a normalisation in NumPy: what a wrapped graph is compared with.

    levels [B, 3, S, S] float32 -> saliency [B, 1, S, S] float32, on the device of the levels.
    """

    def __init__(self, model: onnx.ModelProto, family: Family) -> None:
        super().__init__()
        self.model, self.family = model, family
        self._session = _session(model)

    def forward(self, rgb: Tensor) -> Tensor:
        found = np.concatenate([self._one(picture) for picture in rgb.cpu().numpy()])
        return torch.from_numpy(found).to(rgb.device)

    def _one(self, levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        mean, deviation = (np.array(each)[:, None, None] for each in (self.family.mean, self.family.deviation))
        pixels = (levels.astype(np.float64) / max(float(levels.max()), _LEAST_LEVEL) - mean) / deviation
        names = [self._session.get_outputs()[0].name]
        found = self._session.run(names, {self._session.get_inputs()[0].name: pixels[None].astype(np.float32)})[0]
        return 1 / (1 + np.exp(-found)) if self.family.logits else found


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the shapes that such files state inside are often those of another batch
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {each.name for each in model.graph.initializer}
    return [each for each in model.graph.input if each.name not in weights]


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def _free_batch(model: onnx.ModelProto) -> None:
    for value in (*_inputs(model), *model.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "B"
    del model.graph.value_info[:]


def _needed(model: onnx.ModelProto, output: str) -> list[onnx.NodeProto]:
    """The nodes that compute `output`, in their order."""
    wanted, found = {output}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            found.append(node)
            wanted |= _read_by(node)
    return found[::-1]


def _read_by(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, those of the graphs inside it included."""
    inner = [each for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) for each in graph.node]
    return set(node.input).union(*map(_read_by, inner))


def _normalising(rgb: str, pixels: str, family: Family, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes from levels of 0 to 255 to what the network takes. Their constants are added to the model."""
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    constants: dict[str, npt.NDArray[Any]] = {
        "least": np.array(_LEAST_LEVEL, np.float32),
        "mean": np.array(family.mean, np.float32).reshape(1, 3, 1, 1),
        "deviation": np.array(family.deviation, np.float32).reshape(1, 3, 1, 1),
        "axes": np.array([1, 2, 3], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, _PREFIX + name) for name, value in constants.items())

    def node(kind: str, inputs: list[str], output: str, **options: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=f"{_PREFIX}{kind}_{output}", **options)

    if opset < _FIRST_WITH_AXES_AS_INPUT:
        largest = node("ReduceMax", [rgb], f"{_PREFIX}largest", axes=[1, 2, 3], keepdims=1)
    else:
        largest = node("ReduceMax", [rgb, f"{_PREFIX}axes"], f"{_PREFIX}largest", keepdims=1)
    return [
        largest,
        node("Max", [f"{_PREFIX}largest", f"{_PREFIX}least"], f"{_PREFIX}divisor"),
        node("Div", [rgb, f"{_PREFIX}divisor"], f"{_PREFIX}share"),
        node("Sub", [f"{_PREFIX}share", f"{_PREFIX}mean"], f"{_PREFIX}centred"),
        node("Div", [f"{_PREFIX}centred", f"{_PREFIX}deviation"], pixels),
    ]

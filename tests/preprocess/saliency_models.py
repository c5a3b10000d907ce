"""Small saliency networks as ONNX files: what is brighter than the middle of the normalised levels is subject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_model(
    path: Path, *, side: int | str = 32, opset: int = 11, logits: bool = False, fixed: bool = False, contrast: float = 8.0
) -> Path:
    """A file with the dims and the batch of 1 that exporters of such networks declare, and a second output that nobody needs.

    logits: it ends without a sigmoid. fixed: it reshapes to a batch of 1, so that it takes one picture alone.
    """
    weight = np.full((1, 3, 1, 1), contrast / 3, np.float32)
    nodes = [helper.make_node("Conv", ["input.1", "weight"], ["score"], name="score")]
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.ones(3, np.float32), "unused")]
    last = "score"
    if fixed:
        constants.append(numpy_helper.from_array(np.array([1, 1, side, side], np.int64), "shape"))
        nodes.append(helper.make_node("Reshape", ["score", "shape"], ["reshaped"], name="reshape"))
        last = "reshaped"
    kind = "Identity" if logits else "Sigmoid"
    nodes.append(helper.make_node(kind, [last], ["d0"], name="d0"))
    nodes.append(helper.make_node("Sigmoid", ["score"], ["d1"], name="d1"))
    shape = [1, 1, side, side]
    graph = helper.make_graph(
        nodes,
        "saliency",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("d0", "d1")],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6 if opset < 15 else 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path

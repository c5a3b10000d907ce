"""A digest of an ONNX graph without its weights. Graphs of equal digests can refit each other's weight-stripped plans."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx

_FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_VALUES = ("raw_data", "float_data", "int32_data", "double_data", "external_data", "data_location")


def structure_digest(path: Path) -> str:
    """sha256 of a graph's nodes, tensors, shapes and integers, without floating-point values. It does not read the weights."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATING:
            for field in _VALUES:
                tensor.ClearField(field)
    for node in model.graph.node:  # these fields say which line of source code the node came from
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()

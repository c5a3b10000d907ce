"""What is used of TensorRT's Python API. mypy holds it, and every call through it, against the package tensorrt-stubs.

TensorRT and TensorRT for RTX both have these classes. A class that has to be subclassed is imported for the type checker
and taken from the library that is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tensorrt


class _Classes(Protocol):
    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    Dims: type[tensorrt.Dims]
    HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    MemoryPoolType: type[tensorrt.MemoryPoolType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    OnnxParserRefitter: type[tensorrt.OnnxParserRefitter]
    Refitter: type[tensorrt.Refitter]
    Runtime: type[tensorrt.Runtime]
    SerializationFlag: type[tensorrt.SerializationFlag]


class TensorRT(_Classes, Protocol):
    """The module `tensorrt`, or TensorRT for RTX's in its place."""

    __version__: str


if TYPE_CHECKING:
    _the_module_has_them: _Classes = tensorrt

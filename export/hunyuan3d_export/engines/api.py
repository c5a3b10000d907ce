"""The part of TensorRT's Python API that this package uses. mypy checks it, and all calls of it, against tensorrt-stubs.

TensorRT and TensorRT for RTX both have these classes. Where a class has to be subclassed, the type checker imports it from
tensorrt, and at run time it comes from the library that is installed.
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
    """The module `tensorrt`, or the module of TensorRT for RTX."""

    __version__: str


if TYPE_CHECKING:
    _the_module_has_them: _Classes = tensorrt

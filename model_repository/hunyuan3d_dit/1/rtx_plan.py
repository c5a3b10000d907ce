"""The runtime `tensorrt_rtx`: a plan of TensorRT for RTX on an RTX card (configs/rtx.pbtxt). Knows nothing of Triton.

Needs the package tensorrt-rtx. Tensors are NumPy arrays, and the GPU's memory comes from the CUDA runtime that this package
brings along (cuda_memory.py): torch or CuPy would be gigabytes more to install, and each must fit the same version of CUDA.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from batching import InvalidInput
from cuda_memory import Device

LIBRARY = np
# The bindings are a wheel with a module name of its own, but the package tensorrt-rtx has the other name.
_LIBRARY: Any = importlib.import_module("tensorrt_rtx" if importlib.util.find_spec("tensorrt_rtx") else "tensorrt_rtx_bindings")
# TensorRT's name of a type -> NumPy's type.
_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}
_MIN, _MAX = 0, 2  # the places in a profile's (min, opt, max)

_REBUILD = (
    "hint: a plan runs on the compute capabilities and the version of TensorRT for RTX that it was built for: "
    "hunyuan3d-export engine --target tensorrt-rtx --compute-capability SM89"
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """device: the index of the GPU that runs the plan."""

    device: int

    def __post_init__(self) -> None:
        if self.device < 0:
            raise ValueError(f"device must be at least 0, got {self.device}")


def to_array(tensor: Any) -> np.ndarray:
    """The array of a Triton tensor, without a copy."""
    return tensor.as_numpy()


def to_tensor(tensor_class: Any, name: str, array: np.ndarray) -> Any:
    """A Triton tensor of an array; tensor_class is pb_utils.Tensor."""
    return tensor_class(name, array)


class Network:
    """One plan on one GPU, of which `outputs` are returned.

    Raises FileNotFoundError when the plan is not deployed, CudaError without a GPU, ValueError when the library cannot load the
    plan or the plan lacks one of the outputs.
    """

    def __init__(self, path: Path, options: Options, outputs: Sequence[str]) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"plan must be deployed, found none at {path}\nhint: hunyuan3d-export engine --target tensorrt-rtx, then deploy"
            )
        self._device = Device(options.device)
        self._errors: list[str] = []
        # The logger and the runtime must live as long as the engine.
        self._logger = _logger(self._errors)
        self._runtime = _LIBRARY.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(f"{path} must load on this machine, got:\n  {self._reasons()}\n{_REBUILD}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ValueError(f"{path} must get its memory, got:\n  {self._reasons()}\nhint: build it with a smaller --profile")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        produced = [name for name in names if self._engine.get_tensor_mode(name).name == "OUTPUT"]
        self._profiles = {name: self._profile(name) for name in names if name not in produced}
        if not set(outputs) <= set(produced):
            raise ValueError(f"plan must have the config's outputs {', '.join(outputs)}, got {', '.join(produced)}")
        self._produced, self._outputs = produced, list(outputs)

    @property
    def fixed_sizes(self) -> dict[str, dict[int, int]]:
        """Of each input, the sizes that are the same in every request: axis -> size. Axis 0, the batch, is never among them."""
        return {
            name: {
                axis: size for axis, size in enumerate(_sizes(self._engine.get_tensor_shape(name))) if axis > 0 and size >= 0
            }
            for name in self._profiles
        }

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One evaluation: inputs by name -> outputs by name, all of them [B, ...].

        Raises InvalidInput for a shape outside the plan's profile, RuntimeError when the library or the GPU fails.
        """
        self._errors.clear()
        self._device.select()
        for name, value in tensors.items():
            array = np.ascontiguousarray(value, self._dtypes[name])
            self._check_shape(name, array.shape)
            self._require(self._context.set_input_shape(name, array.shape), f"take {name} {list(array.shape)}")
            self._require(self._context.set_tensor_address(name, self._device.upload(name, array)), f"have an input {name}")
        found = {name: self._empty(name) for name in self._produced}
        for name, array in found.items():
            address = self._device.reserve(name, array.nbytes)
            self._require(self._context.set_tensor_address(name, address), f"have an output {name}")
        self._require(self._context.execute_async_v3(self._device.stream), "run")
        for name in self._outputs:
            self._device.download(name, found[name])
        self._device.wait()
        return {name: found[name] for name in self._outputs}

    def _profile(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""
        shapes = [_sizes(shape) for shape in self._engine.get_tensor_profile_shape(name, 0)]
        return shapes[_MIN], shapes[_MAX]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        smallest, largest = self._profiles[name]
        if len(shape) != len(smallest) or not all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        ):
            raise InvalidInput(f"{name} must be of shape {list(smallest)} to {list(largest)}, got {list(shape)}")

    def _empty(self, name: str) -> np.ndarray:
        """Memory for an output. TensorRT knows its shape once the shapes of all inputs are set."""
        return np.empty(_sizes(self._context.get_tensor_shape(name)), self._dtypes[name])

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(f"plan must {what}, got:\n  {self._reasons()}")

    def _reasons(self) -> str:
        return "\n  ".join(self._errors[:5]) or "no reason given"


def _sizes(shape: Any) -> tuple[int, ...]:
    """TensorRT's Dims as a tuple."""
    return tuple(shape[axis] for axis in range(len(shape)))


def _logger(errors: list[str]) -> Any:
    """A logger of the library that keeps its error messages in `errors`."""
    severities = _LIBRARY.ILogger.Severity

    class Logger(_LIBRARY.ILogger):
        def __init__(self) -> None:
            _LIBRARY.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                errors.append(message)
            if severity not in (severities.VERBOSE, severities.INFO):
                logger.warning("tensorrt-rtx: %s", message)

    return Logger()

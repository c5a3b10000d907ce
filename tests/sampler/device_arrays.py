"""A stand-in for CuPy on a machine without a GPU: arrays on a pretended device that refuse whatever real CuPy arrays refuse.

NumPy's functions reach the arrays by __array_function__ and __array_ufunc__, as they reach CuPy's. A function that CuPy does not
have, a NumPy array beside a device array and a silent conversion to NumPy each raise TypeError. cupy_names.json lists the functions
and the members of arrays of CuPy 14; tests/sampler/test_cupy.py compares the list with the real module.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

NAMES = json.loads((Path(__file__).parent / "cupy_names.json").read_text())
FUNCTIONS, MEMBERS = frozenset(NAMES["functions"]), frozenset(NAMES["ndarray"])


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the device, under CuPy's own name; only the members that the sampler uses are here."""

    __array_priority__ = 100

    def __init__(self, values: Any, functions: set[str]) -> None:
        self._values, self._functions = np.array(values), functions
        self.shape, self.ndim, self.dtype, self.nbytes = (
            getattr(self._values, name) for name in ("shape", "ndim", "dtype", "nbytes")
        )

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._values[self._read(key)], self._functions)

    def __float__(self) -> float:
        return float(self._values)

    def all(self) -> ndarray:
        return ndarray(self._values.all(), self._functions)

    def get(self) -> np.ndarray:
        return self._values.copy()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options:
            return NotImplemented
        return self._computed(ufunc.__name__, ufunc, inputs, {})

    def __array_function__(self, function: Any, _types: Any, arguments: Any, options: Any) -> Any:
        return self._computed(function.__name__, function, arguments, options)

    def _computed(self, name: str, function: Any, arguments: Any, options: Any) -> Any:
        if name not in FUNCTIONS:
            return NotImplemented
        self._functions.add(name)
        results = function(*map(self._read, arguments), **{key: self._read(value) for key, value in options.items()})
        if isinstance(results, list):
            return [ndarray(result, self._functions) for result in results]
        return ndarray(results, self._functions)

    def _read(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._read, value))
        return value._values if isinstance(value, ndarray) else value


class _Device:
    id = 3


class Cupy(ModuleType):
    """The module. `functions` collects the names of all that was called by NumPy's functions and operators."""

    def __init__(self, *, available: bool = True) -> None:
        super().__init__("cupy")
        self.functions: set[str] = set()
        self.ndarray = ndarray
        self.is_available = lambda: available
        self.cuda = ModuleType("cupy.cuda")
        self.cuda.Device = _Device

    def asarray(self, values: Any) -> ndarray:
        self.functions.add("asarray")
        return values if isinstance(values, ndarray) else ndarray(values, self.functions)

    def asnumpy(self, array: ndarray) -> np.ndarray:
        self.functions.add("asnumpy")
        return array.get()

    def ascontiguousarray(self, array: ndarray) -> ndarray:
        if not isinstance(array, ndarray):
            raise TypeError("a NumPy array is not on the device")
        self.functions.add("ascontiguousarray")
        return array

    def from_dlpack(self, tensor: Tensor) -> ndarray:
        self.functions.add("from_dlpack")
        assert not tensor.is_cpu(), "CuPy refuses a DLPack tensor in host memory"
        return tensor.value


class Tensor:
    """Triton's tensor in host or device memory: as_numpy() refuses device memory, as in the Python backend."""

    def __init__(self, name: str, value: Any) -> None:
        self._name, self.value = name, value

    @classmethod
    def from_dlpack(cls, name: str, value: ndarray) -> Tensor:
        assert isinstance(value, ndarray)
        return cls(name, value)

    def name(self) -> str:
        return self._name

    def is_cpu(self) -> bool:
        return isinstance(self.value, np.ndarray)

    def as_numpy(self) -> np.ndarray:
        if not self.is_cpu():
            raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self.value


def install(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType | None = None) -> Any:
    """Makes `import cupy` give the stand-in, or `cupy`."""
    module = Cupy() if cupy is None else cupy
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module

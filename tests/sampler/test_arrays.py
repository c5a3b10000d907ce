"""The states of samples are NumPy arrays, or on a GPU CuPy arrays, with which the same stepper runs."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import device_arrays
import numpy as np
import pytest
from arrays import Arrays
from doubles import Denoiser, expected, make_stepper, run_together
from sample_request import PATHS, SampleRequest

Make = Callable[..., SampleRequest]
WAIT_S = 20.0
TRITON = SimpleNamespace(
    Tensor=device_arrays.Tensor,
    PreferredMemory=lambda kind, device: (kind, device),
    TRITONSERVER_MEMORY_CPU="CPU",
    TRITONSERVER_MEMORY_GPU="GPU",
)


def test_with_numpy_nothing_is_copied_and_answers_come_in_host_memory(request_for: Make) -> None:
    arrays, request = Arrays("numpy", TRITON), request_for()
    assert not arrays.on_gpu and arrays.upload(request) is request
    assert arrays.call_options() == {"preferred_memory": ("CPU", 0)}
    assert arrays.host(request.latents) is request.latents
    assert arrays.tensor("context", request.context).as_numpy() is request.context
    assert arrays.array(SimpleNamespace(as_numpy=lambda: request.latents)) is request.latents


def test_with_cupy_answers_come_in_the_memory_of_its_gpu(request_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = device_arrays.install(monkeypatch)
    arrays, request = Arrays("auto", TRITON), request_for(batch=2, negative_context=np.ones((2, 3, 1536), np.float16))
    assert arrays.on_gpu and arrays.call_options() == {"preferred_memory": ("GPU", 3)}
    uploaded = arrays.upload(request)
    for name in ("context", "negative_context", "latents"):
        assert isinstance(getattr(uploaded, name), cupy.ndarray)
        np.testing.assert_array_equal(arrays.host(getattr(uploaded, name)), getattr(request, name))
    tensor = arrays.tensor("latents", uploaded.latents)
    assert not tensor.is_cpu() and arrays.array(tensor) is uploaded.latents
    assert isinstance(arrays.array(device_arrays.Tensor("velocity", request.latents)), cupy.ndarray), "it came in host memory"


class Broken(ModuleType):
    """A CuPy whose attribute `missing` fails when it is used, as by a driver that is too old."""

    def __init__(self, error: Exception) -> None:
        super().__init__("cupy")
        self.is_available = lambda: True
        self._error = error

    def asarray(self, _values: object) -> None:
        raise self._error


class Wrong(device_arrays.Cupy):
    """A CuPy that gives back other numbers."""

    def asnumpy(self, array: Any) -> np.ndarray:
        return super().asnumpy(array) + 1


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (device_arrays.Cupy(available=False), "RuntimeError: CuPy must find a GPU, found none"),
        (Broken(RuntimeError("cudaErrorInsufficientDriver")), "RuntimeError: cudaErrorInsufficientDriver"),
        (Broken(OSError("nvrtc must be there")), "OSError: nvrtc must be there"),
        (Wrong(), "RuntimeError: latents must be 1 after the rehearsal of plain, got 2.0 to 2.0"),
    ],
)
def test_any_failure_of_cupy_falls_back_to_numpy(
    cupy: ModuleType, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request_for: Make
) -> None:
    device_arrays.install(monkeypatch, cupy)
    arrays, request = Arrays("auto", TRITON), request_for()
    assert not arrays.on_gpu and arrays.upload(request) is request
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"CuPy cannot be used, so the states of samples are NumPy arrays: {message}"


def test_a_failing_import_of_cupy_falls_back_to_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CuPy makes its cache folder at import, which is a PermissionError where it may not."""
    (tmp_path / "cupy.py").write_text("raise PermissionError(13, 'Permission denied', '/nonexistent/.cupy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert not Arrays("auto", TRITON).on_gpu
    assert "PermissionError: [Errno 13] Permission denied: '/nonexistent/.cupy'" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed: auto may find a GPU")
def test_auto_without_cupy_is_numpy(caplog: pytest.LogCaptureFixture) -> None:
    assert not Arrays("auto", SimpleNamespace()).on_gpu
    assert "ModuleNotFoundError: No module named 'cupy'" in caplog.text


def test_numpy_never_imports_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = device_arrays.install(monkeypatch)
    assert not Arrays("numpy", TRITON).on_gpu and not cupy.functions


def stepped(arrays: Arrays, request_for: Make, path: str) -> set[str]:
    """Steps two requests on the device by calls that they share or that split them. The types of arrays that the denoiser saw."""
    negative = np.ones((2, 3, 1536), np.float16)
    requests = [request_for(batch=2, steps=5, negative_context=negative), request_for(batch=3, steps=4, seed=3)]
    denoiser = Denoiser()
    seen: set[str] = set()
    denoiser.bad = lambda tensors: seen.update(type(value).__module__ for value in tensors.values())
    stepper = make_stepper(denoiser, max_batch=4)
    run = run_together(stepper, [arrays.upload(request) for request in requests], path)
    sinks = asyncio.run(asyncio.wait_for(run, WAIT_S))
    for request, sink in zip(requests, sinks, strict=True):
        assert sink.error is None, sink.error
        np.testing.assert_allclose(arrays.host(sink.final), expected(request), rtol=1e-4, atol=1e-5)
    return seen


@pytest.mark.parametrize("path", PATHS)
def test_every_path_uses_only_what_cupy_has(path: str, request_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = device_arrays.install(monkeypatch)
    arrays = Arrays("auto", TRITON)
    rehearsed = set(cupy.functions)
    cupy.functions.clear()
    assert stepped(arrays, request_for, path) == {device_arrays.__name__}
    assert {"asarray", "concatenate", "isfinite", "multiply", "repeat"} <= cupy.functions <= device_arrays.FUNCTIONS
    # The stand-in denoiser of this test subtracts, which for all paths but two-batch only it does.
    assert cupy.functions <= rehearsed | {"subtract"}, "the rehearsal compiles every kernel of the first request"


def test_the_stand_in_refuses_what_cupy_refuses() -> None:
    cupy = device_arrays.Cupy()
    on_device, on_host = cupy.asarray(np.ones((2, 3), np.float32)), np.ones((2, 3), np.float32)
    refused = [
        lambda: np.asarray(on_device),
        lambda: np.concatenate([on_device, on_host]),
        lambda: on_device + on_host,
        lambda: on_host * on_device,
        lambda: np.split(on_device, np.array([1])),
        lambda: cupy.ascontiguousarray(on_host),
        lambda: np.insert(on_device, 0, 1.0),
    ]
    for each in refused:
        with pytest.raises(TypeError):
            each()
    assert "insert" not in device_arrays.FUNCTIONS, "NumPy has it, CuPy has not"


def test_the_stand_in_has_nothing_that_cupy_has_not() -> None:
    own = {name for name in vars(device_arrays.ndarray) if not name.startswith(("_computed", "_read"))}
    ordinary = {"__module__", "__doc__", "__init__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"}
    assert own - ordinary <= device_arrays.MEMBERS
    assert {"asarray", "asnumpy", "ascontiguousarray", "from_dlpack", "is_available"} <= device_arrays.FUNCTIONS


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_states_stay_on_the_gpu(path: str, request_for: Make) -> None:
    pytest.importorskip("cupy", reason="states live on a GPU only where CuPy is installed")
    # Triton's own tensors exist only inside the server, so here a tensor is the array itself, which knows DLPack too.
    tensor = SimpleNamespace(from_dlpack=lambda _name, array: _OnGpu(array))
    arrays = Arrays("auto", SimpleNamespace(Tensor=tensor))
    assert arrays.on_gpu
    assert stepped(arrays, request_for, path) == {"cupy"}


class _OnGpu:
    """A tensor by DLPack, as Triton's."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def is_cpu(self) -> bool:
        return False

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

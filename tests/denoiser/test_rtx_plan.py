"""The runtime for RTX cards: a plan compiled here up to the driver's refusal, and the evaluation with a stand-in for the GPU."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_memory
import numpy as np
import pytest
import rtx_plan
from batching import InvalidInput

from hunyuan3d_client import contract
from hunyuan3d_export.engine_from_onnx import build_engines
from hunyuan3d_export.engines.gpu import first_gpu
from hunyuan3d_export.engines.targets import find_target
from hunyuan3d_export.files import RTX_PLAN_FILE
from hunyuan3d_export.repository_from_artifacts import deploy
from hunyuan3d_export.server.embedded import EmbeddedServer, ServerOptions, ServerStartError, loadable_models

OPTIONS = rtx_plan.Options(device=0)
PROFILES = {"x": ((1, 1, 3), (2, 4, 3), (4, 8, 3)), "scale": ((1,), (2,), (4,))}
without_gpu = pytest.mark.skipif(first_gpu() is not None, reason="there is a GPU")


class Host:
    """A stand-in for the CUDA runtime whose GPU memory is memory of this process. `live` holds the allocations by address."""

    def __init__(self) -> None:
        self.live: dict[int, Any] = {}
        self.calls: list[str] = []
        self.fails: str | None = None

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            return super().__getattribute__(name)
        if name == "cudaGetErrorString":
            return Described()
        self.calls.append(name)
        return (lambda *_: 2) if name == self.fails else getattr(self, f"_{name}", lambda *_: 0)

    def _cudaMalloc(self, found: Any, size: ctypes.c_size_t) -> int:
        block = ctypes.create_string_buffer(size.value)
        found._obj.value = ctypes.addressof(block)
        self.live[found._obj.value] = block
        return 0

    def _cudaFree(self, address: ctypes.c_void_p) -> int:
        del self.live[int(address.value or 0)]
        return 0

    def _cudaMemcpyAsync(self, destination: Any, source: Any, size: ctypes.c_size_t, kind: ctypes.c_int, _stream: Any) -> int:
        on_device = destination if kind.value == 1 else source
        assert len(self.live[on_device.value]) >= size.value, "a copy must stay inside the buffer"
        ctypes.memmove(destination.value, source.value, size.value)
        return 0


class Described:
    restype: Any = None

    def __call__(self, _code: int) -> bytes:
        return b"out of memory"


class Engine:
    """A stand-in for an engine and its context: k = x scale, v = -x, computed where the addresses point."""

    num_io_tensors = 4
    names = ("x", "scale", "k", "v")

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.refuses = False

    def create_execution_context(self) -> Engine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name="HALF" if name == "scale" else "FLOAT")

    def get_tensor_mode(self, name: str) -> Any:
        return types.SimpleNamespace(name="INPUT" if name in PROFILES else "OUTPUT")

    def get_tensor_profile_shape(self, name: str, _index: int) -> Any:
        return PROFILES[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known = {"x": (-1, -1, 3), "scale": (-1,)}
        return known.get(name) or self.shapes["x"]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        x, scale = self._at("x", np.float32), self._at("scale", np.float16)
        self._at("k", np.float32)[...] = x * scale.astype(np.float32)[:, None, None]
        self._at("v", np.float32)[...] = -x
        return not self.refuses

    def _at(self, name: str, dtype: Any) -> np.ndarray:
        shape = self.shapes.get(name, self.shapes["x"])
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(cuda_memory, "load_runtime", lambda: host)
    return host


@pytest.fixture
def engine(host: Host, monkeypatch: pytest.MonkeyPatch) -> Engine:
    del host
    engine = Engine()
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine)
    library = types.SimpleNamespace(Runtime=lambda _logger: runtime, ILogger=rtx_plan._LIBRARY.ILogger)
    monkeypatch.setattr(rtx_plan, "_LIBRARY", library)
    return engine


@pytest.fixture
def network(engine: Engine, tmp_path: Path) -> rtx_plan.Network:
    del engine
    (tmp_path / RTX_PLAN_FILE).write_bytes(b"a plan")
    return rtx_plan.Network(tmp_path / RTX_PLAN_FILE, OPTIONS, ["v", "k"])


def inputs(rows: int, length: int) -> dict[str, np.ndarray]:
    x = np.arange(rows * length * 3, dtype=np.float32).reshape(rows, length, 3)
    return {"x": x, "scale": np.arange(1, rows + 1, dtype=np.float32)}


def test_outputs_come_back_in_the_configs_order_for_any_sizes(network: rtx_plan.Network, host: Host) -> None:
    for rows, length in ((1, 2), (4, 8), (2, 3)):
        tensors = inputs(rows, length)
        found = network.run({**tensors, "x": np.asfortranarray(tensors["x"])})  # not contiguous: it must be copied
        assert list(found) == ["v", "k"]
        np.testing.assert_array_equal(found["k"], tensors["x"] * tensors["scale"][:, None, None])
        np.testing.assert_array_equal(found["v"], -tensors["x"])
    assert len(host.live) == 4, "one buffer for each tensor: a larger one replaces a smaller one"
    before = host.calls.count("cudaMalloc")
    network.run(inputs(3, 4))
    assert host.calls.count("cudaMalloc") == before, "a smaller request uses the memory that is there"


def test_results_are_complete_before_they_are_returned(network: rtx_plan.Network, host: Host) -> None:
    network.run(inputs(1, 2))
    assert host.calls[-1] == "cudaStreamSynchronize" and host.calls[-2] == "cudaMemcpyAsync"


def test_fixed_sizes_are_those_of_the_plan(network: rtx_plan.Network) -> None:
    assert network.fixed_sizes == {"x": {2: 3}, "scale": {}}


def test_a_shape_outside_the_profile_is_the_callers_fault(network: rtx_plan.Network) -> None:
    with pytest.raises(InvalidInput, match=r"x must be of shape \[1, 1, 3\] to \[4, 8, 3\], got \[1, 9, 3\]"):
        network.run(inputs(1, 9))
    with pytest.raises(InvalidInput, match=r"x must be of shape .*, got \[6\]"):
        network.run({"x": np.ones(6, np.float32), "scale": np.ones(1, np.float32)})


def test_the_librarys_refusal_is_an_error(network: rtx_plan.Network, engine: Engine) -> None:
    engine.refuses = True
    with pytest.raises(RuntimeError, match="plan must run, got:\n  no reason given"):
        network.run(inputs(1, 2))


def test_a_full_gpu_is_an_error_and_the_next_request_may_pass(network: rtx_plan.Network, host: Host) -> None:
    network.run(inputs(1, 1))
    host.fails = "cudaMalloc"
    with pytest.raises(cuda_memory.CudaError, match="GPU 0 must answer cudaMalloc, got error 2: out of memory\nhint: "):
        network.run(inputs(4, 8))
    host.fails = None
    np.testing.assert_array_equal(network.run(inputs(4, 8))["v"], -inputs(4, 8)["x"])


def test_an_output_that_the_plan_lacks(engine: Engine, tmp_path: Path) -> None:
    del engine
    (tmp_path / RTX_PLAN_FILE).write_bytes(b"a plan")
    with pytest.raises(ValueError, match="plan must have the config's outputs k, velocity, got k, v"):
        rtx_plan.Network(tmp_path / RTX_PLAN_FILE, OPTIONS, ["k", "velocity"])


def test_a_plan_that_the_library_refuses(host: Host, tmp_path: Path) -> None:
    """The real library reads the file here, and its own reason is in the error."""
    del host
    (tmp_path / RTX_PLAN_FILE).write_bytes(b"no plan")
    with pytest.raises(ValueError, match="must load on this machine, got:\n  .*readHeader(.*\n)+hint: a plan runs on"):
        rtx_plan.Network(tmp_path / RTX_PLAN_FILE, OPTIONS, ["k"])


def test_options() -> None:
    with pytest.raises(ValueError, match="device must be at least 0, got -1"):
        rtx_plan.Options(device=-1)


def test_nothing_deployed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="plan must be deployed, found none at .*\nhint: .*--target tensorrt-rtx"):
        rtx_plan.Network(tmp_path / RTX_PLAN_FILE, OPTIONS, ["k"])


def test_no_cuda_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "_LIBRARIES", ("libno-such-cudart.so",))
    with pytest.raises(cuda_memory.CudaError, match="CUDA runtime must be installed, found no .*\nhint: pip install nvidia"):
        cuda_memory.Device(0)


@pytest.fixture(scope="module")
def plans(artifacts: Callable[..., Path], root: Path) -> Path:
    """Plans of the real compiler for the micro weights."""
    out = root / "build" / "test" / "micro-fp16-rtx"
    build_engines(artifacts(precision="fp16"), out, find_target("tensorrt-rtx"))
    return out


@without_gpu
def test_without_a_gpu_the_drivers_own_words_are_the_error(plans: Path) -> None:
    with pytest.raises(
        cuda_memory.CudaError, match=r"GPU 0 must answer cudaSetDevice, got error \d+: CUDA .*\nhint: nvidia-smi"
    ):
        rtx_plan.Network(plans / contract.DIT / RTX_PLAN_FILE, OPTIONS, ["velocity"])


def test_only_the_config_rtx_serves_these_plans(plans: Path, tmp_path: Path) -> None:
    assert deploy(plans, tmp_path) == [contract.DIT, contract.DIT_GUIDED]
    denoisers = [contract.DIT, contract.DIT_GUIDED, contract.SAMPLER, contract.SAMPLER_UNARY]
    assert loadable_models(tmp_path, "rtx") == sorted(denoisers)
    for config in ("default", "cpu", "onnxruntime", "torch"):
        with pytest.raises(ValueError, match=f"must hold a deployed .* for config {config}, found none"):
            loadable_models(tmp_path, config)


@pytest.mark.served
@without_gpu
def test_a_real_server_loads_the_plan_up_to_the_drivers_refusal(plans: Path, tmp_path: Path) -> None:
    deploy(plans, tmp_path)
    with pytest.raises(ServerStartError, match="(?s)must stay up, got exit code .*GPU 0 must answer cudaSetDevice, got error"):
        EmbeddedServer(tmp_path, ServerOptions(config="rtx")).start()

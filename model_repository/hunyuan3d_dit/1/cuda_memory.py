"""Memory and copies on one GPU, through the CUDA runtime library itself. Knows nothing of TensorRT or of a network."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind


class CudaError(RuntimeError):
    """The CUDA runtime is missing, finds no GPU, or refused a call."""


def load_runtime() -> Any:
    """The CUDA runtime library. TensorRT for RTX has loaded it into this process already.

    Raises CudaError when no such library is there.
    """
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"the CUDA runtime must be installed, found no {_LIBRARIES[0]}\nhint: pip install nvidia-cuda-runtime")


class Device:
    """One GPU with a stream of its own and named buffers. A buffer grows with the largest array that it had to hold.

    Raises CudaError when this GPU cannot be used.
    """

    def __init__(self, index: int) -> None:
        self._runtime = load_runtime()
        self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
        self._index = index
        self._buffers: dict[str, tuple[int, int]] = {}
        self.select()
        stream = ctypes.c_void_p()
        self._call(
            "cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(1)
        )  # 1: does not wait for the default stream
        self.stream = int(stream.value or 0)

    def select(self) -> None:
        """Makes this the GPU of the calling thread."""
        self._call("cudaSetDevice", ctypes.c_int(self._index))

    def reserve(self, name: str, size_bytes: int) -> int:
        """The address of the buffer `name`, which holds at least `size_bytes`."""
        address, held_bytes = self._buffers.get(name, (0, 0))
        if size_bytes > held_bytes or not address:
            if address:
                del self._buffers[name]  # first, so that a failed allocation leaves no freed address behind
                self._call("cudaFree", ctypes.c_void_p(address))
            found = ctypes.c_void_p()
            self._call("cudaMalloc", ctypes.byref(found), ctypes.c_size_t(max(size_bytes, 1)))
            address = int(found.value or 0)
            self._buffers[name] = (address, size_bytes)
        return address

    def upload(self, name: str, array: np.ndarray) -> int:
        """Copies a contiguous array into the buffer `name` and returns its address. The caller keeps the array until wait()."""
        address = self.reserve(name, array.nbytes)
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)
        return address

    def download(self, name: str, array: np.ndarray) -> None:
        """Fills a contiguous array from the buffer `name`. The array is complete after wait()."""
        address, _ = self._buffers[name]
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)

    def wait(self) -> None:
        """Returns when the stream has done all of its work."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def _copy(self, destination: int, source: int, size_bytes: int, kind: int) -> None:
        addresses = ctypes.c_void_p(destination), ctypes.c_void_p(source)
        stream = ctypes.c_void_p(self.stream)
        self._call("cudaMemcpyAsync", *addresses, ctypes.c_size_t(size_bytes), ctypes.c_int(kind), stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._runtime, name)(*arguments)
        if code != 0:
            reason = self._runtime.cudaGetErrorString(code).decode()
            raise CudaError(
                f"GPU {self._index} must answer {name}, got error {code}: {reason}\n"
                "hint: nvidia-smi must list the GPU, with a driver that supports this CUDA version"
            )

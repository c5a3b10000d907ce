"""Finds this machine's GPU. It asks the driver, so it needs neither the CUDA toolkit nor torch."""

from __future__ import annotations

import ctypes
import dataclasses

_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclasses.dataclass(frozen=True)
class Gpu:
    """name: the driver's name of the GPU. compute_capability: in the form SM89."""

    name: str
    compute_capability: str


def first_gpu() -> Gpu | None:
    """The first GPU that the CUDA driver sees; None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    version = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(version, (_MAJOR, _MINOR), strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Gpu(name.value.decode(), f"SM{version[0].value}{version[1].value}")

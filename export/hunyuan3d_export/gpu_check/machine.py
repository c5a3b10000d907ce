"""The facts about the machine that a measurement is worth nothing without: GPU, driver, CUDA, clocks, versions."""

from __future__ import annotations

import platform
import shutil
import subprocess

import torch

from ..manifest import versions_of

_VERSIONS = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy", "cupy", "sageattention")
# The driver's fields, as nvidia-smi --help-query-gpu lists them.
_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
_TIMEOUT_S = 20.0


def machine(device: torch.device) -> dict[str, str]:
    """Name -> text. What this machine does not tell is left out."""
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine(), **versions_of(*_VERSIONS)}
    cuda = {"device": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    return {**cuda, **_driver(device.index or 0), **versions_of(*_VERSIONS)}


def at_clock(device: torch.device) -> str:
    """ " at N MHz", the clock that the GPU has right after some work; "" where nothing tells it."""
    clock = _driver(device.index or 0).get("clocks.sm") if device.type == "cuda" else None
    return f" at {clock}" if clock else ""


def _driver(index: int) -> dict[str, str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    query = [command, f"--id={index}", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_FIELDS, (text.strip() for text in done.stdout.strip().split(",")), strict=False))

"""Where the states of samples live: in NumPy arrays, or in CuPy arrays on a GPU.

On a GPU a request's context is uploaded once and its latents stay there until a client gets them; tensors reach Triton and come
back by DLPack, without a copy. The mathematics in trajectory.py is the same for both.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from types import ModuleType
from typing import Any

import numpy as np
from trajectory import SampleRequest

logger = logging.getLogger(__name__)


class Arrays:
    """The array library that `kind` (settings.ARRAYS) stands for; `triton` is pb_utils."""

    def __init__(self, kind: str, triton: Any) -> None:
        self._triton = triton
        self._cupy = _cupy() if kind == "auto" else None

    @property
    def on_gpu(self) -> bool:
        return self._cupy is not None

    def upload(self, request: SampleRequest) -> SampleRequest:
        """The request with its arrays on the device where they are stepped."""
        if self._cupy is None:
            return request
        negative = request.negative_context
        return dataclasses.replace(
            request,
            context=self._cupy.asarray(request.context),
            negative_context=None if negative is None else self._cupy.asarray(negative),
            latents=self._cupy.asarray(request.latents),
        )

    def host(self, array: Any) -> np.ndarray:
        """The array in host memory, as a client gets it."""
        return array if self._cupy is None else self._cupy.asnumpy(array)

    def tensor(self, name: str, array: Any) -> Any:
        """A Triton tensor of `array`, on the array's device."""
        if self._cupy is None:
            return self._triton.Tensor(name, array)
        return self._triton.Tensor.from_dlpack(name, self._cupy.ascontiguousarray(array))

    def array(self, tensor: Any) -> Any:
        """The array of a Triton tensor; it is uploaded if Triton returned it in host memory."""
        if self._cupy is None:
            return tensor.as_numpy()
        return self._cupy.asarray(tensor.as_numpy()) if tensor.is_cpu() else self._cupy.from_dlpack(tensor)

    def call_options(self) -> dict[str, Any]:
        """Options of a call between models that keep its answer on the device."""
        if self._cupy is None:
            return {}
        memory = self._triton.PreferredMemory(self._triton.TRITONSERVER_MEMORY_GPU, self._cupy.cuda.Device().id)
        return {"preferred_memory": memory}


def _cupy() -> ModuleType | None:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return None
    if not cupy.is_available():
        logger.warning("CuPy finds no GPU: the sampler's states stay on the CPU")
        return None
    return cupy

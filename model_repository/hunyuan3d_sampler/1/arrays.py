"""Where the states of samples live: in NumPy arrays, or in CuPy arrays on a GPU.

With CuPy a request's context is uploaded once, and its latents stay on the GPU until a client gets them; tensors go to Triton and
come back by DLPack. The mathematics in trajectory.py is the same for both.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import time
from typing import Any

import numpy as np
from rehearsal import rehearse
from sample_request import SampleRequest

logger = logging.getLogger(__name__)


class Arrays:
    """The array library that `kind` (settings.ARRAYS) stands for; `triton` is pb_utils.

    The kind `auto` takes CuPy if CuPy can make a step on a GPU here. If CuPy fails in any way, the log gets a warning and the
    states are NumPy arrays: the sampler can always work with these.
    """

    def __init__(self, kind: str, triton: Any) -> None:
        self._triton = triton
        self._cupy: Any = None
        if kind == "auto":
            self._take_cupy()

    def _take_cupy(self) -> None:
        begin = time.monotonic()
        try:
            # CuPy makes its cache folder when it is imported. Where it may not write there, that is an OSError.
            self._cupy = importlib.import_module("cupy")
            if not self._cupy.is_available():
                raise RuntimeError("CuPy must find a GPU, found none")
            rehearse(self)
        except Exception as error:
            self._cupy = None
            logger.warning(
                "CuPy cannot be used, so the states of samples are NumPy arrays: %s: %s", type(error).__name__, error
            )
        else:
            logger.info("CuPy holds the states of samples; its rehearsal took %.1f s", time.monotonic() - begin)

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
        """Options of a call between models: they ask for its answer in the memory where the states live.

        Without them the answer of a TensorRT, torch or CUDA denoiser stays in GPU memory, which as_numpy() refuses to read.
        """
        if self._cupy is None:
            memory = self._triton.PreferredMemory(self._triton.TRITONSERVER_MEMORY_CPU, 0)
        else:
            memory = self._triton.PreferredMemory(self._triton.TRITONSERVER_MEMORY_GPU, self._cupy.cuda.Device().id)
        return {"preferred_memory": memory}

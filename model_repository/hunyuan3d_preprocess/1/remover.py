"""Calls of hunyuan3d_background, the network that finds the subject of a photograph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_calls
import numpy as np
from outcomes import Ended

BACKGROUND = "hunyuan3d_background"
_MANIFEST = "manifest.json"


class Remover:
    """The network, where it is served. manifest: the file that says the side of its pictures. triton: pb_utils."""

    def __init__(self, triton: Any, repository: Path, version: str, timeout_s: float) -> None:
        self._triton, self._timeout_s = triton, timeout_s
        self._manifest = repository / BACKGROUND / version / _MANIFEST
        self._cpu = triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0)

    def is_served(self) -> bool:
        """Whether it can be called. It is asked for at each request, because Triton may load it after the caller."""
        return self._manifest.is_file() and bool(self._triton.is_model_ready(BACKGROUND))

    def side(self) -> int:
        """The side of its square pictures in pixels."""
        return int(json.loads(self._manifest.read_text())["serving"]["side"])

    async def saliency(self, levels: np.ndarray, request_id: str) -> np.ndarray:
        """Levels [1, 3, S, S] -> saliency [S, S], 0 to 1. Raises Ended when the network fails or does not answer in time."""
        (found,) = await model_calls.call(
            self._triton,
            BACKGROUND,
            [self._triton.Tensor("rgb", levels)],
            ("saliency",),
            limit_s=self._timeout_s,
            caller="hunyuan3d_preprocess",
            request_id=request_id,
            preferred_memory=self._cpu,
        )
        values = found.as_numpy()
        if values.shape != (1, 1, *levels.shape[2:]) or not np.isfinite(values).all():
            raise Ended(f"saliency must be finite [1, 1, S, S] with S = {levels.shape[2]}, got {list(values.shape)}")
        return values[0, 0]

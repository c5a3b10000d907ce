"""Calls of the shape decoder's two networks, hunyuan3d_vae and hunyuan3d_field."""

from __future__ import annotations

from typing import Any

import model_calls
import numpy as np
from outcomes import Ended, NoDenoiser

VAE, FIELD = "hunyuan3d_vae", "hunyuan3d_field"
KEYS_VALUES = ("k", "v")


class NetworkCalls:
    """Implements decoding.Networks by calls between models; `triton` is pb_utils."""

    def __init__(self, triton: Any, timeout_s: float) -> None:
        self._triton = triton
        self._timeout_s = timeout_s
        self._cpu = triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0)

    def check_ready(self) -> None:
        """Raises NoDenoiser when one of the two networks is not loaded."""
        for model in (VAE, FIELD):
            if not self._triton.is_model_ready(model):
                raise NoDenoiser(f"{model} must be loaded, got none\nhint: deploy a shape decoder")

    async def keys_values(self, latents: np.ndarray, request_id: str) -> list[Any]:
        """The tensors k and v of one shape, in the memory where hunyuan3d_vae leaves them: on a GPU if it runs there.

        The calls of hunyuan3d_field pass these tensors on. Nothing here reads them, so they are never copied to the host.
        """
        return await self._call(VAE, [self._triton.Tensor("latents", latents)], KEYS_VALUES, request_id)

    async def field(self, queries: np.ndarray, keys_values: list[Any], request_id: str) -> np.ndarray:
        """The values [P] of the field at the queries [P, 3] float32, in host memory."""
        inputs = [self._triton.Tensor("queries", queries[None]), *keys_values]
        (found,) = await self._call(FIELD, inputs, ("field",), request_id, preferred_memory=self._cpu)
        values = found.as_numpy()
        if values.shape != (1, len(queries)):
            raise Ended(f"field must be {[1, len(queries)]}, got {list(values.shape)}\nhint: deploy the decoder again")
        return values[0]

    async def _call(self, model: str, inputs: list[Any], outputs: tuple[str, ...], request_id: str, **memory: Any) -> list[Any]:
        limit_s = self._timeout_s
        options = {"request_id": request_id, **memory}
        try:
            return await model_calls.call(
                self._triton, model, inputs, outputs, limit_s=limit_s, caller="hunyuan3d_mesh", **options
            )
        except Ended as error:
            if not self._triton.is_model_ready(model):
                raise NoDenoiser(f"{model} must stay loaded, got unloaded\nhint: load it again") from error
            raise

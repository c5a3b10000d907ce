"""From pictures to a condition and to latents: AsyncClient's calls condition, generate and generate_stream.

The server has the ensemble `hunyuan3d`, which does all of it in one request. This client asks for the condition and then
streams the sampler: Triton 24.10, among others, does not pass the cancelling of an ensemble's request on to its sampler.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import contract, requests
from .errors import ModelFailed, invalid
from .exchange import Exchange, one
from .requests import Step
from .transport import ModelInfo, Request, Tensors

Context = npt.NDArray[np.float16]
_EXPECTED = "a path, the bytes of a file, a PIL image or a uint8 array [H, W, 3 or 4] or [H, W]"
_PNG_COLORS = {1: 0, 3: 2, 4: 6}  # channels -> PNG's number of the colour type


class ImageCalls:
    """The calls of AsyncClient that take pictures."""

    if TYPE_CHECKING:  # AsyncClient's own
        _exchange: Exchange

        def _deadline(self, timeout_s: float | None) -> float: ...
        async def _conform(
            self, name: str, inputs: dict[str, npt.NDArray[Any]], deadline: float
        ) -> tuple[ModelInfo, dict[str, npt.NDArray[Any]]]: ...
        def _trajectory(self, inputs: dict[str, npt.NDArray[Any]], deadline: float) -> AsyncGenerator[Step, None]: ...

    async def condition(self, image: Any, *, timeout_s: float | None = None) -> Context:
        """The condition tokens [1, T, 1536] float16 of a picture: what sample() and stream() take.

        A picture is a path, the bytes of a PNG, JPEG or WebP file, a PIL image or a uint8 array [H, W, 3 or 4]; a list of
        up to four is the views front, left, back, right, for multi-view weights.
        Raises InvalidInput, ModelNotReady, Overloaded, DeadlineExceeded, ServerUnavailable, ModelFailed, Cancelled.
        """
        return await self._condition(image_inputs(image), self._deadline(timeout_s))

    async def generate(
        self,
        image: Any,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        num_latents: int | None = None,
        schedule: str | None = None,
        timeout_s: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """The latents [1, L, 64] float32 of a picture: condition(), then sample() with these options.

        Raises what they raise.
        """
        trajectory = self.generate_stream(
            image,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            num_latents=num_latents,
            schedule=schedule,
            preview_every=0,
            timeout_s=timeout_s,
        )
        async for step in trajectory:
            last = step.latents
        assert last is not None  # the trajectory's own check
        return last

    def generate_stream(
        self,
        image: Any,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        num_latents: int | None = None,
        schedule: str | None = None,
        preview_every: int = 1,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Step, None]:
        """generate() as stream() gives it: the Steps of the trajectory as they are made.

        Leaving the loop early, by break or exception, cancels the trajectory on the server.
        Raises InvalidInput for a picture or timeout at once, and what generate() raises while iterating.
        """
        options = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "num_latents": num_latents,
            "schedule": schedule,
            "preview_every": preview_every,
        }
        return self._from_image(image_inputs(image), options, self._deadline(timeout_s))

    async def _condition(self, inputs: dict[str, npt.NDArray[Any]], deadline: float) -> Context:
        _, inputs = await self._conform(contract.IMAGE_CONTEXT, inputs, deadline)
        request = Request(contract.IMAGE_CONTEXT, inputs, uuid.uuid4().hex)
        return await one(self._exchange.infer(request, _context, deadline=deadline))

    async def _from_image(
        self, inputs: dict[str, npt.NDArray[Any]], options: dict[str, Any], deadline: float
    ) -> AsyncGenerator[Step, None]:
        context = await self._condition(inputs, deadline)
        async with aclosing(self._trajectory(requests.sample(context, options), deadline)) as steps:
            async for step in steps:
                yield step


def image_inputs(image: Any) -> dict[str, npt.NDArray[Any]]:
    """The tensor of a picture or a list of views. Raises InvalidInput."""
    views = list(image) if isinstance(image, list | tuple) else [image]
    if not 1 <= len(views) <= len(contract.VIEWS):
        raise invalid("image", f"1 to {len(contract.VIEWS)} views", len(views), "their order is " + ", ".join(contract.VIEWS))
    tensor = np.empty(len(views), np.object_)  # element by element: NumPy would cut trailing zero bytes off
    for index, view in enumerate(views):
        tensor[index] = _file(view)
    return {"image": tensor}


def _file(view: Any) -> bytes:
    if isinstance(view, str | Path):
        try:
            return Path(view).read_bytes()
        except (OSError, ValueError) as error:
            raise invalid("image", "a readable file", str(error), "check the path") from error
    if isinstance(view, bytes | bytearray | memoryview):
        return bytes(view)
    if hasattr(view, "convert") and hasattr(view, "mode"):  # a PIL image; PIL itself is not needed here
        view = np.asarray(view.convert("RGBA" if view.mode in ("RGBA", "LA", "PA") or "transparency" in view.info else "RGB"))
    if not isinstance(view, np.ndarray):
        raise invalid("image", _EXPECTED, type(view).__name__, "open it with PIL, or pass its path")
    return png(view)


def png(pixels: npt.NDArray[Any]) -> bytes:
    """A PNG file of uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. Raises InvalidInput."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in _PNG_COLORS or 0 in pixels.shape:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise invalid("image", _EXPECTED, found, "floats in [0, 1]: (255 * image).round().astype('uint8')")
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row's first byte: no filter
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLORS[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _context(answer: Tensors) -> Context:
    """The condition of an answer. Raises ModelFailed if it isn't float16 [1, T, 1536]."""
    found = answer.get("context")
    if found is None or found.dtype != np.float16 or found.ndim != 3 or found.shape[::2] != (1, contract.CONTEXT_WIDTH):
        got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise ModelFailed(f"context must be float16 [1, T, {contract.CONTEXT_WIDTH}], got {got}\nhint: redeploy the model")
    return found

"""Pictures, in every form a caller may have them, as the tensor `image` of a request. Pure: no network.

Nothing is decoded here. Files travel as they are, and arrays travel as PNG files, which this module writes without any
library for pictures.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract
from .errors import invalid

_EXPECTED = "a path, the bytes of a file, a PIL image or a uint8 array [H, W, 3 or 4] or [H, W]"
_PNG_COLORS = {1: 0, 3: 2, 4: 6}  # number of channels -> PNG's number for the colour type


def image_inputs(image: Any) -> dict[str, npt.NDArray[Any]]:
    """The tensor of one picture, or of a list of views. Raises InvalidInput."""
    views = list(image) if isinstance(image, list | tuple) else [image]
    if not 1 <= len(views) <= len(contract.VIEWS):
        raise invalid("image", f"1 to {len(contract.VIEWS)} views", len(views), "their order is " + ", ".join(contract.VIEWS))
    tensor = np.empty(len(views), np.object_)  # filled element by element, because np.array() cuts trailing zero bytes off
    for index, view in enumerate(views):
        tensor[index] = _file(view)
    return {contract.IMAGE.name: tensor}


def _file(view: Any) -> bytes:
    """The bytes of a picture's file."""
    if isinstance(view, str | Path):
        try:
            return Path(view).read_bytes()
        except (OSError, ValueError) as error:
            raise invalid("image", "a readable file", str(error), "check the path") from error
    if isinstance(view, bytes | bytearray | memoryview):
        return bytes(view)
    if hasattr(view, "convert") and hasattr(view, "mode"):  # a PIL image, recognised without importing PIL
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
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of each row says that no filter is used
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLORS[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

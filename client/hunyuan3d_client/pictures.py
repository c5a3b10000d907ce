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


def image_inputs(image: Any, remove_background: bool | None = None) -> dict[str, npt.NDArray[Any]]:
    """The tensors of one picture, or of a list of views. Files are read and arrays compressed here. Raises InvalidInput.

    remove_background: None is not sent, so that the server's own setting holds.
    """
    views = checked_views(image)
    removal = removal_inputs(remove_background)
    tensor = np.empty(len(views), np.object_)  # filled element by element, because np.array() cuts trailing zero bytes off
    for index, view in enumerate(views):
        tensor[index] = _file(view)
    return {contract.IMAGE.name: tensor, **removal}


def removal_inputs(remove_background: Any) -> dict[str, npt.NDArray[Any]]:
    """The tensor of this option, if it is given. Raises InvalidInput."""
    if remove_background is None:
        return {}
    if not isinstance(remove_background, bool | np.bool_):
        raise invalid(
            "remove_background", "True or False", repr(remove_background), "leave it out for the server's own setting"
        )
    return {contract.REMOVE_BACKGROUND.name: np.array([remove_background])}


def checked_views(image: Any) -> list[Any]:
    """The views of a picture, whose number and kinds are right. Quick: nothing is read or compressed. Raises InvalidInput."""
    views = list(image) if isinstance(image, list | tuple) else [image]
    if not 1 <= len(views) <= len(contract.VIEWS):
        raise invalid("image", f"1 to {len(contract.VIEWS)} views", len(views), "their order is " + ", ".join(contract.VIEWS))
    for view in views:
        if isinstance(view, np.ndarray):
            _channels(view)
        elif not (isinstance(view, str | Path | bytes | bytearray | memoryview) or _is_of_pil(view)):
            raise invalid("image", _EXPECTED, type(view).__name__, "open it with PIL, or pass its path")
    return views


def _is_of_pil(view: Any) -> bool:
    return hasattr(view, "convert") and hasattr(view, "mode")  # without importing PIL


def _file(view: Any) -> bytes:
    """The bytes of a picture's file."""
    if isinstance(view, str | Path):
        try:
            return Path(view).read_bytes()
        except (OSError, ValueError) as error:
            raise invalid("image", "a readable file", str(error), "check the path") from error
    if isinstance(view, bytes | bytearray | memoryview):
        return bytes(view)
    if _is_of_pil(view):
        view = np.asarray(view.convert("RGBA" if view.mode in ("RGBA", "LA", "PA") or "transparency" in view.info else "RGB"))
    return png(view)


def png(pixels: npt.NDArray[Any]) -> bytes:
    """A PNG file of uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. Raises InvalidInput."""
    channels = _channels(pixels)
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of each row says that no filter is used
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLORS[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.data, 1)), (b"IEND", b"")
    return b"".join([b"\x89PNG\r\n\x1a\n", *(part for name, body in chunks for part in _chunk(name, body))])


def _channels(pixels: npt.NDArray[Any]) -> int:
    """The number of channels of a picture. Raises InvalidInput for an array that is no picture."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1] if pixels.ndim else 0
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in _PNG_COLORS or 0 in pixels.shape:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise invalid("image", _EXPECTED, found, "floats in [0, 1]: (255 * image).round().astype('uint8')")
    return channels


def _chunk(name: bytes, body: bytes) -> tuple[bytes, ...]:
    return struct.pack(">I", len(body)), name, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))

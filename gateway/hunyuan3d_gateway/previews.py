"""Previews of a growing mesh: a few hundred points, small enough for an event and quick to draw.

The latents of `shapes` are points themselves. Those of other weights are decoded coarsely. A state halfway is half noise, so it is
first carried on along its velocity to the end that it heads for.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from hunyuan3d_client.shapes import decode_points

POINTS = 700
_STEPS = 127  # a coordinate is a signed byte
Latents = npt.NDArray[np.float32]


def extrapolated(latents: Latents, t: float, before: Latents, t_before: float) -> Latents:
    """The data that a trajectory heads for, by the mean velocity between two of its states."""
    velocity = (latents - before) / max(t - t_before, 1e-6)
    return latents + (1 - t) * velocity


def of_points(latents: Latents) -> str:
    """The preview of latents [1, L, 64] of the preset `shapes`."""
    return packed(decode_points(latents)[0])


def of_stl(data: bytes) -> str:
    """The preview of a binary STL file: the middles of some of its triangles."""
    (count,) = struct.unpack_from("<I", data, 80)
    rows = np.frombuffer(data, np.uint8, count * 50, 84).reshape(count, 50)
    corners = rows[:, 12:48].copy().view("<f4").reshape(count, 3, 3)
    return packed(corners.mean(axis=1))


def packed(points: npt.NDArray[np.floating[Any]]) -> str:
    """base64 of at most POINTS points x, y, z as signed bytes; 127 is 1.27."""
    chosen = points[np.linspace(0, len(points) - 1, min(len(points), POINTS)).astype(int)] if len(points) else points
    return base64.b64encode((chosen * 100).round().clip(-_STEPS, _STEPS).astype(np.int8).tobytes()).decode()

"""A request for a mesh: the latents of one shape and how to make the mesh. Knows nothing of Triton.

Axes: B shapes, L latent tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from cleaning import LEAST_FACES
from finite import all_finite
from mesh_files import FORMATS
from surface import LEAST_RESOLUTION, METHODS, MOST_RESOLUTION

CHANNELS = 64
MOST_LATENTS = 4096
_MOST_FACES = 2**31 - 1
_LARGEST_LEVEL = 0.9  # the field is about 1 far inside and -1 far outside a shape
_KINDS = {"resolution": int, "format": str, "max_faces": int, "keep": float, "level": float, "method": str}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshRequest:
    """How to make a mesh. resolution: cells along each side of the grid. max_faces: 0 stands for no limit. keep: parts with
    fewer faces than this share of the largest part's are left out. level: the field's value at the surface.
    """

    resolution: int
    format: str
    max_faces: int
    keep: float
    level: float
    method: str

    def check(self) -> None:
        """Raises ValueError for a value outside its range."""
        if not LEAST_RESOLUTION <= self.resolution <= MOST_RESOLUTION:
            raise ValueError(
                f"resolution must be in {LEAST_RESOLUTION}..{MOST_RESOLUTION}, got {self.resolution}\nhint: 256 or 384 are usual"
            )
        for name, choices in (("format", FORMATS), ("method", METHODS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}\nhint: leave it out")
        if not (self.max_faces == 0 or LEAST_FACES <= self.max_faces <= _MOST_FACES):
            raise ValueError(
                f"max_faces must be 0 or {LEAST_FACES}..{_MOST_FACES}, got {self.max_faces}\nhint: 0 keeps all faces"
            )
        if not 0 <= self.keep <= 1:  # false for NaN too
            raise ValueError(f"keep must be in 0..1, got {self.keep:g}\nhint: 0 keeps all parts, 1 only the largest")
        if not (math.isfinite(self.level) and abs(self.level) <= _LARGEST_LEVEL):
            raise ValueError(
                f"level must be in -{_LARGEST_LEVEL}..{_LARGEST_LEVEL}, got {self.level:g}\nhint: leave it out for 0"
            )


def decode(tensors: Mapping[str, np.ndarray], defaults: MeshRequest) -> tuple[np.ndarray, MeshRequest]:
    """The latents [1, L, 64] float32 and the options in `tensors`; `defaults` take the places of what is left out.

    Raises ValueError, which names the tensor, for anything that cannot become a mesh.
    """
    if "latents" not in tensors:  # Triton only counts inputs: it accepts an optional one in place of the required one
        raise ValueError("latents must be given, got none\nhint: send the sampler's result")
    latents = tensors["latents"]
    if latents.ndim != 3 or latents.shape[0] != 1 or latents.shape[2] != CHANNELS or not 1 <= latents.shape[1] <= MOST_LATENTS:
        raise ValueError(
            f"latents must be [1, 1..{MOST_LATENTS}, {CHANNELS}], got shape {list(latents.shape)}\n"
            "hint: send each shape of a batch as a request of its own; the server decodes several at the same time"
        )
    if not all_finite(latents):
        raise ValueError("latents must be finite, got NaN or Inf\nhint: sample again")
    given = {name: _scalar(name, tensors[name], kind) for name, kind in _KINDS.items() if name in tensors}
    request = dataclasses.replace(defaults, **given)
    request.check()
    return latents, request


def _scalar(name: str, array: np.ndarray, kind: type) -> object:
    if array.shape != (1,):
        raise ValueError(f"{name} must hold one value, got shape {list(array.shape)}\nhint: send shape [1]")
    return array[0].decode(errors="replace") if kind is str else kind(array[0])

"""The encoder's shape, and what it is exported for: a picture's size and the number of views."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

PATCH = 14
IMAGE_SIZES = (518, 1022)  # the published variants': 1370 and 5330 tokens of one view
VIEWS = (1, 4)  # of the single-view and the multi-view variants
FOLDER_FILE = "model.safetensors"  # of the weights in a folder that transformers wrote
HEAD_DIM = 64  # in every published DINOv2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """hidden_size, depth, mlp_ratio and gated (SwiGLU instead of GELU) are the network's, read from its weights.

    image_size is the square picture's side in pixels; views is the most of one request, and with more than one every
    view's tokens carry its view vector.
    """

    hidden_size: int
    depth: int
    mlp_ratio: int
    gated: bool
    image_size: int
    views: int

    def __post_init__(self) -> None:
        if self.image_size not in IMAGE_SIZES:
            raise ValueError(f"image size must be one of {', '.join(map(str, IMAGE_SIZES))}, got {self.image_size}")
        if self.views not in VIEWS:
            raise ValueError(f"views must be one of {', '.join(map(str, VIEWS))}, got {self.views}")
        if self.hidden_size % HEAD_DIM:
            raise ValueError(f"hidden size must be a multiple of {HEAD_DIM}, got {self.hidden_size}")

    @property
    def tokens(self) -> int:
        """Of one view: the CLS token, then the patches in rows."""
        return 1 + (self.image_size // PATCH) ** 2


# Name -> (depth, mlp_ratio) at the contract's width, gated: DINOv2-giant, and the smallest for tests.
VARIANTS: Mapping[str, tuple[int, int]] = {"giant": (40, 4), "tiny": (1, 1)}

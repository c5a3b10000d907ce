"""The sizes of the encoder's network, and the picture size and number of views that it is exported for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

PATCH = 14
IMAGE_SIZES = (518, 1022)  # of the published variants; a view has 1370 or 5330 tokens
WORDS_IMAGE_SIZE = 112  # of the encoder that reads words
VIEWS = (1, 4)  # of the single-view and the multi-view variants
FOLDER_FILE = "model.safetensors"  # the weights file in a folder that transformers wrote
HEAD_DIM = 64  # in every published DINOv2


@dataclasses.dataclass(frozen=True)
class Words:
    """The sizes of a head that reads words: the number of tokens that it makes of a view, and of words in its vocabulary."""

    tokens: int
    vocabulary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """hidden_size, depth, mlp_ratio and gated (SwiGLU instead of GELU) describe the network and are read from its weights.

    words: of an encoder whose context is words (see WordHead); None: the context is all tokens of the last layer.
    image_size: the side of the square picture in pixels. views: the most views of one request. Above 1, the encoder adds each
    view's view vector to its tokens.
    """

    hidden_size: int
    depth: int
    mlp_ratio: int
    gated: bool
    image_size: int
    views: int
    words: Words | None = None

    def __post_init__(self) -> None:
        sizes = (WORDS_IMAGE_SIZE,) if self.words else IMAGE_SIZES
        if self.image_size not in sizes:
            raise ValueError(f"image size must be one of {', '.join(map(str, sizes))}, got {self.image_size}")
        if self.views not in VIEWS:
            raise ValueError(f"views must be one of {', '.join(map(str, VIEWS))}, got {self.views}")
        if self.hidden_size % HEAD_DIM:
            raise ValueError(f"hidden size must be a multiple of {HEAD_DIM}, got {self.hidden_size}")

    @property
    def tokens(self) -> int:
        """Number of context tokens of one view: the CLS token, then the patches row by row; or the words."""
        return self.words.tokens if self.words else 1 + (self.image_size // PATCH) ** 2


# Name -> (depth, mlp_ratio). Both are gated and have the contract's width: DINOv2-giant, and a small network for tests.
VARIANTS: Mapping[str, tuple[int, int]] = {"giant": (40, 4), "tiny": (1, 1)}

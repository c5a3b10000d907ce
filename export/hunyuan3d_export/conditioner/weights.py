"""The source of an image encoder's weights, and the picture size and views that it is exported for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hunyuan3d_client.install import install_hint

from ..files import sha256
from .config import FOLDER_FILE, IMAGE_SIZES, VIEWS, WORDS_IMAGE_SIZE

if TYPE_CHECKING:
    from .model import Conditioner


# The variants whose weights are part of this package instead of random. Such a variant has the name of the denoiser's preset.
SHIPPED: Mapping[str, Path] = {"shapes": Path(__file__).with_name("shapes.safetensors")}


@dataclasses.dataclass(frozen=True)
class ConditionerServing:
    """The facts that deployment needs: the side of the square picture in pixels, and the most views of one request."""

    image_size: int = IMAGE_SIZES[0]
    views: int = VIEWS[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionerSource:
    """A source of weights. path: a checkpoint or a transformers folder; None: the weights shipped as `variant`, or random
    ones of this size from `seed`.

    image_size: the side of the pictures in pixels. views: 4 adds the view vectors of the multi-view variants.
    """

    network: ClassVar[str] = "conditioner"

    path: Path | None = None
    variant: str = "tiny"
    seed: int = 0
    image_size: int = IMAGE_SIZES[0]
    views: int = VIEWS[0]

    @property
    def checkpoint(self) -> Path | None:
        return self.path

    @classmethod
    def shipped(cls, name: str) -> ConditionerSource:
        """The weights that are shipped under this name, with the sizes that they were trained for."""
        return cls(variant=name, image_size=WORDS_IMAGE_SIZE, views=VIEWS[0])

    @property
    def _file(self) -> Path | None:
        """The file or folder that these weights are read from; None for random weights."""
        return self.path or SHIPPED.get(self.variant)

    def identity(self) -> dict[str, Any]:
        """JSON that identifies the weights. Raises FileNotFoundError when their file is missing."""
        if self._file is None:
            return {"variant": self.variant, "seed": self.seed}
        file = self._file / FOLDER_FILE if self._file.is_dir() else self._file
        if not file.is_file():
            raise FileNotFoundError(f"conditioner must be a checkpoint or a folder with {FOLDER_FILE}, found nothing at {file}")
        shipped = {"variant": self.variant} if self.path is None else {}
        return {**shipped, "checkpoint_sha256": sha256(file)}

    def serving(self) -> ConditionerServing:
        """The facts that deployment needs."""
        return ConditionerServing(self.image_size, self.views)

    def load(self, dtype: torch.dtype = torch.float32, *, attention_backend: str = "sdpa") -> Conditioner:
        """The encoder in this dtype, in eval mode on the CPU; attention_backend is transformers' `sdpa` or `eager`.

        Raises CheckpointError for unreadable weights, ValueError for sizes that no published variant has and when the package
        transformers is missing.
        """
        try:
            from .checkpoint import load_conditioner, random_conditioner
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} must be installed for the image encoder, got none\nhint: {install_hint('export,conditioner')}"
            ) from error
        sizes = {"image_size": self.image_size, "views": self.views}
        if self._file is None:
            return random_conditioner(self.variant, self.seed, **sizes, dtype=dtype, attention=attention_backend)
        return load_conditioner(self._file, **sizes, dtype=dtype, attention=attention_backend)

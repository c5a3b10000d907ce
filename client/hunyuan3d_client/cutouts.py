"""Cutout: the subject of a photograph, cut out by the server."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from .errors import invalid
from .files import atomic_path


@dataclasses.dataclass(frozen=True)
class Cutout:
    """A PNG file with transparency around the subject.

    `background` says what became of the picture's background, see contract.BACKGROUNDS. `subject_share` is the part of the picture
    that is subject, 0 to 1.
    """

    data: bytes = dataclasses.field(repr=False)
    background: str
    subject_share: float

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file to `path`, whole or not at all, and return the path. Raises InvalidInput for another suffix than .png, OSError."""
        where = Path(path)
        if where.suffix.lower() != ".png":
            raise invalid("path", "a .png file, which has transparency", str(where), "name it .png")
        with atomic_path(where) as temporary:
            temporary.write_bytes(self.data)
        return where

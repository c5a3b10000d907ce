"""Mesh: a mesh file that the server made, and what is known about it."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract
from .errors import invalid
from .files import atomic_path


@dataclasses.dataclass(frozen=True)
class MeshProgress:
    """How far a decode is.

    `stage` is what the server works at: keys and values, field, surface, file, or done. `level` of `levels` refinements of the
    grid are done (both 0 before the first), and the field is known at `evaluations` points.
    """

    stage: str
    level: int
    levels: int
    evaluations: int


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The bytes of a mesh file, its format (see contract.MESH_FORMATS) and the server's statistics.

    `latents` [1, L, 64] float32 are those that generate() sampled on the way; a Mesh of decode() has none. The statistics hold the
    counts, the options that were used and the seconds of each part.
    """

    data: bytes = dataclasses.field(repr=False)
    format: str
    statistics: Mapping[str, Any] = dataclasses.field(repr=False)
    latents: npt.NDArray[np.float32] | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def vertices(self) -> int:
        """The number of vertices."""
        return int(self.statistics["vertices"])

    @property
    def faces(self) -> int:
        """The number of triangles."""
        return int(self.statistics["faces"])

    @property
    def watertight(self) -> bool:
        """Whether every edge has exactly two triangles."""
        return bool(self.statistics["watertight"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file to `path`, whole or not at all, and return the path. Missing folders are created.

        Raises InvalidInput for a suffix of another format, OSError.
        """
        where = Path(path)
        suffix = where.suffix.lower().removeprefix(".")
        if suffix != self.format:
            asked = suffix if suffix in contract.MESH_FORMATS else "glb"
            hint = f"the server writes the format, so ask for it: format={asked!r}; it has {', '.join(contract.MESH_FORMATS)}"
            raise invalid("path", f"a .{self.format} file, the mesh's own format", str(where), hint)
        with atomic_path(where) as temporary:
            temporary.write_bytes(self.data)
        return where

    def to_trimesh(self) -> Any:
        """The mesh as a trimesh.Trimesh. Raises ImportError where the package trimesh is not installed."""
        try:
            import trimesh
        except ImportError as error:
            message = "trimesh must be installed for to_trimesh(), found none\nhint: pip install trimesh"
            raise ImportError(message) from error
        # A STL file has no shared vertices. `process` merges them; it would reorder those of the other formats.
        return trimesh.load_mesh(io.BytesIO(self.data), file_type=self.format, process=self.format == "stl")

"""A mesh as the bytes of a file."""

from __future__ import annotations

import numpy as np
import trimesh

FORMATS = ("glb", "obj", "stl", "ply")


def encode(vertices: np.ndarray, faces: np.ndarray, format: str) -> bytes:
    """The file of a mesh with vertices [V, 3] float32 and faces [F, 3] int32; stl and ply are binary.

    Raises ValueError for a format that is not in FORMATS.
    """
    if format not in FORMATS:
        raise ValueError(
            f"format must be one of {', '.join(FORMATS)}, got {format!r}\nhint: glb suits most viewers and engines"
        )
    mesh = trimesh.Trimesh(vertices, faces, process=False, validate=False)
    content = mesh.export(file_type=format)
    return content.encode() if isinstance(content, str) else bytes(content)

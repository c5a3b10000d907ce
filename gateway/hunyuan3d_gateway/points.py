"""A mesh of the points that the latents of `shapes` are, for servers of that preset without a shape decoder."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import trimesh

from hunyuan3d_client import Mesh
from hunyuan3d_client.shapes import decode_points

_RADIUS = 0.035
_CORNERS = np.concatenate([np.eye(3), -np.eye(3)])
_FACES = np.array([[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]])


def mesh_of(latents: npt.NDArray[np.float32], format: str) -> Mesh:
    """A small octahedron at each point of latents [1, L, 64], as a Mesh in a format. Blocking."""
    points = decode_points(latents)[0]
    vertices = (points[:, None] + _RADIUS * _CORNERS).reshape(-1, 3).astype(np.float32)
    faces = (len(_CORNERS) * np.arange(len(points))[:, None, None] + _FACES).reshape(-1, 3)
    content = trimesh.Trimesh(vertices, faces, process=False, validate=False).export(file_type=format)
    data = content.encode() if isinstance(content, str) else bytes(content)
    return Mesh(data, format, {"vertices": len(vertices), "faces": len(faces), "watertight": True}, latents)

"""A mesh file in another format. Needs trimesh."""

from __future__ import annotations

import io

import trimesh


def converted(data: bytes, source: str, target: str) -> bytes:
    """The same vertices and triangles as a file of another format of contract.MESH_FORMATS. Blocking."""
    mesh = trimesh.load_mesh(io.BytesIO(data), file_type=source, process=source == "stl")
    if isinstance(mesh, trimesh.Scene):
        mesh = mesh.to_mesh()
    content = mesh.export(file_type=target)
    return content.encode() if isinstance(content, str) else bytes(content)

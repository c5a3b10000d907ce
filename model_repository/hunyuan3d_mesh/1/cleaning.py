"""What is done to a mesh before it becomes a file: floaters are removed, and its triangles are made fewer."""

from __future__ import annotations

import dataclasses

import fast_simplification
import numpy as np
import topology
from topology import Topology

LEAST_FACES = 4


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """The mesh: vertices [V, 3] float32, faces [F, 3] int32; `removed` counts the components that were floaters."""

    vertices: np.ndarray
    faces: np.ndarray
    components: int
    watertight: bool
    removed: int


def clean(
    vertices: np.ndarray,
    faces: np.ndarray,
    *,
    keep: float = 0.005,
    max_faces: int | None = None,
    shape: Topology | None = None,
) -> Cleaned:
    """Removes components with fewer than `keep` times the faces of the largest one (0 keeps all), then simplifies to max_faces.

    vertices: [V, 3] float32. faces: [F, 3] int32. shape: their topology where it is known, which saves finding it again. The
    orientation of the triangles is kept. Simplification may end a little above or below max_faces, because it removes triangles
    in pairs.

    Raises ValueError for keep outside of 0..1 and for max_faces below 4.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in 0..1, got {keep}\nhint: 0.005 removes specks, 0 keeps everything")
    if max_faces is not None and max_faces < LEAST_FACES:
        raise ValueError(
            f"max_faces must be at least {LEAST_FACES}, got {max_faces}\nhint: 40000 suits viewers, leave it out for all"
        )
    shape = topology.measure(faces, len(vertices)) if shape is None else shape
    sizes = np.bincount(shape.parts[faces[:, 0]], minlength=shape.components)
    kept = sizes >= max(1, keep * sizes.max(initial=0))
    removed = int(np.count_nonzero(sizes) - np.count_nonzero(kept))
    changed = not kept.all()
    if changed:
        faces = faces[kept[shape.parts[faces[:, 0]]]]
        vertices, faces = used(vertices, faces)
    if max_faces is not None and len(faces) > max_faces:
        vertices, faces = _simplify(vertices, faces, max_faces)
        changed = True
    if changed:
        shape = topology.measure(faces, len(vertices))
    return Cleaned(vertices, faces, shape.components, shape.watertight, removed)


def used(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh without the vertices that no face uses."""
    needed = np.zeros(len(vertices), bool)
    needed[faces] = True
    return vertices[needed], (np.cumsum(needed, dtype=np.int32) - 1)[faces]


def _simplify(vertices: np.ndarray, faces: np.ndarray, max_faces: int) -> tuple[np.ndarray, np.ndarray]:
    points, triangles = fast_simplification.simplify(vertices, faces, target_count=max_faces)
    return used(np.asarray(points, np.float32), np.asarray(triangles, np.int32))

"""The quality of a mesh, measured against the exact solid that its prompt names. Needs SciPy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .metrics import surface_distance
from .prompts import solid
from .solids import Array, Pair, Topology

Faces = NDArray[np.int64]
Latents = NDArray[np.float32]

BOUNDS = 1.01  # half the side of the cube in which fields are evaluated
SURFACE_SAMPLES = 2048
# Copies that are nearer to each other than this touch, or as good as touch, so their topology is not judged.
LEAST_GAP = 0.01
_NEIGHBOURS = 4  # the triangles around so many of the nearest vertices are tried


@dataclasses.dataclass(frozen=True)
class Triangles:
    """A mesh: vertices [V, 3] and the three vertices of each face [F, 3]."""

    vertices: Array
    faces: Faces

    def volume(self) -> float:
        """The volume that the mesh encloses; positive when its faces are turned outward."""
        return float(np.linalg.det(self.vertices[self.faces]).sum() / 6)

    def watertight(self) -> bool:
        """Whether each edge has two faces, which run along it in opposite directions."""
        edges = np.concatenate([self.faces[:, pair] for pair in ([0, 1], [1, 2], [2, 0])])
        forward, backward = (edges[:, order] @ np.array([len(self.vertices), 1]) for order in ([0, 1], [1, 0]))
        return len(np.unique(forward)) == len(forward) and np.array_equal(np.sort(forward), np.sort(backward))

    def topology(self) -> Topology:
        """The mesh's parts and its Euler number, without vertices that no face has."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        used, faces = np.unique(self.faces, return_inverse=True)
        faces = faces.reshape(-1, 3)
        edges = np.unique(np.sort(np.concatenate([faces[:, pair] for pair in ([0, 1], [1, 2], [2, 0])]), axis=1), axis=0)
        graph = coo_matrix((np.ones(len(edges)), edges.T), shape=(len(used), len(used)))
        count, _ = connected_components(graph, directed=False)
        return Topology(int(count), len(used) - len(edges) + len(faces))


# Latents [L, 64] of one shape -> its mesh; None for a field without a surface.
Decode = Callable[[Latents], Triangles | None]


@functools.cache
def _surface_samples(prompt: str) -> Array:
    return solid(prompt).sample(SURFACE_SAMPLES, np.random.default_rng(0))


def judged_topology(prompt: str) -> bool:
    """Whether a mesh of this prompt has one right topology: copies that touch have none."""
    surface = solid(prompt)
    return not isinstance(surface, Pair) or surface.gap() >= LEAST_GAP


def distance_to_mesh(points: Array, mesh: Triangles) -> Array:
    """Distance of points [N, 3] to the triangles around their nearest vertices, [N].

    On meshes of marching cubes, whose triangles are small, that is the distance to the mesh.
    """
    from scipy.spatial import cKDTree

    used, faces = np.unique(mesh.faces, return_inverse=True)
    vertices, faces = mesh.vertices[used], faces.reshape(-1, 3)
    _, nearest = cKDTree(vertices).query(points, k=min(_NEIGHBOURS, len(vertices)))
    order = np.argsort(faces.ravel(), kind="stable")
    starts = np.searchsorted(faces.ravel()[order], np.arange(len(vertices) + 1))
    counts = starts[nearest + 1] - starts[nearest]  # [N, K]
    rows = np.repeat(np.arange(counts.size), counts.ravel())
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts.ravel()) - counts.ravel(), counts.ravel())
    chosen = faces[order[starts[nearest].ravel()[rows] + within] // 3]
    point = rows // counts.shape[1]
    distance = _triangle_distance(points[point], vertices[chosen])
    found = np.full(len(points), np.inf)
    np.minimum.at(found, point, distance)
    return found


def _triangle_distance(points: Array, triangles: Array) -> Array:
    """Distance of each point [N, 3] to its own triangle [N, 3 corners, 3], [N]."""
    a, b, c = np.moveaxis(triangles, 1, 0)
    normal = np.cross(b - a, c - a)
    area = np.maximum(np.linalg.norm(normal, axis=-1), 1e-30)
    height = np.abs(((points - a) * normal).sum(-1)) / area
    inside = np.ones(len(points), bool)
    edge = np.full(len(points), np.inf)
    for start, end in ((a, b), (b, c), (c, a)):
        along, offset = end - start, points - start
        inside &= (np.cross(normal, along) * offset).sum(-1) >= 0
        fraction = np.clip((offset * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-30), 0, 1)
        edge = np.minimum(edge, np.linalg.norm(offset - fraction[:, None] * along, axis=-1))
    nearest: Array = np.where(inside, height, edge)
    return nearest


def measure_mesh(mesh: Triangles | None, prompt: str) -> dict[str, float]:
    """The metrics of one mesh; distances in units of the solid's bounding radius. None: a field without a surface.

    to_surface: mean distance of the vertices to the solid. from_surface: that of the solid's points to the mesh. volume: relative
    error. watertight: 1 or 0. topology: 1 where components and Euler number are the solid's, else 0; left out where copies touch.
    """
    judged = judged_topology(prompt)
    if mesh is None or not len(mesh.faces) or not np.isfinite(mesh.vertices).all():
        worst = {"to_surface": np.inf, "from_surface": np.inf, "volume": np.inf, "watertight": 0.0}
        return worst | ({"topology": 0.0} if judged else {})
    expected = solid(prompt)
    found = {
        "to_surface": float(surface_distance(mesh.vertices, prompt).mean()),
        "from_surface": float(distance_to_mesh(_surface_samples(prompt), mesh).mean()),
        "volume": abs(mesh.volume() / expected.volume() - 1),
        "watertight": float(mesh.watertight()),
    }
    return found | ({"topology": float(mesh.topology() == expected.topology())} if judged else {})

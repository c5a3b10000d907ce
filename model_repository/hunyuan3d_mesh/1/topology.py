"""The connected parts of a mesh, and whether it is closed."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclasses.dataclass(frozen=True)
class Topology:
    """parts [V] int32: the connected part of each vertex. open_vertices [N]: the ends of edges that are not shared by exactly two
    triangles, once in each direction."""

    components: int
    parts: np.ndarray
    open_vertices: np.ndarray

    @property
    def watertight(self) -> bool:
        return self.components > 0 and not len(self.open_vertices)


def measure(faces: np.ndarray, vertices: int) -> Topology:
    """The topology of the faces [F, 3] over so many vertices; a vertex without faces is a part of its own."""
    starts, ends = faces.reshape(-1), faces[:, [1, 2, 0]].reshape(-1)
    uses = coo_array((np.ones(len(starts), np.int32), (starts, ends)), shape=(vertices, vertices)).tocsr()
    parts, labels = connected_components(uses, directed=True, connection="weak")
    back = uses.T.tocsr()
    uses.sort_indices()
    wrong = (uses.data != 1).any() or not (
        np.array_equal(uses.indptr, back.indptr) and np.array_equal(uses.indices, back.indices)
    )
    open_vertices = np.zeros(0, np.int64)
    if wrong:
        difference = (uses - back).tocoo()
        twice = uses.tocoo()
        twice = twice.row[twice.data > 1], twice.col[twice.data > 1]
        unpaired = difference.data != 0
        open_vertices = np.unique(np.concatenate([difference.row[unpaired], difference.col[unpaired], *twice]))
    return Topology(int(parts), labels.astype(np.int32), open_vertices)

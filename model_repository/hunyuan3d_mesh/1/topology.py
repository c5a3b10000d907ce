"""The connected parts of a mesh, and whether it is closed."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import coo_array, csr_array
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
    rising = starts < ends
    up, down = _uses(starts[rising], ends[rising], vertices), _uses(ends[~rising], starts[~rising], vertices)
    closed = all(np.array_equal(getattr(up, part), getattr(down, part)) for part in ("indptr", "indices", "data"))
    if closed and (up.data == 1).all():
        parts, labels = connected_components(up, directed=False)
        return Topology(int(parts), labels.astype(np.int32), np.zeros(0, np.int32))
    parts, labels = connected_components(up + down, directed=False)
    different, often = (up - down).tocoo(), (up + down > 2).tocoo()
    unpaired = different.data != 0
    ends_of_open = [different.row[unpaired], different.col[unpaired], often.row, often.col]
    return Topology(int(parts), labels.astype(np.int32), np.unique(np.concatenate(ends_of_open)).astype(np.int32))


def _uses(lower: np.ndarray, higher: np.ndarray, vertices: int) -> csr_array:
    """How often each edge is used in one direction, [vertices, vertices]."""
    return coo_array((np.ones(len(lower), np.int32), (lower, higher)), shape=(vertices, vertices)).tocsr()

"""Marching cubes over the mixed cells of the finest level, with the triangles of scikit-image's `marching_cubes` (Lewiner).

The signs of a cell's corners decide its triangles, except in cells where they allow several ways to join them. scikit-image is
asked once for the triangles of each arrangement of signs, and for each cell of the other kind by its values. All cells stand
apart from each other there, so that the edge of every vertex is known. Vertices on edges are computed here, from the values and
with scikit-image's formula, so that cells that share an edge share the vertex.

Axes: C cells, E the 13 places of vertices in a cell: 12 edges and the middle.
"""

from __future__ import annotations

import functools

import numpy as np
import words
from bricks import EDGE, LOCAL, SIZE, Bricks
from skimage.measure import marching_cubes
from words import CORNERS, ONES

_EPSILON = float(np.spacing(1.0))  # keeps scikit-image's weights finite
_STEPS = np.array([4, 2, 1])  # from an offset of 0 or 1 along each axis to a corner's number
_HALO = 9  # points of a brick along an axis, with the first ones of the next brick
_MIDDLE = 12
# Edge 4 * axis + i runs along the axis from corner _LOW[edge] to _HIGH[edge].
_LOW = np.array([c for axis in range(3) for c in range(8) if not CORNERS[c][axis]])
_SIDES = np.array([[c for c in range(8) if CORNERS[c][axis] == value] for axis in range(3) for value in (0, 1)])
_EDGE_AT = np.full((3, 8), -1)
_EDGE_AT[np.arange(12) // 4, _LOW] = np.arange(12)
_HALO_STEPS = np.array([_HALO**2, _HALO, 1])
_PLACE_IN_HALO = LOCAL @ _HALO_STEPS


def triangles(bricks: Bricks, *, closed: bool) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Vertices [V, 3] float32 in fine grid indices, faces [F, 3] int32, the number of cells, and whether the box closed it."""
    rows = np.flatnonzero(bricks.mixed[: bricks.count].any(axis=(1, 2)))
    corners = list(words.corners(bricks.flags, bricks.neighbours(rows)))
    cells, signs = _cells(bricks, rows, corners)
    virtual = _virtual(bricks, bricks.grid(cells), 1)
    if not closed:
        cells, signs = cells[~virtual], signs[~virtual]
    lows, axes = _crossing_edges(bricks, rows, corners, closed=closed)
    del corners
    faces, middles = _faces(bricks, _vertex_numbers(bricks, lows, axes), cells, signs, len(lows))
    vertices = np.concatenate([_on_edges(bricks, lows, axes), middles])
    vertices = np.clip(vertices, 0, bricks.resolution).astype(np.float32)
    return vertices, faces, len(cells), closed and bool(virtual.any())


def in_box(vertices: np.ndarray, resolution: int, bounds: float) -> np.ndarray:
    """Fine grid indices [V, 3] as coordinates in the box, float32."""
    return (vertices.astype(np.float64) * (2 * bounds / resolution) - bounds).astype(np.float32)


def _cells(bricks: Bricks, rows: np.ndarray, corners: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The addresses [C] of the mixed cells in the bricks `rows`, and the signs [C] uint8 of their corners, a bit each."""
    signs = np.zeros((len(rows), EDGE, EDGE), np.uint64)
    for corner, flags in enumerate(corners):
        signs |= (flags & ONES) << np.uint64(corner)
    mixed = bricks.mixed[rows]
    return words.addresses(mixed, rows), signs.view(np.uint8)[mixed.view(bool)]


def _virtual(bricks: Bricks, grid: np.ndarray, reach: int | np.ndarray) -> np.ndarray:
    """Whether one of the points from `grid` [N, 3] to `grid + reach` lies outside the box."""
    return ((grid == 0) | (grid + reach > bricks.resolution + 1)).any(axis=1)


def _crossing_edges(
    bricks: Bricks, rows: np.ndarray, corners: list[np.ndarray], *, closed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The addresses [V] of the lower ends of the edges that the surface crosses, and the edges' axes [V], in rising order."""
    lows = [words.addresses(words.both(corners[0] | corners[step]), rows) for step in _STEPS]
    axes = np.repeat(np.arange(3), [len(low) for low in lows])
    addresses = np.concatenate(lows)
    if not closed:
        real = ~_virtual(bricks, bricks.grid(addresses), np.eye(3, dtype=np.int32)[axes])
        addresses, axes = addresses[real], axes[real]
    return addresses, axes


def _on_edges(bricks: Bricks, lows: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Where the surface crosses edges: [V, 3] float64, in fine grid indices."""
    vertices = bricks.grid(lows).astype(np.float64) - 1
    steps = np.eye(3, dtype=np.int64)
    highs = np.concatenate([bricks.further(lows[axes == axis], steps[axis]) for axis in range(3)])
    low, high = (1 / (_EPSILON + np.abs(_values(bricks, ends))) for ends in (lows, highs))
    vertices[np.arange(len(lows)), axes] += high / (low + high)
    return vertices


def _values(bricks: Bricks, addresses: np.ndarray) -> np.ndarray:
    """The field's values above the level, float64."""
    return bricks.values.reshape(-1)[addresses].astype(np.float64) - bricks.level


def _vertex_numbers(bricks: Bricks, lows: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vertex on the edge that runs along an axis from a point of a brick or of its upper border: [3, used, 729] int32.

    Only bricks with mixed cells have a place there; the place [bricks] of others is the unused first one.
    """
    used = bricks.mixed[: bricks.count].any(axis=(1, 2))
    slots = np.where(used, np.cumsum(used), 0)
    numbers = np.zeros((3, int(used.sum()) + 1, _HALO**3), np.int32)
    vertex = np.arange(len(lows), dtype=np.int32)
    brick, local = lows >> 9, LOCAL[lows & (SIZE - 1)]
    numbers[axes, slots[brick], local @ _HALO_STEPS] = vertex
    for side in CORNERS[1:]:
        own = np.flatnonzero((local[:, side == 1] == 0).all(axis=1))  # the brick before has these points in its border
        before = bricks.rows(bricks.origins[brick[own]] - side)
        numbers[axes[own], slots[before], (local[own] + EDGE * side) @ _HALO_STEPS] = vertex[own]
    return numbers, slots


def _faces(
    bricks: Bricks, numbers: tuple[np.ndarray, np.ndarray], cells: np.ndarray, signs: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The triangles [F, 3] of all cells, and the vertices [M, 3] inside of cells, which are numbered from `first` on."""
    unclear = _UNCLEAR[signs]
    faces = _clear_faces(numbers, cells[~unclear], signs[~unclear])
    if not unclear.any():
        return np.concatenate(faces), np.zeros((0, 3))
    more, middles = _unclear_faces(bricks, numbers, cells[unclear], first)
    return np.concatenate([*faces, more]), middles


def _offsets(table: np.ndarray) -> np.ndarray:
    """From a cell's place in the table of vertices to those of its edges [12]."""
    offsets = (np.arange(12) // 4) * table[0].size + CORNERS[_LOW] @ _HALO_STEPS
    return offsets.astype(np.int32 if table.size < 2**31 else np.int64)


def _bases(numbers: tuple[np.ndarray, np.ndarray], cells: np.ndarray) -> np.ndarray:
    """The places [C] of cells in the table of vertices."""
    table, slots = numbers
    bases = slots[cells >> 9] * _HALO**3 + _PLACE_IN_HALO[cells & (SIZE - 1)]
    return bases.astype(np.int32 if table.size < 2**31 else np.int64)


def _clear_faces(numbers: tuple[np.ndarray, np.ndarray], cells: np.ndarray, signs: np.ndarray) -> list[np.ndarray]:
    """The triangles, in several arrays [F, 3], of cells whose signs decide them."""
    edges, counts = _table()
    offsets, bases = _offsets(numbers[0])[edges], _bases(numbers, cells)
    faces = []
    for triangle in range(edges.shape[1]):
        here = counts[signs] > triangle
        bases, signs = bases[here], signs[here]
        faces.append(numbers[0].reshape(-1)[bases[:, None] + offsets[signs, triangle]])
    return faces


def _unclear_faces(
    bricks: Bricks, numbers: tuple[np.ndarray, np.ndarray], cells: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The triangles of cells that signs leave open, and the vertices [M, 3] inside of cells, which are numbered from `first`."""
    points = np.stack([bricks.further(cells, corner) for corner in CORNERS], axis=1)
    corners = _values(bricks, points)
    cell, edges = _triangles_of(_distinct(corners, points))
    with_middle = np.unique(cell[(edges == _MIDDLE).any(axis=1)])
    places = _bases(numbers, cells[cell])[:, None] + _offsets(numbers[0])[np.minimum(edges, _MIDDLE - 1)]
    faces = numbers[0].reshape(-1)[places]
    middles = first + np.searchsorted(with_middle, cell)
    faces = np.where(edges == _MIDDLE, middles[:, None], faces).astype(np.int32)
    return faces, bricks.grid(cells[with_middle]) - 1 + _middle(corners[with_middle])


def _middle(corners: np.ndarray) -> np.ndarray:
    """The mean [M, 3] of the corners' places, weighted by how near their values [M, 8] are to the level."""
    weights = 1 / (_EPSILON + np.abs(corners))
    total, place = np.zeros(len(corners)), np.zeros((len(corners), 3))
    for corner in (0, 1, 3, 2, 4, 5, 7, 6):  # scikit-image's order, which decides the last bit
        total += weights[:, corner]
        place += CORNERS[corner] * weights[:, corner, None]
    return place / total[:, None]


def _distinct(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The values [C, 8] as float32, changed in those rare cells where scikit-image's triangles could not be used.

    On a side whose diagonals have one sign each, the larger product of a diagonal's values decides. Where both are equal,
    scikit-image's choice differs between the two cells of that side, and the surface tears: there a tiny share is added to each
    value, which depends on the point [C, 8] alone. Where a value is tiny beside others, a vertex gets so near to a corner that its
    edge could not be told: there that value is enlarged, or all are replaced by their roots, which keeps the order of the products.
    """
    sizes = np.abs(corners)
    largest = sizes.max(axis=1, keepdims=True)
    difference, total = _products(corners)
    unclear_sides = np.abs(difference) < np.inf
    tied = (unclear_sides & (np.abs(difference) <= np.maximum(1e-7 * total, 4 * _EPSILON))).any(axis=1)
    tiny = (sizes < largest * 2.0**-20).any(axis=1)
    units = corners * 0.5 ** np.frexp(largest)[1]  # a power of two, so that the two cells of a side round alike
    units[tied] *= 1 + 2.0**-13 * ((points[tied] * 2654435761 >> 8 & 0xFFFF) / 0xFFFF)
    units = units.astype(np.float32).astype(np.float64)
    signs = np.where(corners > 0, 1, -1)
    enlarged = signs * np.maximum(np.abs(units), 2.0**-18)
    other_order = (unclear_sides & (np.sign(_products(enlarged)[0]) != np.sign(_products(units)[0]))).any(axis=1)
    roots = signs * np.maximum(np.abs(units), 1e-40) ** 0.125
    careful = np.where((tiny & other_order)[:, None], roots, np.where(tiny[:, None], enlarged, units))
    return np.where((tiny | tied)[:, None], careful, corners).astype(np.float32)


def _products(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[C, 6]: the difference of the products of each side's diagonals, infinite where their signs are clear; and the sum."""
    a, b, c, d = np.moveaxis(corners[:, _SIDES], -1, 0)
    unclear = ((a > 0) == (d > 0)) & ((b > 0) == (c > 0)) & ((a > 0) != (b > 0))
    return np.where(unclear, a * d - b * c, np.inf), a * d + b * c


def _triangles_of(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scikit-image's triangles of single cells with the values [C, 8]: the cell [F] and the places [F, 3] of each one's vertices."""
    volume = np.ascontiguousarray(corners, np.float32).reshape(-1, 2, 2)  # each cell has two layers
    mask = np.zeros(volume.shape, bool)
    mask[1::2] = True  # a cell is left out unless its upper corner is True
    points, faces, _, _ = marching_cubes(volume, 0.0, mask=mask, gradient_direction="ascent")
    cell = points[:, 0].astype(np.int64) // 2
    along = (points[:, 1:] > 0) & (points[:, 1:] < 1)
    corner = np.where(along, 0, points[:, 1:] == 1)
    axis = np.where(along[:, 1], 2, np.where(along[:, 0], 1, 0))
    layer = np.where(axis == 0, 0, points[:, 0].astype(np.int64) % 2)
    place = _EDGE_AT[axis, layer * 4 + corner[:, 0] * 2 + corner[:, 1]]
    place[along.all(axis=1)] = _MIDDLE
    return cell[faces[:, 0]], place[faces]


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """The triangles of all arrangements of signs: places [256, 4, 3] of their vertices, and their numbers [256]."""
    clear = np.flatnonzero(~_UNCLEAR[:-1])[1:]
    cell, places = _triangles_of(np.where(_INSIDE[clear], 1.0, -1.0))
    counts = np.zeros(256, np.int64)
    counts[clear] = np.bincount(cell)
    starts = np.cumsum(counts[clear]) - counts[clear]
    table = np.zeros((256, counts.max(), 3), np.int64)
    table[clear[cell], np.arange(len(cell)) - starts[cell]] = places
    return table, counts


def _unclear() -> np.ndarray:
    """[256] bool: arrangements of signs in which two corners of a side or of the cell are cut off from each other.

    These are the ones with a side whose diagonals have one sign each, and those with two corners of one sign across the cell from each
    other whose neighbours have the other sign.
    """
    unclear = np.zeros(256, bool)
    for a, b, c, d in _SIDES:
        unclear |= (_INSIDE[:, a] == _INSIDE[:, d]) & (_INSIDE[:, b] == _INSIDE[:, c]) & (_INSIDE[:, a] != _INSIDE[:, b])
    for corner in range(4):
        pair = _INSIDE[:, corner] == _INSIDE[:, 7 - corner]
        others = np.delete(_INSIDE, [corner, 7 - corner], axis=1)
        unclear |= pair & (others != _INSIDE[:, corner, None]).all(axis=1)
    return unclear


_INSIDE = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)
_UNCLEAR = _unclear()

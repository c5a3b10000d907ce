"""What a surface is compared with: scikit-image's marching cubes on the whole volume."""

from __future__ import annotations

from collections.abc import Callable

import cubes
import numpy as np
from fields import BOUNDS, Field
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes
from surface import Surface, extract


def volume(field: Field, resolution: int) -> np.ndarray:
    """The field's values [R + 1, R + 1, R + 1], one layer at a time."""
    line = np.linspace(-BOUNDS, BOUNDS, resolution + 1).astype(np.float32)
    layer = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    values = np.empty((resolution + 1,) * 3, np.float32)
    for index, x in enumerate(line):
        points = np.concatenate([np.full((len(layer), 1), x, np.float32), layer], axis=1)
        values[index] = field(points).reshape(resolution + 1, resolution + 1)
    return values


def field_of(values: np.ndarray) -> Field:
    """A field that has the given values at the points of the grid."""
    resolution = len(values) - 1

    def field(points: np.ndarray) -> np.ndarray:
        x, y, z = np.rint((points.astype(np.float64) + BOUNDS) * (resolution / (2 * BOUNDS))).astype(int).T
        return values[x, y, z]

    return field


def marching(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices in the box and faces, counter-clockwise from outside; a surface that runs through the box is closed there."""
    resolution = len(values) - 1
    through = any((np.take(values, side, axis) > 0).any() for axis in range(3) for side in (0, -1))
    padded = np.pad(values, 1, constant_values=-1) if through else values
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="ascent")
    vertices = np.clip(vertices - 1 if through else vertices, 0, resolution)
    return cubes.in_box(vertices.astype(np.float32), resolution, BOUNDS), faces


def needed_points(values: np.ndarray) -> int:
    """The distinct corners of cells with corners on both sides; beyond the box, everything is outside."""
    inside = np.pad(values > 0, 1)
    sides = [slice(None, -1), slice(1, None)]
    corners = [(x, y, z) for x in sides for y in sides for z in sides]
    counts = sum(inside[corner].astype(np.uint8) for corner in corners)
    mixed = (counts > 0) & (counts < 8)
    needed = np.zeros(inside.shape, bool)
    for corner in corners:
        needed[corner] |= mixed
    return int(needed[1:-1, 1:-1, 1:-1].sum())


def drive(field: Callable[[np.ndarray], np.ndarray], resolution: int, **options: object) -> Surface:
    """The surface of a field that is a function."""
    asking = extract(resolution, **options)  # type: ignore[arg-type]
    queries = next(asking)
    try:
        while True:
            queries = asking.send(field(queries))
    except StopIteration as end:
        return end.value


def assert_equal(vertices: np.ndarray, faces: np.ndarray, surface: Surface) -> None:
    """The surface has these vertices, up to the last bit of their coordinates, and these faces, whatever their order."""
    assert surface.vertices.shape == vertices.shape and surface.faces.shape == faces.shape
    places, ours = np.unique(surface.vertices, axis=0, return_inverse=True)  # where values are 0, vertices share a place
    distances, theirs = cKDTree(places).query(vertices)
    assert distances.max() < 3e-7
    np.testing.assert_array_equal(np.sort(theirs), np.sort(ours.reshape(-1)))
    np.testing.assert_array_equal(_in_order(theirs[faces]), _in_order(ours.reshape(-1)[surface.faces]))


def _in_order(faces: np.ndarray) -> np.ndarray:
    """The faces [F, 3], each from its smallest corner on, which keeps the orientation, in rising order."""
    first = faces.argmin(axis=1)[:, None]
    turned = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1)
    return turned[np.lexsort(turned.T)]

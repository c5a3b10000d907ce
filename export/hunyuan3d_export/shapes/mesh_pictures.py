"""Shaded pictures of meshes, drawn point by point: no display, no graphics library, the same picture every time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_path
from .meshes import Triangles
from .render import Look, View, shade
from .solids import Array

VIEW = View(azimuth=-55.0, elevation=28.0, zoom=0.98)
_POINTS_PER_PIXEL = 5.0  # so many points of each triangle are drawn that no hole is left
_SAMPLES = 2  # along each side of a pixel
_BACKGROUND = 1.0
_MOST_COLUMNS = 8
_CELL_INCHES, _TITLE_INCHES = 1.6, 0.25
_WALK = np.array([0.7548776662466927, 0.5698402909980532])  # the steps of a sequence that fills a square evenly


def shaded(mesh: Triangles, size: int, *, view: View = VIEW, look: Look | None = None) -> NDArray[np.uint8]:
    """A picture [size, size, 3] of a mesh on white, seen in parallel projection from the direction of `view`."""
    axes, side = view.axes(), size * _SAMPLES
    points, normals = _spread(mesh, (side * view.zoom / 2) ** 2)
    place = points @ axes.T
    columns = np.floor((1 + view.zoom * place[:, 0]) * side / 2).astype(int)
    rows = np.floor((1 - view.zoom * place[:, 1]) * side / 2).astype(int)
    inside = (columns >= 0) & (columns < side) & (rows >= 0) & (rows < side)
    order = np.flatnonzero(inside)[np.argsort(place[inside, 2], kind="stable")]  # the nearest is written last
    canvas = np.full((side, side, 3), _BACKGROUND)
    towards = normals[order] @ axes.T
    towards *= np.where(towards[:, 2:] < 0, -1.0, 1.0)  # interpolated normals may point a little away
    canvas[rows[order], columns[order]] = shade(towards, look or Look(colour=(0.95, 0.72, 0.42)))
    mean = canvas.reshape(size, _SAMPLES, size, _SAMPLES, 3).mean((1, 3))
    return (255 * mean).round().astype(np.uint8)


def _spread(mesh: Triangles, pixels_per_area: float) -> tuple[Array, Array]:
    """Points on the triangles, as many as their size in the picture needs, and the interpolated normals there."""
    corners = mesh.vertices[mesh.faces]  # [F, 3, 3]
    facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(mesh.vertices)
    for corner in range(3):
        np.add.at(normals, mesh.faces[:, corner], facing)
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-30)
    area = np.linalg.norm(facing, axis=-1) / 2
    counts = np.ceil(area * pixels_per_area * _POINTS_PER_PIXEL).astype(int) + 3
    face = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    u, v = ((number[:, None] + 0.5) * _WALK % 1.0).T
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    weights = np.stack([1 - u - v, u, v], axis=-1)[..., None]  # [N, 3, 1]
    interpolated = (weights * normals[mesh.faces[face]]).sum(1)
    interpolated /= np.maximum(np.linalg.norm(interpolated, axis=-1, keepdims=True), 1e-30)
    return (weights * corners[face]).sum(1), interpolated


def save_meshes(
    meshes: Mapping[str, Triangles], path: Path, *, pixels: int = 200, titles: Mapping[str, str] | None = None
) -> None:
    """A PNG with a shaded picture of each mesh. `meshes`: title -> mesh. `titles` replaces some of the titles.

    Raises ImportError without matplotlib, ValueError for no meshes.
    """
    if not meshes:
        raise ValueError("meshes must hold at least one mesh, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_MOST_COLUMNS, len(meshes), math.ceil(math.sqrt(1.4 * len(meshes))))
    rows = math.ceil(len(meshes) / columns)
    height = (_CELL_INCHES + _TITLE_INCHES) * rows
    figure = Figure(figsize=(_CELL_INCHES * columns, height), dpi=pixels / _CELL_INCHES)
    FigureCanvasAgg(figure)  # needs no display
    for index, (name, mesh) in enumerate(meshes.items()):
        share = _TITLE_INCHES / (_CELL_INCHES + _TITLE_INCHES)
        bottom = 1 - (index // columns + 1) / rows
        axes: Any = figure.add_axes((index % columns / columns, bottom, 1 / columns, (1 - share) / rows))
        axes.imshow(shaded(mesh, pixels), interpolation="none")
        axes.set_title((titles or {}).get(name, name), fontsize=7, pad=3)
        axes.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})

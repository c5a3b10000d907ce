"""Clouds of points as files for people to look at: a PNG with a grid of 3-D plots, and PLY."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path
from .codec import Floats

_MOST_COLUMNS, _COLOURS = 8, 24


def save_grid(clouds: Mapping[str, Floats], path: Path, *, titles: Mapping[str, str] | None = None) -> None:
    """A PNG with a 3-D plot for each cloud. `clouds`: title -> points [N, 3]. `titles` replaces some of the titles.

    Raises ImportError without matplotlib and ValueError for no clouds.
    """
    if not clouds:
        raise ValueError("clouds must hold at least one cloud, got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    columns = min(_MOST_COLUMNS, math.ceil(math.sqrt(1.4 * len(clouds))))
    rows = math.ceil(len(clouds) / columns)
    figure = Figure(figsize=(1.6 * columns, 1.6 * rows), dpi=min(240, max(80, 480 // columns)))
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib does not type its methods
    for index, (name, points) in enumerate(clouds.items()):
        axes: Any = figure.add_subplot(rows, columns, index + 1, projection="3d")
        _scatter(axes, np.asarray(points, np.float64))
        axes.set_title((titles or {}).get(name, name), fontsize=7, pad=-2)
    figure.subplots_adjust(left=0.0, right=1.0, bottom=0.0, top=0.97, wspace=0.0, hspace=0.06)
    canvas.draw()
    # Antialiased points in full colour compress badly. A small palette makes the file four times smaller.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(_COLOURS)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png", optimize=True)


def _scatter(axes: Any, points: Floats) -> None:
    axes.scatter(*points.T, c=points[:, 2], cmap="viridis", s=2.5, linewidths=0)
    axes.set_box_aspect((1, 1, 1), zoom=1.5)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axes.view_init(elev=25, azim=-60)
    axes.set_axis_off()


def save_ply(points: Floats, path: Path) -> None:
    """Points [N, 3] as a binary little-endian PLY of float32 vertices."""
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    with atomic_path(path) as temporary:
        temporary.write_bytes(header.encode() + np.ascontiguousarray(points, "<f4").tobytes())

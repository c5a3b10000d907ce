"""Clouds of points as files for people to look at: a PNG with a grid of 3-D plots, and PLY."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path
from .codec import Floats

_MOST_COLUMNS, _COLOURS = 8, 24
_CELL_INCHES, _TITLE_INCHES = 1.6, 0.25  # of each plot, and of the strip above the first row for its titles
_TITLE_LETTERS = 30  # as many as are surely no wider than a plot
FORMATS: Mapping[str, str] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}  # ending of the file -> Pillow's name


def save_grid(clouds: Mapping[str, Floats], path: Path, *, titles: Mapping[str, str] | None = None) -> None:
    """A PNG or JPEG with a 3-D plot for each cloud. `clouds`: title -> points [N, 3]. `titles` replaces some of the titles.

    Raises ImportError without matplotlib, ValueError for no clouds and for a file of another ending.
    """
    if not clouds:
        raise ValueError("clouds must hold at least one cloud, got none")
    kind = picture_format(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    columns = min(_MOST_COLUMNS, len(clouds), math.ceil(math.sqrt(1.4 * len(clouds))))
    rows = math.ceil(len(clouds) / columns)
    height = _CELL_INCHES * rows + _TITLE_INCHES
    figure = Figure(figsize=(_CELL_INCHES * columns, height), dpi=min(240, max(80, 480 // columns)))
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib does not type its methods
    for index, (name, points) in enumerate(clouds.items()):
        axes: Any = figure.add_subplot(rows, columns, index + 1, projection="3d")
        _scatter(axes, np.asarray(points, np.float64))
        title = textwrap.shorten((titles or {}).get(name, name), _TITLE_LETTERS, placeholder=" ...")
        axes.set_title(title, fontsize=7, pad=-2)
    figure.subplots_adjust(left=0.0, right=1.0, bottom=0.0, top=1 - _TITLE_INCHES / height, wspace=0.0, hspace=0.06)
    canvas.draw()
    # Antialiased points in full colour compress badly. A small palette makes the file four times smaller.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with atomic_path(path) as temporary:
        (picture.quantize(_COLOURS) if kind == "png" else picture).save(temporary, format=kind, optimize=True)


def picture_format(path: Path) -> str:
    """Pillow's name for the format of a picture, which the file's ending tells. Raises ValueError for another ending."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture must be a {' or '.join(FORMATS)} file, got {path}")
    return FORMATS[path.suffix.lower()]


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

"""The end of `make demo`: latents become a GLB file on the server, which is compared with torch and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hunyuan3d_client import Client, Mesh

from ..shapevae.weights import ShapeVAESource

RESOLUTION = 48
TOLERANCE = 0.01  # of a cell, between the vertices of the served mesh and those of torch's field
_BOUNDS = 1.01
_POINTS = 8192  # of one evaluation by torch


def decode(client: Client, latents: NDArray[np.float32], path: Path) -> Mesh:
    """Decodes latents [1, L, 64] and writes the GLB file.

    Every point of the grid is evaluated and every part is kept, because the field of random weights is full of specks that lie
    between the points of the coarse grid.
    """
    mesh = client.decode(latents, resolution=RESOLUTION, format="glb", method="dense", keep=0, timeout_s=600)
    mesh.save(path)
    return mesh


def error_in_cells(mesh: Mesh, latents: NDArray[np.float32], weights: ShapeVAESource) -> float:
    """The largest distance, in cells, between the vertices of the served mesh and those of torch's field, in both directions.

    torch's field becomes vertices by scikit-image's marching cubes, which leaves a surface open where it runs through the box. The
    server closes it there: its vertices on the box have no counterpart and are left out.

    Raises ImportError without scikit-image, scipy or trimesh.
    """
    from scipy.spatial import cKDTree
    from skimage.measure import marching_cubes

    decoder = weights.load(torch.float32)
    line = torch.linspace(-_BOUNDS, _BOUNDS, RESOLUTION + 1)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1).reshape(1, -1, 3)
    with torch.no_grad():
        shape = decoder.keys_values(torch.tensor(latents) / weights.serving().scale_factor)
        field = torch.cat([decoder.field(part, *shape) for part in points.split(_POINTS, dim=1)], dim=1)
    vertices, *_ = marching_cubes(field.numpy().reshape((RESOLUTION + 1,) * 3), 0.0)
    cell = 2 * _BOUNDS / RESOLUTION
    expected, served = vertices * cell - _BOUNDS, mesh.to_trimesh().vertices
    inner = served[np.abs(served).max(axis=1) < _BOUNDS - TOLERANCE * cell]
    largest = max(cKDTree(one).query(other)[0].max() for one, other in ((served, expected), (expected, inner)))
    return float(largest / cell)


def draw(mesh: Mesh, path: Path) -> None:
    """A PNG picture of the mesh, shaded by the directions of its faces. Raises ImportError without matplotlib or trimesh."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    shape = mesh.to_trimesh()
    figure = Figure(figsize=(6, 6))
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.add_subplot(projection="3d")
    light = np.clip(0.6 + 0.4 * shape.face_normals @ np.array([0.3, 0.8, 0.5]), 0, 1)
    colours = light[:, None] * np.array([0.55, 0.65, 0.85])
    axes.add_collection3d(Poly3DCollection(shape.triangles[:, :, [0, 2, 1]], facecolors=colours))
    for limits in (axes.set_xlim, axes.set_ylim, axes.set_zlim):
        limits(-_BOUNDS, _BOUNDS)
    axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})

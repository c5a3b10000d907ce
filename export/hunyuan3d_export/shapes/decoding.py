"""Latents -> a mesh in this process, by any runner of the shape decoder's two graphs: what a server's meshes are compared with.

Needs scikit-image. The server has a way of its own to find the surface, so that the two share no code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hunyuan3d_client import Client, contract

from ..runners import Runner
from .meshes import BOUNDS, Decode, Latents, Triangles
from .solids import Array

Field = Callable[[Array], NDArray[np.float32]]  # points [N, 3] -> values [N]

COARSE = 32  # cells along each side of the first grid; the field of `shapes` changes within two of them around a surface
_SATURATED = 0.98
_POINTS = contract.POINT_BUCKETS[-1]  # of one evaluation


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Calls the graphs of a runner and finds the surface of their field; resolution is a multiple of COARSE."""

    runner: Runner
    resolution: int

    def __call__(self, latents: Latents) -> Triangles | None:
        with torch.inference_mode():
            shape = self.runner.run(contract.VAE, {"latents": torch.tensor(latents[None])})
            return mesh_of(lambda points: self._field(points, shape), self.resolution)

    def _field(self, points: Array, shape: dict[str, torch.Tensor]) -> NDArray[np.float32]:
        parts = torch.from_numpy(points.astype(np.float32)).split(_POINTS)
        found = [self.runner.run(contract.FIELD, {"queries": part[None], **shape})["field"][0] for part in parts]
        values: NDArray[np.float32] = torch.cat(found).numpy()
        return values


def mesh_of(field: Field, resolution: int) -> Triangles | None:
    """The surface where the field is 0, by scikit-image's marching cubes; cells that no surface is near are not evaluated.

    A cell of the first grid counts as near when one of its corners is not saturated, or when its corners differ in sign.

    Raises ImportError without scikit-image, ValueError for a resolution that is no multiple of COARSE.
    """
    from skimage.measure import marching_cubes

    if resolution < COARSE or resolution % COARSE:
        raise ValueError(f"resolution must be a multiple of {COARSE}, got {resolution}")
    ratio = resolution // COARSE
    coarse = field(_points(np.indices((COARSE + 1,) * 3).reshape(3, -1).T, COARSE)).reshape((COARSE + 1,) * 3)
    if not np.isfinite(coarse).all():
        return None
    near = np.kron(_near(coarse), np.ones((ratio,) * 3, bool))  # by cells of the fine grid
    wanted = np.zeros((resolution + 1,) * 3, bool)
    for corner in np.ndindex(2, 2, 2):
        wanted[tuple(slice(start, start + resolution) for start in corner)] |= near
    cells = np.minimum(np.arange(resolution + 1) // ratio, COARSE)
    values = coarse[np.ix_(cells, cells, cells)]
    values[wanted] = field(_points(np.argwhere(wanted), resolution))
    if not np.isfinite(values).all() or not values.min() < 0 < values.max():
        return None
    # The box is closed, as the server closes it. Positive inside turns scikit-image's faces inward, so they are reversed.
    vertices, faces, *_ = marching_cubes(np.pad(values, 1, constant_values=-1.0), 0.0)
    return Triangles(_points(vertices - 1, resolution), faces[:, ::-1].astype(np.int64))


def _points(places: NDArray[Any], resolution: int) -> Array:
    """Places on the grid, [N, 3] from 0 to `resolution`, -> points in the cube of the field."""
    points: Array = places * (2 * BOUNDS / resolution) - BOUNDS
    return points


def _near(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The cells of a grid of values near whose corners the surface may be."""
    inner = [values[tuple(slice(start, start + len(values) - 1) for start in corner)] for corner in np.ndindex(2, 2, 2)]
    corners = np.stack(inner)
    unsaturated = (np.abs(corners) < _SATURATED).any(0)
    return np.asarray(unsaturated | ((corners > 0).any(0) & (corners <= 0).any(0)))


def served_decoder(client: Client, *, resolution: int, timeout_s: float = 600) -> Decode:
    """A decoder that calls the server's model hunyuan3d_mesh. Raises ImportError without trimesh."""

    def decode(latents: Latents) -> Triangles | None:
        mesh = client.decode(latents[None], resolution=resolution, format="ply", timeout_s=timeout_s)
        shape = mesh.to_trimesh()
        return Triangles(np.asarray(shape.vertices, np.float64), np.asarray(shape.faces, np.int64))

    return decode

"""Analytic fields, positive inside, cut off at +-1 as the network's are, and scikit-image's dense marching cubes on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray], np.ndarray]
BOUNDS = 1.01
_BAND = 0.05  # the distance at which the values are cut off


def _clip(distance: np.ndarray) -> np.ndarray:
    return np.clip(-distance / _BAND, -1, 1).astype(np.float32)


def _box(points: np.ndarray, centre: tuple[float, ...], half: tuple[float, ...]) -> np.ndarray:
    reach = np.abs(points - np.array(centre)) - np.array(half)
    return np.linalg.norm(np.maximum(reach, 0), axis=1) + np.minimum(reach.max(axis=1), 0)


def sphere(points: np.ndarray) -> np.ndarray:
    return _clip(np.linalg.norm(points - np.array([0.05, -0.02, 0.01]), axis=1) - 0.7)


def box(points: np.ndarray) -> np.ndarray:
    return _clip(_box(points, (0.03, 0, -0.1), (0.5, 0.4, 0.3)))


def torus(points: np.ndarray) -> np.ndarray:
    ring = np.hypot(points[:, 0], points[:, 2]) - 0.6
    return _clip(np.hypot(ring, points[:, 1]) - 0.15)


def gyroid(points: np.ndarray) -> np.ndarray:
    """A shell of the gyroid in a ball."""
    x, y, z = 6 * points.T.astype(np.float64)
    waves = np.sin(x) * np.cos(y) + np.sin(y) * np.cos(z) + np.sin(z) * np.cos(x)
    return _clip(np.maximum(np.abs(waves) / 9 - 0.04, np.linalg.norm(points, axis=1) - 0.8))


def chair(resolution: int) -> Field:
    """A seat, a back, four legs, and eight round rods that are one and a half cells thick at this resolution."""
    thin = 0.75 * 2 * BOUNDS / resolution  # the radius: a grid point lies in each layer of a rod
    parts = [((0, -0.05, 0), (0.45, 0.04, 0.45)), ((0, 0.45, -0.42), (0.45, 0.5, 0.03))]
    parts += [((x, -0.5, z), (0.04, 0.45, 0.04)) for x in (-0.4, 0.4) for z in (-0.4, 0.4)]
    rods = [(axis, height, side) for axis in (0, 2) for height in (-0.3, -0.6) for side in (-0.4, 0.4)]

    def distances(points: np.ndarray) -> np.ndarray:
        distance = np.min([_box(points, centre, half) for centre, half in parts], axis=0)
        for axis, height, side in rods:
            across = np.hypot(points[:, 1] - height, points[:, 2 - axis] - side)
            distance = np.minimum(distance, np.maximum(across - thin, np.abs(points[:, axis]) - 0.4))
        return distance

    def field(points: np.ndarray) -> np.ndarray:
        near = (np.abs(points[:, [0, 2]]) < 0.45 + 2 * _BAND).all(axis=1)  # the other values are cut off
        values = np.full(len(points), -1, np.float32)
        values[near] = _clip(distances(points[near].astype(np.float64)))
        return values

    return field


def waves(seed: int) -> Field:
    """A random sum of a few low frequencies, which runs through the box."""
    generator = np.random.default_rng(seed)
    directions, phases = generator.normal(size=(3, 12)) * 3, generator.uniform(0, 6.3, 12)

    def field(points: np.ndarray) -> np.ndarray:
        return _clip(np.cos(points.astype(np.float64) @ directions + phases).sum(axis=1) * 0.02)

    return field

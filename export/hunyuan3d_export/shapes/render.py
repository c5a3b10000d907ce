"""Pictures of solids by sphere tracing: a ray walks on by its distance to the surface until it meets the surface.

Needs NumPy only. The same seed gives the same picture on every machine, up to the rounding of the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .prompts import solid
from .solids import Array, Pair, Surface, signed_distance

Distance = Callable[[Array], Array]  # points [N, 3] -> signed distance [N], positive inside

_STEPS = 96
_NEAR_ENOUGH = 1e-3
_RELUCTANCE = 0.9  # a step's share of the distance, because sampled distances are not exact
_NORMAL_STEP = 2e-3
_BALL = 1.02  # the solids lie within this radius
_GRID = 1.05  # half the side of the cube of a grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A camera that looks at the origin. Angles in degrees; the z axis is up. distance: to the origin.

    zoom: 1 lets a ball of radius 1 fill the picture's height.
    """

    azimuth: float = 35.0
    elevation: float = 25.0
    roll: float = 0.0
    distance: float = 4.0
    zoom: float = 0.9

    def axes(self) -> Array:
        """The camera's directions to the right, up and backward, [3, 3]."""
        azimuth, elevation, roll = np.radians([self.azimuth, self.elevation, self.roll])
        back = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
        right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
        up = np.cross(back, right)
        turned = np.cos(roll) * right + np.sin(roll) * up, np.cos(roll) * up - np.sin(roll) * right
        return np.stack([*turned, back])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """Colours in [0, 1] and the light. light: a direction in the camera's axes. background None: the picture has alpha."""

    colour: tuple[float, float, float] = (0.85, 0.55, 0.25)
    light: tuple[float, float, float] = (-0.4, 0.7, 0.6)
    ambient: float = 0.3
    background: tuple[float, float, float] | None = None


def distance_of(prompt: str) -> Distance:
    """The exact signed distance to a prompt's solid."""
    surface = solid(prompt)
    return lambda points: signed_distance(surface, points)


def gridded(prompt: str, cells: int = 96) -> Distance:
    """A solid's signed distance from a grid of its exact values, interpolated linearly: quick, with rounded edges.

    The grid holds one copy of a pair.
    """
    surface = solid(prompt)
    if isinstance(surface, Pair):
        single, size, offset = _grid(surface.single, cells), surface.size, surface.offset
        shift = np.array([offset, 0.0, 0.0])
        return lambda points: size * np.maximum(single((points - shift) / size), single((points + shift) / size))
    return _grid(surface, cells)


def _grid(surface: Surface, cells: int) -> Distance:
    line = np.linspace(-_GRID, _GRID, cells + 1)
    points = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1)
    values = np.stack([signed_distance(surface, plane) for plane in points])
    flat, side = values.reshape(-1), cells + 1

    def interpolated(points: Array) -> Array:
        inner = points.clip(-_GRID, _GRID)
        place = (inner + _GRID) * (cells / (2 * _GRID))
        low = np.minimum(place.astype(np.int64), cells - 1)
        x, y, z = (place - low).T
        first = (low[:, 0] * side + low[:, 1]) * side + low[:, 2]
        along_z = [
            flat[first + corner] * (1 - z) + flat[first + corner + 1] * z for corner in (0, side, side**2, side**2 + side)
        ]
        found: Array = (along_z[0] * (1 - y) + along_z[1] * y) * (1 - x) + (along_z[2] * (1 - y) + along_z[3] * y) * x
        beyond = np.linalg.norm(points - inner, axis=-1)
        # Beyond the grid, a distance that is surely not too long, because a ray must not step over the surface.
        return np.minimum(found + beyond, np.where(beyond > 0, -beyond, np.inf))

    return interpolated


def trace(distance: Distance, view: View, size: int) -> tuple[NDArray[np.bool_], Array]:
    """Whether each pixel shows the solid [size, size], and the normals there in the camera's axes [size, size, 3]."""
    axes = view.axes()
    origin = view.distance * axes[2]
    line = (np.arange(size) + 0.5) / size * 2 - 1
    right, up = np.meshgrid(line, -line)
    reach = np.tan(np.arcsin(min(1.0, 1 / view.distance))) / view.zoom
    directions = np.stack([reach * right, reach * up, -np.ones_like(right)], axis=-1).reshape(-1, 3) @ axes
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    middle = -directions @ origin  # the way to the point that is nearest to the origin
    half = np.sqrt(np.maximum(_BALL**2 - (view.distance**2 - middle**2), 0.0))
    active = np.flatnonzero(half > 0)
    way, shown = middle - half, np.zeros(len(directions), bool)
    for _ in range(_STEPS):
        outside = -distance(origin + way[active, None] * directions[active])
        shown[active] = outside < _NEAR_ENOUGH
        way[active] += _RELUCTANCE * np.maximum(outside, 0.0)
        active = active[(outside >= _NEAR_ENOUGH) & (way[active] < (middle + half)[active])]
        if not len(active):
            break
    shown[active] = False
    normals = np.zeros_like(directions)
    normals[shown] = _normals(distance, origin + way[shown, None] * directions[shown]) @ axes.T
    return shown.reshape(size, size), normals.reshape(size, size, 3)


def _normals(distance: Distance, points: Array) -> Array:
    """Unit vectors [N, 3] in the direction in which the signed distance falls."""
    steps = _NORMAL_STEP * np.eye(3)
    slope = np.stack([distance(points - step) - distance(points + step) for step in steps], axis=-1)
    return slope / np.maximum(np.linalg.norm(slope, axis=-1, keepdims=True), 1e-9)


def shade(normals: Array, look: Look) -> Array:
    """Colours [..., 3] in [0, 1] of normals [..., 3] in the camera's axes: Lambert's law and a weak light from the camera."""
    light = np.array(look.light) / np.linalg.norm(look.light)
    lambert = np.maximum(normals @ light, 0.0)
    facing = np.maximum(normals[..., 2], 0.0)
    brightness = look.ambient + (1 - look.ambient) * (0.8 * lambert + 0.2 * facing)
    return np.clip(brightness[..., None] * np.array(look.colour), 0.0, 1.0)


def picture(distance: Distance, view: View, look: Look, size: int, *, samples: int = 2) -> NDArray[np.uint8]:
    """A picture [size, size, 4 (RGBA) or 3 (with a background)]; each pixel is the mean of samples x samples rays."""
    shown, normals = trace(distance, view, size * samples)
    colours = shade(normals, look) * shown[..., None]
    cover = _binned(shown[..., None].astype(float), samples)
    mean = _binned(colours, samples)
    if look.background is None:
        mean = np.concatenate([mean / np.maximum(cover, 1e-9), cover], axis=-1)
    else:
        mean = mean + (1 - cover) * np.array(look.background)
    return (255 * mean).round().astype(np.uint8)


def _binned(values: Array, samples: int) -> Array:
    """The means of squares of samples x samples pixels."""
    height, width, channels = values.shape
    return values.reshape(height // samples, samples, width // samples, samples, channels).mean((1, 3))


def random_view(random: np.random.Generator) -> View:
    """A camera as people hold one: from any side, from a little to far above, nearly upright."""
    return View(
        azimuth=float(random.uniform(0, 360)),
        elevation=float(random.uniform(12, 55)),
        roll=float(random.normal(0, 4)),
        distance=float(random.uniform(2.6, 7)),
        zoom=float(random.uniform(0.75, 0.95)),
    )


def random_look(random: np.random.Generator, *, alpha: bool) -> Look:
    """A colour, a light from the front or above, and with alpha=False a background that differs from the colour."""
    colour = random.uniform(0.15, 1.0, 3)
    background = random.uniform(0, 1, 3)
    while np.abs(background - colour).sum() < 0.6:
        background = random.uniform(0, 1, 3)
    light = random.standard_normal(3) + [0.0, 0.8, 0.8]
    light[2] = max(light[2], 0.1)
    red, green, blue = (float(value) for value in colour)
    return Look(
        colour=(red, green, blue),
        light=(float(light[0]), float(light[1]), float(light[2])),
        ambient=float(random.uniform(0.15, 0.45)),
        background=None if alpha else (float(background[0]), float(background[1]), float(background[2])),
    )

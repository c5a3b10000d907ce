"""The vocabulary: nouns, attributes that can be combined, and the combinations that the checkpoint was trained on."""

from __future__ import annotations

import functools

import numpy as np

from .solids import Array, HelixTube, Pair, Polyhedron, Revolution, Surface, normalised

# The factor of x and y, then the factor of z. The stretched solid is scaled back to bounding radius 1.
STRETCHES = {"flat": (1.0, 0.45), "tall": (0.5, 1.0)}
# Prompts are English, so "two" is followed by a plural. The model sees the plural as a different word.
PLURALS = {
    "sphere": "spheres",
    "cube": "cubes",
    "cylinder": "cylinders",
    "cone": "cones",
    "torus": "tori",
    "tetrahedron": "tetrahedra",
    "octahedron": "octahedra",
    "helix": "helices",
}
HELD_OUT = ("flat cone", "tall torus", "two octahedra", "two flat spheres", "two tall cubes")


def _arc(start: float, stop: float, segments: int) -> Array:
    angle = np.linspace(start, stop, segments + 1)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _hull(corners: Array) -> Array:
    """The triangles [F, 3, 3] of a small convex polyhedron: each has all corners on one side of its plane."""
    found = []
    for i in range(len(corners)):
        for j in range(i + 1, len(corners)):
            for k in range(j + 1, len(corners)):
                normal = np.cross(corners[j] - corners[i], corners[k] - corners[i])
                side = (corners - corners[i]) @ normal
                if (side <= 1e-9).all() or (side >= -1e-9).all():
                    found.append(corners[[i, j, k]])
    return np.array(found)


def _box() -> Array:
    """The 12 triangles of a cube with corners at +-1."""
    square = np.array([[1.0, -1, -1], [1, 1, -1], [1, 1, 1], [1, -1, 1]])
    faces = [sign * np.roll(square, axis, axis=1) for axis in range(3) for sign in (1, -1)]
    return np.array([face[corner] for face in faces for corner in ([0, 1, 2], [0, 2, 3])])


def _base(noun: str) -> Surface:
    if noun == "sphere":
        profile = _arc(-np.pi / 2, np.pi / 2, 96)
        profile[[0, -1], 0] = 0.0
        return Revolution(profile)
    if noun == "torus":
        return Revolution(np.array([1.0, 0.0]) + 0.4 * _arc(0, 2 * np.pi, 64))
    if noun == "cylinder":
        return Revolution(np.array([[0.0, -1], [1, -1], [1, 1], [0, 1]]))
    if noun == "cone":
        return Revolution(np.array([[0.0, -0.6], [0.8, -0.6], [0, 1]]))
    if noun == "helix":
        return HelixTube(coil=0.65, half_height=0.6, thickness=0.1)
    if noun == "cube":
        return Polyhedron(_box())
    if noun == "octahedron":
        return Polyhedron(_hull(np.concatenate([np.eye(3), -np.eye(3)])))
    base = [[np.cos(a) * 8**0.5 / 3, np.sin(a) * 8**0.5 / 3, -1 / 3] for a in np.pi * np.array([0.5, 7 / 6, 11 / 6])]
    return Polyhedron(_hull(np.array([[0.0, 0.0, 1.0], *base])))


def _all_prompts() -> tuple[str, ...]:
    single = [" ".join(filter(None, (stretch, noun))) for noun in PLURALS for stretch in ("", *STRETCHES)]
    double = [" ".join(filter(None, ("two", stretch, noun))) for noun in PLURALS.values() for stretch in ("", *STRETCHES)]
    return (*single, *double)


PROMPTS = _all_prompts()
TRAINED_PROMPTS = tuple(prompt for prompt in PROMPTS if prompt not in HELD_OUT)


@functools.cache
def solid(prompt: str) -> Surface:
    """The surface a prompt of PROMPTS names, bounding radius 1.

    Raises ValueError for any other text.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"prompt must be one of PROMPTS, got {prompt!r}\nhint: for example {', '.join(PROMPTS[:4])}")
    *attributes, name = prompt.split()
    noun = next(singular for singular, plural in PLURALS.items() if name in (singular, plural))
    surface = normalised(_base(noun))
    for attribute in attributes:
        if attribute in STRETCHES:
            surface = normalised(surface.scaled(*STRETCHES[attribute]))
    return Pair(surface) if "two" in attributes else surface

"""Solids rendered over photographs, with the masks that they have: what a cut-out is measured by.

A solid is a signed distance; its surface is found by sphere tracing, lit by one lamp, and drawn at twice the size, so that its edge
is soft. Photographs are those that ship with scikit-image and matplotlib.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import skimage
from PIL import Image

SIDE = 320
SKIMAGE = Path(skimage.__file__).parent / "data"
MATPLOTLIB = Path(matplotlib.__file__).parent / "mpl-data" / "sample_data"
# Photographs with a subject, to look at.
PHOTOGRAPHS = (
    *(SKIMAGE / name for name in ("astronaut.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png")),
    *(SKIMAGE / name for name in ("coins.png", "color.png", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")),
    MATPLOTLIB / "grace_hopper.jpg",
)
# Photographs and parts of them in which nothing stands out: name and box in shares of the width and height.
BACKGROUNDS = (
    ("grass.png", (0, 0, 1, 1)),
    ("gravel.png", (0, 0, 1, 1)),
    ("brick.png", (0, 0, 1, 1)),
    ("hubble_deep_field.jpg", (0, 0, 1, 1)),
    ("moon.png", (0, 0, 1, 1)),
    ("rocket.jpg", (0.55, 0, 1, 0.6)),
    ("coffee.png", (0, 0, 0.3, 0.6)),
    ("motorcycle_left.png", (0, 0, 1, 0.3)),
)
Distance = Callable[[np.ndarray], np.ndarray]


def _sphere(p: np.ndarray) -> np.ndarray:
    return np.linalg.norm(p, axis=-1) - 0.9


def _torus(p: np.ndarray) -> np.ndarray:
    return np.hypot(np.hypot(p[..., 0], p[..., 2]) - 0.7, p[..., 1]) - 0.3


def _box(p: np.ndarray) -> np.ndarray:
    outside = np.abs(p) - np.array([0.7, 0.55, 0.6])
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(axis=-1), 0) - 0.05


def _cylinder(p: np.ndarray) -> np.ndarray:
    outside = np.stack([np.hypot(p[..., 0], p[..., 2]) - 0.55, np.abs(p[..., 1]) - 0.8], axis=-1)
    return np.minimum(outside.max(axis=-1), 0) + np.linalg.norm(np.maximum(outside, 0), axis=-1)


SOLIDS: dict[str, tuple[Distance, tuple[int, int, int]]] = {
    "sphere": (_sphere, (200, 60, 50)),
    "torus": (_torus, (230, 190, 60)),
    "box": (_box, (60, 110, 200)),
    "cylinder": (_cylinder, (240, 240, 235)),
}


@functools.cache
def drawn(solid: str, size: int = 200) -> Image.Image:
    """RGBA of a solid, `size` pixels a side, seen from above and turned."""
    distance, colour = SOLIDS[solid]
    edge = 2 * size
    y, x = np.mgrid[1 : -1 : edge * 1j, -1 : 1 : edge * 1j] * 1.35
    turn = _turned(0.5, 0.6)
    at = np.stack([x, y, np.full_like(x, 2.5)], axis=-1) @ turn
    ray = np.array([0, 0, -1.0]) @ turn
    for _ in range(60):
        at = at + distance(at)[..., None] * ray
    hit = np.abs(distance(at)) < 0.01
    step = 1e-3 * np.eye(3)
    normal = np.stack([distance(at + each) - distance(at - each) for each in step], axis=-1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    light = 0.35 + 0.65 * np.clip(normal @ (np.array([-0.5, 0.7, 0.6]) / 1.05 @ turn), 0, 1)
    rgba = np.concatenate([light[..., None] * colour, 255 * hit[..., None]], axis=-1)
    return Image.fromarray(rgba.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)


def _turned(tilt: float, spin: float) -> np.ndarray:
    c, s, d, e = np.cos(tilt), np.sin(tilt), np.cos(spin), np.sin(spin)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[d, 0, e], [0, 1, 0], [-e, 0, d]])


def scenes() -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Every solid over two of the backgrounds each: a name, the picture [S, S] as RGB, and the mask, bool [S, S]."""
    for index, name in enumerate(SOLIDS):
        for place in (2 * index, 2 * index + 1, 2 * index + 3):
            file, box = BACKGROUNDS[place % len(BACKGROUNDS)]
            yield f"{name} over {file}", *over(drawn(name), file, box, at=(40 + 10 * index, 70 - 8 * index))


def over(
    solid: Image.Image, file: str, box: tuple[float, ...] = (0, 0, 1, 1), *, at: tuple[int, int] = (60, 60)
) -> tuple[Image.Image, np.ndarray]:
    """A solid over one of scikit-image's photographs: the picture as RGB, and the solid's mask, bool [S, S]."""
    with Image.open(SKIMAGE / file) as opened:
        photograph = opened.convert("RGB")
    width, height = photograph.size
    picture = photograph.crop((int(box[0] * width), int(box[1] * height), int(box[2] * width), int(box[3] * height)))
    picture = picture.resize((SIDE, SIDE))
    picture.paste(solid, at, mask=solid)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(solid.getchannel("A"), at)
    return picture, np.asarray(mask) >= 128


def intersection_over_union(found: np.ndarray, expected: np.ndarray) -> float:
    """Of two masks, bool [S, S]."""
    return float((found & expected).sum() / (found | expected).sum())

"""The quality of a cloud of points, measured against the exact surface that its prompt names."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from hunyuan3d_client.shapes.codec import Floats

from .prompts import solid
from .solids import Array

# Coverage uses this many fixed samples of each surface. The classifier uses the first 128 of them and of the cloud.
_SURFACE_SAMPLES = 512
_CLASSIFIED_POINTS = 128


@functools.cache
def _surface_samples(prompt: str) -> Array:
    return solid(prompt).sample(_SURFACE_SAMPLES, np.random.default_rng(0))


def surface_distance(points: Floats, prompt: str) -> Array:
    """Distance of points [..., 3] to the surface of a prompt, [...]; the solid's bounding radius is the unit."""
    return solid(prompt).distance(points)


def coverage_distance(points: Floats, prompt: str) -> Array:
    """Distance of fixed uniform samples of a prompt's surface to the nearest of points [N, 3], [512].

    The distance falls with N, so compare only clouds of equal size.
    """
    return _nearest(_surface_samples(prompt), points)


def nearest_prompt(points: Floats, candidates: Sequence[str]) -> str:
    """The candidate whose surface fits points [N, 3] best: its mean surface distance plus mean coverage distance is least.

    Without the coverage distance, a cloud that lies on only a part of a surface would fit. Only the first 128 points count.
    """
    some = points[:_CLASSIFIED_POINTS]
    misfit = [
        surface_distance(some, prompt).mean() + _nearest(_surface_samples(prompt)[:_CLASSIFIED_POINTS], some).mean()
        for prompt in candidates
    ]
    return candidates[int(np.argmin(misfit))]


def _nearest(queries: Floats, points: Floats) -> Array:
    """Distance of each query [M, 3] to the nearest point [N, 3], [M]."""
    squared = (queries**2).sum(-1)[:, None] - 2 * queries @ points.T + (points**2).sum(-1)
    return np.sqrt(np.maximum(squared.min(-1), 0.0))

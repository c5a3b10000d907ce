"""The point codec: a token of the latents is a point of the cloud, its xyz spread over 64 channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LATENT_CHANNELS = 64
# Points of a solid of bounding radius 1 have about 0.45 standard deviation per axis; the noise has 1.
POINT_SCALE = 3.0
# Three columns of the 64 x 64 Hadamard matrix, numbered by their Walsh masks: orthogonal, and +-1/8 is exact in fp16.
_WALSH_MASKS = (0b010110, 0b101011, 0b111101)

Floats = NDArray[np.floating[Any]]


def frame() -> NDArray[np.float64]:
    """The orthonormal basis of the three channels that carry xyz, [3, 64]."""
    channels = np.arange(LATENT_CHANNELS)
    parities = [[bin(mask & int(channel)).count("1") % 2 for channel in channels] for mask in _WALSH_MASKS]
    return (1.0 - 2.0 * np.array(parities)) / LATENT_CHANNELS**0.5


def encode_points(points: Floats) -> Floats:
    """xyz [..., N, 3] -> clean latents [..., N, 64], same dtype."""
    return points @ (POINT_SCALE * frame()).astype(points.dtype)


def decode_points(latents: Floats) -> Floats:
    """Latents [..., N, 64] -> xyz [..., N, 3], same dtype; what lies outside the three carrying channels is dropped."""
    return latents @ (frame().T / POINT_SCALE).astype(latents.dtype)


def out_of_subspace_energy(latents: Floats) -> float:
    """Mean square of what decode_points drops, per dropped channel: 1 for pure noise, 0 for clean latents."""
    wide = np.asarray(latents, np.float64)
    dropped = wide - wide @ frame().T @ frame()
    return float((dropped**2).sum(-1).mean() / (LATENT_CHANNELS - 3))

"""The point codec: each latent token is a point of the cloud, whose x, y and z are spread over the token's 64 channels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract import LATENT_CHANNELS

# Points of a solid of bounding radius 1 have a standard deviation of about 0.45 per axis, and the noise has 1. The scale
# brings the points to about the size of the noise.
POINT_SCALE = 3.0
# Three columns of the 64 x 64 Hadamard matrix, numbered by their Walsh masks. They are orthogonal, and their elements, +1/8
# and -1/8, are exact in fp16.
_WALSH_MASKS = (0b010110, 0b101011, 0b111101)

Floats = NDArray[np.floating[Any]]


def frame() -> NDArray[np.float64]:
    """The orthonormal basis [3, 64] of the three directions in the 64 channels that carry x, y and z."""
    channels = np.arange(LATENT_CHANNELS)
    parities = [[bin(mask & int(channel)).count("1") % 2 for channel in channels] for mask in _WALSH_MASKS]
    return (1.0 - 2.0 * np.array(parities)) / math.sqrt(LATENT_CHANNELS)


def encode_points(points: Floats) -> Floats:
    """xyz [..., N, 3] -> clean latents [..., N, 64], same dtype."""
    return points @ (POINT_SCALE * frame()).astype(points.dtype)


def decode_points(latents: Floats) -> Floats:
    """Latents [..., N, 64] -> xyz [..., N, 3], same dtype. The part of the latents outside frame() is dropped."""
    return latents @ (frame().T / POINT_SCALE).astype(latents.dtype)


def out_of_subspace_energy(latents: Floats) -> float:
    """Mean square of the part that decode_points drops, per dropped direction: 1 for pure noise, 0 for clean latents."""
    wide = np.asarray(latents, np.float64)
    dropped = wide - wide @ frame().T @ frame()
    return float((dropped**2).sum(-1).mean() / (LATENT_CHANNELS - 3))

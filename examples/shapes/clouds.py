"""Training data: point clouds of every trained prompt, with a noise vector matched to each point."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from hunyuan3d_client.shapes import LATENT_CHANNELS, POINT_SCALE, embed_prompt, frame
from hunyuan3d_export.shapes.prompts import TRAINED_PROMPTS, solid

CLOUD_POINTS = 512
NULL_PROBABILITY = 0.1
# Training uses clouds of several sizes, so that the model can sample with other L too.
SIZES, SIZE_SHARES = (128, 256, 512), (0.3, 0.4, 0.3)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Noise and data of matched tokens [B, L, 64] and their context [B, T, 1536], float32."""

    noise: Tensor
    data: Tensor
    context: Tensor


def matched_pairs(prompt: str, clouds: int, seed: int) -> NDArray[np.float32]:
    """Points of a solid, each with its 3-D noise, [clouds, 2 (noise, point), CLOUD_POINTS, 3].

    The tokens of a cloud are a set, so any permutation of the noise has the same distribution. The permutation with the least
    total squared distance makes the paths from noise to data nearly straight: minibatch optimal transport within the cloud.
    """
    random = np.random.default_rng([seed, zlib.crc32(prompt.encode())])
    pairs = np.empty((clouds, 2, CLOUD_POINTS, 3), np.float32)
    for pair in pairs:
        points = solid(prompt).sample(CLOUD_POINTS, random)
        noise = random.standard_normal((CLOUD_POINTS, 3))
        order, matched = linear_sum_assignment(cdist(noise, points, "sqeuclidean"))
        pair[:] = noise[order], points[matched]
    return pairs


class Clouds:
    """Draws random batches without end. All prompts of a batch have equal length, because the model has no padding mask.

    Raises ValueError for pairs of a prompt that is not in TRAINED_PROMPTS.
    """

    def __init__(self, pairs: dict[str, NDArray[np.float32]], tokens: int, seed: int) -> None:
        if unknown := sorted(set(pairs) - set(TRAINED_PROMPTS)):
            raise ValueError(f"pairs must be of trained prompts, got {', '.join(unknown)}")
        self._pairs = {prompt: torch.from_numpy(array) for prompt, array in pairs.items()}
        self._contexts = {prompt: torch.from_numpy(embed_prompt(prompt)).float() for prompt in pairs}
        self._prompts = list(pairs)
        self._tokens = tokens
        self._random = np.random.default_rng([seed, 1])
        self._generator = torch.Generator().manual_seed(seed)
        self._frame = torch.from_numpy(frame()).float()

    def draw(self) -> Batch:
        length = int(self._random.choice(SIZES, p=SIZE_SHARES))
        words = len(self._prompts[self._random.integers(len(self._prompts))].split())
        bucket = [prompt for prompt in self._prompts if len(prompt.split()) == words]
        prompts = [bucket[i] for i in self._random.integers(len(bucket), size=self._tokens // length)]
        pairs = torch.stack([self._subset(prompt, length) for prompt in prompts])  # [B, 2, L, 3]
        context = torch.stack([self._contexts[prompt] for prompt in prompts])
        context[self._random.random(len(prompts)) < NULL_PROBABILITY] = 0.0
        noise = torch.randn(len(prompts), length, LATENT_CHANNELS, generator=self._generator)
        # Only the three channels of the noise that carry the points are matched; the other 61 stay independent.
        noise += (pairs[:, 0] - noise @ self._frame.T) @ self._frame
        return Batch(noise, POINT_SCALE * pairs[:, 1] @ self._frame, context)

    def _subset(self, prompt: str, length: int) -> Tensor:
        bank = self._pairs[prompt]
        cloud = bank[int(self._random.integers(len(bank)))]
        return cloud[:, torch.from_numpy(self._random.permutation(CLOUD_POINTS)[:length])]


def load_pairs(cache: Path, clouds: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """matched_pairs of every trained prompt, read from the file `cache`. Making a missing file takes minutes."""
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
            jobs = [pool.submit(matched_pairs, prompt, clouds, seed) for prompt in TRAINED_PROMPTS]
            np.save(cache, np.stack([job.result() for job in jobs]))
    bank = np.load(cache)
    return {prompt: bank[i] for i, prompt in enumerate(TRAINED_PROMPTS)}

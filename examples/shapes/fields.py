"""Training data of the shape decoder: clouds as the sampler draws them, and points of space with their clipped signed distance."""

from __future__ import annotations

import dataclasses
import multiprocessing
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hunyuan3d_client.shapes import LATENT_CHANNELS, POINT_SCALE, frame
from hunyuan3d_export.dit import PRESETS, load_checkpoint
from hunyuan3d_export.files import atomic_path
from hunyuan3d_export.shapes import CHECKPOINT
from hunyuan3d_export.shapes.prompts import TRAINED_PROMPTS, solid
from hunyuan3d_export.shapes.quality import draw
from hunyuan3d_export.shapes.reference import torch_sampler
from hunyuan3d_export.shapes.solids import signed_distance

# The field is the signed distance times 16, clipped to [-1, 1]: it reaches 1 at 1/16 of the bounding radius from the surface.
FIELD_SLOPE = 16.0
BOUNDS = 1.01  # the decoder is asked for points of this cube
SURFACE_POINTS, NEAR_POINTS, SPACE_POINTS = 16_384, 98_304, 32_768  # of each solid
NEAREST, FARTHEST = 0.002, 0.08  # standard deviations of the near points' distance to the surface
LEAST_SHARE = 0.05  # of the near points on the surface itself that are used; others are used by their field
# Sizes of the sampled clouds -> how many are drawn of each prompt. Few steps of the sampler give clouds with its usual errors.
SAMPLED = {256: 6, 512: 2}
SAMPLER_STEPS = 12
# Sizes of a batch's clouds, and their shares.
SIZES, SIZE_SHARES = (128, 256, 512, 1024), (0.2, 0.4, 0.25, 0.15)
SAMPLED_SHARE = 0.6
POINT_JITTER, LATENT_JITTER = 0.03, 0.06  # the largest standard deviations of the noise on exact clouds
SAMPLED_JITTER = 0.008


@dataclasses.dataclass(frozen=True)
class Batch:
    """Latents [B, L, 64] as the sampler returns them, query points [B, P, 3] and their field [B, P], float32."""

    latents: Tensor
    queries: Tensor
    field: Tensor


@dataclasses.dataclass(frozen=True)
class Bank:
    """All that batches are drawn from, for one prompt.

    surface: exact points [N, 3]. near, space: query points and their field [N, 4]. sampled: L -> latents [S, L, 64].
    """

    surface: Tensor
    near: Tensor
    space: Tensor
    sampled: dict[int, Tensor]


def field_of(prompt: str, points: NDArray[np.float64]) -> NDArray[np.float32]:
    """The decoder's target at points [N, 3], [N]."""
    return np.clip(FIELD_SLOPE * signed_distance(solid(prompt), points), -1, 1).astype(np.float32)


def exact_bank(prompt: str, seed: int) -> dict[str, NDArray[np.float32]]:
    """The arrays surface, near and space of a prompt."""
    random = np.random.default_rng([seed, zlib.crc32(prompt.encode())])
    surface = solid(prompt).sample(SURFACE_POINTS, random)
    deviation = np.exp(random.uniform(np.log(NEAREST), np.log(FARTHEST), (NEAR_POINTS, 1)))
    near = solid(prompt).sample(NEAR_POINTS, random) + deviation * random.standard_normal((NEAR_POINTS, 3))
    near = near.clip(-BOUNDS, BOUNDS)
    space = random.uniform(-BOUNDS, BOUNDS, (SPACE_POINTS, 3))
    with_field = {
        name: np.concatenate([points.astype(np.float32), field_of(prompt, points)[:, None]], axis=1)
        for name, points in (("near", near), ("space", space))
    }
    return {"surface": surface.astype(np.float32), **with_field}


def sampled_bank(prompt: str, seed: int) -> dict[str, NDArray[np.float16]]:
    """Latents as the shipped denoiser draws them: L -> [S, L, 64], under the names sampledL."""
    sampler = torch_sampler(_Bfloat16(), steps=SAMPLER_STEPS, guidance="guided")
    scale = PRESETS["shapes"].guidance_scale
    return {
        f"sampled{size}": draw(
            sampler,
            prompt,
            [zlib.crc32(f"{seed} {size} {index}".encode()) for index in range(count)],
            num_latents=size,
            guidance_scale=scale,
        ).astype(np.float16)
        for size, count in SAMPLED.items()
    }


def make_bank(prompt: str, seed: int, file: Path) -> None:
    """Writes the arrays of a prompt's bank; the file appears whole."""
    torch.set_num_threads(1)
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **exact_bank(prompt, seed), **sampled_bank(prompt, seed))


def load_banks(cache: Path, seed: int) -> dict[str, Bank]:
    """The banks of all trained prompts, read from the folder `cache`. Making the missing ones takes minutes."""
    cache.mkdir(parents=True, exist_ok=True)
    files = {prompt: cache / f"{prompt.replace(' ', '-')}-{seed}.npz" for prompt in TRAINED_PROMPTS}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(make_bank, prompt, seed, file) for prompt, file in files.items() if not file.is_file()]
        for job in jobs:
            job.result()
    return {prompt: _read_bank(file) for prompt, file in files.items()}


def _read_bank(file: Path) -> Bank:
    """The bank in a file. Of its near points, those very near the surface are thinned out: a field of zeros would fit them."""
    with np.load(file) as found:
        tensors = {name: torch.from_numpy(found[name]) for name in found.files}
    near, generator = tensors["near"], torch.Generator().manual_seed(0)
    kept = near[torch.rand(len(near), generator=generator) < near[:, 3].abs() + LEAST_SHARE]
    return Bank(tensors["surface"], kept, tensors["space"], {size: tensors[f"sampled{size}"] for size in SAMPLED})


class _Bfloat16:
    """The shipped denoiser, whose matrix products run in bfloat16: twice as fast on a CPU that has it."""

    def __init__(self) -> None:
        self._model = load_checkpoint(CHECKPOINT, dtype=torch.float32)

    def __call__(self, latents: Tensor, t: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._model(latents, t, context.float(), guidance).float()

    def guided(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._model.guided(latents, t, context.float(), guidance_scale).float()


class Fields:
    """Draws random batches without end: the clouds of a batch have the same number of points."""

    def __init__(self, banks: dict[str, Bank], *, tokens: int, queries: int, near_share: float, seed: int) -> None:
        self._banks = list(banks.values())
        self._tokens, self._queries, self._near_share = tokens, queries, near_share
        self._random = np.random.default_rng([seed, 2])
        self._generator = torch.Generator().manual_seed(seed)
        self._frame = torch.from_numpy(POINT_SCALE * frame()).float()

    def draw(self, jitter: float) -> Batch:
        """A batch whose noise is `jitter` times the largest."""
        length = int(self._random.choice(SIZES, p=SIZE_SHARES))
        count = max(2, self._tokens // length)
        chosen = [self._banks[i] for i in self._random.permutation(len(self._banks))[:count]]
        latents = torch.stack([self._latents(bank, length, jitter) for bank in chosen])
        queries = torch.stack([self._points(bank, self._queries // len(chosen)) for bank in chosen])
        return Batch(latents, queries[..., :3], queries[..., 3])

    def _latents(self, bank: Bank, length: int, jitter: float) -> Tensor:
        sizes = [size for size in SAMPLED if size >= length]
        if sizes and self._random.random() < SAMPLED_SHARE:
            clouds = bank.sampled[int(self._random.choice(sizes))]
            cloud = clouds[int(self._random.integers(len(clouds)))].float()
            latents = cloud[torch.from_numpy(self._random.permutation(len(cloud))[:length])]
            deviation = SAMPLED_JITTER * self._random.random()
            return latents + deviation * self._normal(length, 3) @ self._frame
        points = bank.surface[self._rows(bank.surface, length)]
        moved = points + jitter * POINT_JITTER * self._random.random() * self._normal(length, 3)
        return moved @ self._frame + jitter * LATENT_JITTER * self._random.random() * self._normal(length, LATENT_CHANNELS)

    def _points(self, bank: Bank, count: int) -> Tensor:
        near = round(self._near_share * count)
        return torch.cat([bank.near[self._rows(bank.near, near)], bank.space[self._rows(bank.space, count - near)]])

    def _rows(self, points: Tensor, count: int) -> Tensor:
        return torch.randint(len(points), (count,), generator=self._generator)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

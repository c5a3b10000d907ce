"""Training data of the picture encoder: views of every trained prompt as normals, which are lit and coloured anew at each use."""

from __future__ import annotations

import multiprocessing
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hunyuan3d_client.shapes.words import ATTRIBUTES, NOUNS
from hunyuan3d_export.conditioner.config import WORDS_IMAGE_SIZE
from hunyuan3d_export.files import atomic_path
from hunyuan3d_export.shapes.prompts import TRAINED_PROMPTS
from hunyuan3d_export.shapes.render import gridded, random_view, trace

NOTHING = ""  # the word of a token that a short prompt does not need; its vector is zero
VOCABULARY = (NOTHING, *ATTRIBUTES, *NOUNS)
TOKENS = 3
SIDE = WORDS_IMAGE_SIZE
RAYS = 120  # along each side of a traced picture
GRID_CELLS = 64  # of a solid's distances
MARGIN = 0.15  # of the canvas that preprocessing leaves around a picture with alpha
LEAST_CONTRAST = 0.6  # sum of the differences in red, green and blue
MEAN, DEVIATION = (
    torch.tensor([0.485, 0.456, 0.406]),
    torch.tensor([0.229, 0.224, 0.225]),
)  # ImageNet's, as preprocessing has them


def targets(prompt: str) -> list[int]:
    """The numbers of the words that the encoder is to read, one for each token.

    A token whose attribute is missing reads NOTHING. The denoiser draws a prompt with such tokens as it draws the short prompt:
    "tall sphere" is 0.012 from its surface either way, but 0.073 where the token repeats the noun.
    """
    *attributes, noun = prompt.split()
    count = "two" if "two" in attributes else NOTHING
    stretch = next((word for word in attributes if word != "two"), NOTHING)
    return [VOCABULARY.index(word) for word in (count, stretch, noun)]


def fitted(shown: NDArray[np.bool_], normals: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A traced view, cropped and centred as preprocessing does it: [SIDE, SIDE, 4] bytes of the normals and of the cover."""
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    layers = np.concatenate([normals * shown[..., None], shown[..., None]], axis=-1)[box]
    side = int(np.ceil(max(layers.shape[:2]) / (1 - MARGIN)))
    canvas = np.zeros((side, side, 4))
    top, left = (side - layers.shape[0]) // 2, (side - layers.shape[1]) // 2
    canvas[top : top + layers.shape[0], left : left + layers.shape[1]] = layers
    tensor = torch.from_numpy(canvas).permute(2, 0, 1)[None]
    resized = F.interpolate(tensor, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)[0]
    packed: NDArray[np.uint8] = (127.5 + 127.5 * resized.permute(1, 2, 0).numpy()).round().clip(0, 255).astype(np.uint8)
    return packed


def views_of(prompt: str, count: int, seed: int) -> NDArray[np.uint8]:
    """Random views of a prompt, [count, SIDE, SIDE, 4]."""
    random = np.random.default_rng([seed, zlib.crc32(prompt.encode())])
    distance = gridded(prompt, GRID_CELLS)
    return np.stack([fitted(*trace(distance, random_view(random), RAYS)) for _ in range(count)])


def make_views(prompt: str, count: int, seed: int, file: Path) -> None:
    torch.set_num_threads(1)
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, views_of(prompt, count, seed))


def load_views(cache: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Views [N, SIDE, SIDE, 4] of all trained prompts and the words to read from them [N, TOKENS]; made where missing."""
    cache.mkdir(parents=True, exist_ok=True)
    files = {prompt: cache / f"{prompt.replace(' ', '-')}-{count}-{seed}.npy" for prompt in TRAINED_PROMPTS}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(make_views, prompt, count, seed, file) for prompt, file in files.items() if not file.is_file()]
        for job in jobs:
            job.result()
    pictures = torch.from_numpy(np.concatenate([np.load(file) for file in files.values()]))
    words = torch.tensor([targets(prompt) for prompt in files]).repeat_interleave(count, dim=0)
    return pictures, words


class Dresser:
    """Lights, colours, mirrors and places views anew, half of them on white as pictures with alpha come, half on backgrounds."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def pixels(self, views: Tensor) -> Tensor:
        """Packed views [B, SIDE, SIDE, 4] -> normalised pixels [B, 1, 3, SIDE, SIDE]."""
        layers = (views.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        count = len(layers)
        mirrored = torch.where(self._uniform(count, 1, 1, 1) < 0.5, -1.0, 1.0)
        sign = torch.cat([mirrored, torch.ones(count, 3, 1, 1)], dim=1)  # of the normals' x, when the picture is mirrored
        layers = torch.where(mirrored < 0, layers.flip(-1) * sign, layers)
        alpha = self._uniform(count, 1, 1, 1) < 0.5
        layers = torch.where(alpha, layers, self._moved(layers))
        normals, cover = layers[:, :3], layers[:, 3:].clamp(0, 1)
        light = self._normal(count, 3) + torch.tensor([0.0, 0.8, 0.8])
        light[:, 2] = light[:, 2].clamp(min=0.1)
        light = F.normalize(light, dim=1)[:, :, None, None]
        ambient = self._uniform(count, 1, 1, 1, low=0.15, high=0.45)
        lambert, facing = (normals * light).sum(1, keepdim=True).clamp(min=0), normals[:, 2:3].clamp(min=0)
        brightness = ambient * cover + (1 - ambient) * (0.8 * lambert + 0.2 * facing)
        colour = self._uniform(count, 3, 1, 1, low=0.15)
        background = torch.where(alpha, torch.ones(()), self._background(count, colour))
        pictures = (brightness * colour).clamp(0, 1) + (1 - cover) * background
        pictures = pictures + 0.03 * self._uniform(count, 1, 1, 1) * self._normal(*pictures.shape)
        pictures = (pictures.clamp(0, 1) - MEAN[:, None, None]) / DEVIATION[:, None, None]
        return pictures[:, None]

    def _moved(self, layers: Tensor) -> Tensor:
        """The views smaller or larger and away from the middle."""
        count = len(layers)
        scale = self._uniform(count, low=0.95, high=2.0)
        shift = 0.7 * (scale - 1).clamp(min=0)[:, None] * (2 * self._uniform(count, 2) - 1)
        affine = torch.zeros(count, 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = scale
        affine[:, :, 2] = shift
        grid = F.affine_grid(affine, list(layers.shape), align_corners=False)
        return F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _background(self, count: int, colour: Tensor) -> Tensor:
        """Gradients between two colours, of which the first is not near the solid's colour, [count, 3, SIDE, SIDE]."""
        first, second = self._uniform(count, 3, 1, 1), self._uniform(count, 3, 1, 1)
        near = (first - colour).abs().sum(1, keepdim=True) < LEAST_CONTRAST
        first = torch.where(near, (colour + 0.5) % 1.0, first)
        angle = 2 * torch.pi * self._uniform(count, 1, 1)
        line = torch.linspace(-0.7, 0.7, SIDE)
        slope = 0.5 + 0.5 * (angle.cos() * line[None, :, None] + angle.sin() * line[None, None, :])
        share = 0.6 * (slope * self._uniform(count, 1, 1))[:, None]
        return first + share * (second - first)

    def _uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._generator)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

"""A request for samples: it is decoded and checked, its noise is drawn and its sampling path chosen. Knows nothing of Triton.

Axes: B samples of the request, L latent tokens, T context tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import schedules
from finite import all_finite
from forecast import off_reason
from outcomes import NoDenoiser
from settings import Settings

CHANNELS = 64
# The largest sizes that the denoisers are made for. Without a bound, a request of 30 MB could ask for a terabyte of noise.
MOST_LATENTS, MOST_CONTEXT = 4096, 5480

# How the velocities of a sample are evaluated: one branch; both branches in one graph; both as two batch rows; or a
# guidance-distilled network's single evaluation.
SamplingPath = Literal["plain", "guided", "two-batch", "distilled"]
PATHS: tuple[SamplingPath, ...] = get_args(SamplingPath)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A checked request: latents [B, L, 64] float32 are the initial noise; negative_context None stands for zeros.

    off_reason says why a tolerance that the client gave has no effect; the tolerance here is then 0.
    """

    context: np.ndarray
    negative_context: np.ndarray | None
    latents: np.ndarray
    sigmas: np.ndarray
    guidance_scale: float
    preview_every: int
    tolerance: float = 0.0
    off_reason: str | None = None


def decode(tensors: Mapping[str, np.ndarray], settings: Settings, default_num_latents: int | None) -> SampleRequest:
    """The request in `tensors`, which may lack the optional ones: the deployed defaults take their places.

    Raises ValueError, which names the tensor, for anything that the sampler cannot do.
    """
    if "context" not in tensors:  # Triton only counts inputs: it accepts an optional one in place of the required one
        raise ValueError("context must be given, got none")
    context = _tokens(tensors, "context", MOST_CONTEXT)
    if len(context) > settings.most_samples:
        hint = "hint: send several requests, or raise largest_request in hunyuan3d_sampler's config.pbtxt"
        raise ValueError(f"context must be of at most {settings.most_samples} samples, got {len(context)}\n{hint}")
    negative = _tokens(tensors, "negative_context", MOST_CONTEXT) if "negative_context" in tensors else None
    if negative is not None and negative.shape != context.shape:
        raise ValueError(f"negative_context must have context's shape {list(context.shape)}, got {list(negative.shape)}")
    if negative is not None and settings.guidance_embed:
        raise ValueError("negative_context must be left out for guidance-distilled weights, got one")
    schedule = _scalar(tensors, "schedule", settings.schedule.encode()).decode(errors="replace")
    sigmas = schedules.sigmas(schedule, int(_scalar(tensors, "steps", settings.steps)))
    scale = float(_scalar(tensors, "guidance_scale", settings.guidance_scale))
    if not np.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")
    preview_every = int(_scalar(tensors, "preview_every", 0))
    if preview_every < 0:
        raise ValueError(f"preview_every must be 0 or more, got {preview_every}")
    tolerance = float(_scalar(tensors, "tolerance", 0.0))
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance:g}")
    off = off_reason(schedule, sigmas) if tolerance else None
    return SampleRequest(
        context=context,
        negative_context=negative,
        latents=_initial_latents(tensors, len(context), default_num_latents),
        sigmas=sigmas,
        guidance_scale=scale,
        preview_every=preview_every,
        tolerance=0.0 if off else tolerance,
        off_reason=off,
    )


def numbers_to_draw(tensors: Mapping[str, np.ndarray], default_num_latents: int | None) -> int:
    """How many random numbers decode() will draw for these tensors, which need not be valid."""
    if "latents" in tensors or "context" not in tensors or tensors["context"].ndim != 3:
        return 0
    asked = tensors.get("num_latents", np.array([default_num_latents or 0]))
    return len(tensors["context"]) * min(max(0, int(asked.flat[0]) if asked.size else 0), MOST_LATENTS) * CHANNELS


def noise(seeds: np.ndarray, num_latents: int) -> np.ndarray:
    """N(0, 1) of shape [B, L, 64], float32: row i is drawn from NumPy's Philox with the key seeds[i], whatever the other rows are."""
    rows = [
        np.random.Generator(np.random.Philox(key=int(seed) % 2**64)).standard_normal((num_latents, CHANNELS), dtype=np.float32)
        for seed in seeds
    ]
    return np.stack(rows)


def _initial_latents(tensors: Mapping[str, np.ndarray], batch: int, default_num_latents: int | None) -> np.ndarray:
    if "latents" in tensors:
        latents = _tokens(tensors, "latents", MOST_LATENTS)
        if len(latents) != batch:
            raise ValueError(f"latents must have context's batch size {batch}, got {len(latents)}")
        if "num_latents" in tensors and int(_scalar(tensors, "num_latents", 0)) != latents.shape[1]:
            raise ValueError(f"num_latents must be left out or equal latents' {latents.shape[1]}, got {tensors['num_latents']}")
        return latents.astype(np.float32, copy=True)
    num_latents = _scalar(tensors, "num_latents", default_num_latents)
    if num_latents is None or not 1 <= int(num_latents) <= MOST_LATENTS:
        raise ValueError(f"num_latents must be in 1..{MOST_LATENTS}, got {num_latents}")
    seeds = tensors.get("seed", np.zeros(1, np.int64))
    if seeds.shape == (1,):
        seeds = seeds + np.arange(batch)
    if seeds.shape != (batch,):
        raise ValueError(f"seed must hold 1 or {batch} values, got shape {list(seeds.shape)}")
    return noise(seeds, int(num_latents))


def _tokens(tensors: Mapping[str, np.ndarray], name: str, most: int) -> np.ndarray:
    value = tensors[name]
    if value.ndim != 3 or 0 in value.shape or value.shape[1] > most:
        raise ValueError(f"{name} must be [batch, 1..{most} tokens, channels], got shape {list(value.shape)}")
    if not all_finite(value):
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    return value


def _scalar(tensors: Mapping[str, np.ndarray], name: str, default: object) -> object:
    if name not in tensors:
        return default
    if tensors[name].shape != (1,):
        raise ValueError(f"{name} must hold one value, got shape {list(tensors[name].shape)}")
    return tensors[name][0]


def choose_path(request: SampleRequest, settings: Settings, *, plain_ready: bool, guided_ready: bool) -> SamplingPath:
    """How this request's velocities are evaluated with the denoisers that are loaded.

    Raises NoDenoiser when none of them can evaluate it.
    """
    wanted: list[SamplingPath]
    if settings.guidance_embed:
        wanted = ["distilled"] if plain_ready else []
    elif request.negative_context is not None:
        wanted = ["two-batch"] if plain_ready else []
    elif request.guidance_scale == 1.0:  # the unconditional velocity cancels, so both graphs give the same
        wanted = [*(["plain"] if plain_ready else []), *(["guided"] if guided_ready else [])]
    else:
        wanted = [*(["guided"] if guided_ready else []), *(["two-batch"] if plain_ready else [])]
    if not wanted:
        raise NoDenoiser("a denoiser for this request must be loaded, found none\nhint: deploy the plain graph")
    return wanted[0]

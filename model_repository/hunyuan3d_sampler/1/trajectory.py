"""One request's way from noise to latents: decoded and checked, then stepped. numpy only; knows nothing of Triton.

Axes: B samples of the request, L latent tokens, T context tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import schedules
from settings import Settings

CHANNELS = 64
# The largest axes the denoisers are made for; without a bound, 30 MB of request could ask for a terabyte of noise.
MOST_LATENTS, MOST_CONTEXT = 4096, 5480
PATHS = ("plain", "guided", "two-batch", "distilled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A checked request: latents [B, L, 64] float32 is the initial noise; negative_context None means zeros."""

    context: np.ndarray
    negative_context: np.ndarray | None
    latents: np.ndarray
    sigmas: np.ndarray
    guidance_scale: float
    preview_every: int


class NoDenoiser(LookupError):
    """Nothing that is loaded can evaluate the request."""


def decode(tensors: Mapping[str, np.ndarray], settings: Settings, default_num_latents: int | None) -> SampleRequest:
    """The request in `tensors` (optional ones left out), with the deployed defaults filled in.

    Raises ValueError, naming the tensor, for anything the sampler cannot do.
    """
    if "context" not in tensors:  # Triton counts a request's inputs; another optional one in its place passes
        raise ValueError("context must be given, got none")
    context = _tokens(tensors, "context", MOST_CONTEXT)
    if len(context) > settings.max_trajectories:
        raise ValueError(f"context must be of at most {settings.max_trajectories} samples, got {len(context)}")
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
    return SampleRequest(
        context=context,
        negative_context=negative,
        latents=_initial_latents(tensors, len(context), default_num_latents),
        sigmas=sigmas,
        guidance_scale=scale,
        preview_every=preview_every,
    )


def noise(seeds: np.ndarray, num_latents: int) -> np.ndarray:
    """N(0, 1) of shape [B, L, 64], float32; row i depends on seeds[i] and L alone: numpy's Philox with the seed as its key."""
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
    if not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    return value


def _scalar(tensors: Mapping[str, np.ndarray], name: str, default: object) -> object:
    if name not in tensors:
        return default
    if tensors[name].shape != (1,):
        raise ValueError(f"{name} must hold one value, got shape {list(tensors[name].shape)}")
    return tensors[name][0]


def choose_path(request: SampleRequest, settings: Settings, *, plain_ready: bool, guided_ready: bool) -> str:
    """How this request's velocities are evaluated with the denoisers that are there.

    Raises NoDenoiser when none of them can.
    """
    if settings.guidance_embed:
        wanted = ["distilled"] if plain_ready else []
    elif request.negative_context is not None:
        wanted = ["two-batch"] if plain_ready else []
    elif request.guidance_scale == 1.0:  # v_u cancels; without a plain graph the guided one gives the same
        wanted = ["plain"] * plain_ready + ["guided"] * guided_ready
    else:
        wanted = ["guided"] * guided_ready + ["two-batch"] * plain_ready
    if not wanted:
        raise NoDenoiser("a denoiser for this request must be loaded, found none\nhint: deploy the plain graph")
    return wanted[0]


class Trajectory:
    """The state of one request between steps."""

    def __init__(self, request: SampleRequest, path: str) -> None:
        self.request = request
        self.path = path
        self.latents = request.latents
        self.step = 0

    @property
    def total(self) -> int:
        return len(self.request.sigmas) - 1

    @property
    def t(self) -> float:
        return float(self.request.sigmas[self.step])

    @property
    def done(self) -> bool:
        return self.step >= self.total

    @property
    def group(self) -> tuple[int, int, str]:
        """Trajectories of equal (L, T, path) share a denoiser call, whatever their time, scale or schedule."""
        return (self.latents.shape[1], self.request.context.shape[1], self.path)

    def advance(self, velocity: np.ndarray) -> None:
        """One Euler step in float32; then over steps of size 0 (flow_match's last), which change nothing.

        Raises FloatingPointError when the state is no longer finite.
        """
        sigmas = self.request.sigmas
        self.latents = self.latents + np.float32(sigmas[self.step + 1] - sigmas[self.step]) * velocity
        self.step += 1
        if not np.isfinite(self.latents).all():
            raise FloatingPointError(f"latents must stay finite, got NaN or Inf at step {self.step} of {self.total}")
        while not self.done and sigmas[self.step + 1] == sigmas[self.step]:
            self.step += 1

    @property
    def preview_due(self) -> bool:
        every = self.request.preview_every
        return self.done or (every > 0 and self.step % every == 0)


def denoiser_inputs(trajectories: list[Trajectory]) -> dict[str, np.ndarray]:
    """One denoiser call's tensors for trajectories of one group, [R] rows; two-batch: R conditional, then R unconditional."""
    latents = np.concatenate([item.latents for item in trajectories])
    context = np.concatenate([item.request.context for item in trajectories])
    path = trajectories[0].path
    t = _rows(trajectories, [item.t for item in trajectories])
    scale = _rows(trajectories, [item.request.guidance_scale for item in trajectories])
    if path == "two-batch":
        negative = np.concatenate(
            [
                np.zeros_like(item.request.context) if item.request.negative_context is None else item.request.negative_context
                for item in trajectories
            ]
        )
        return {
            "latents": np.concatenate([latents, latents]),
            "t": np.concatenate([t, t]),
            "context": np.concatenate([context, negative]),
        }
    extra = {"guided": {"guidance_scale": scale}, "distilled": {"guidance": scale}, "plain": {}}[path]
    return {"latents": latents, "t": t, "context": context, **extra}


def combine(trajectories: list[Trajectory], output: np.ndarray) -> np.ndarray:
    """The denoiser's output -> velocity [R, L, 64]: two-batch combines its branches, the other paths have nothing to do."""
    if trajectories[0].path != "two-batch":
        return output
    conditional, unconditional = np.split(output, 2)
    scale = _rows(trajectories, [item.request.guidance_scale for item in trajectories])[:, :, None]
    return unconditional + scale * (conditional - unconditional)


def _rows(trajectories: list[Trajectory], values: list[float]) -> np.ndarray:
    """One value for each trajectory -> one for each of its samples, [R, 1] float32."""
    return np.repeat(np.asarray(values, np.float32), [len(item.latents) for item in trajectories])[:, None]

"""The sampling loop in torch, in its plainest form. Served results and the results of graphs are compared with it.

It shares no code with the server's sampler, so that an error in one of the two does not appear in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hunyuan3d_client import contract
from hunyuan3d_client.contract import PATHS, SamplingPath

from ..runners import OnnxRunner, Runner


class Denoiser(Protocol):
    """A Hunyuan3DDiT, or another object that is called in the same way."""

    def __call__(self, latents: Tensor, t: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Evaluates the velocity once."""

    def guided(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        """Evaluates the guided velocity once."""


class RunnerDenoiser:
    """The denoiser models of a runner, called in the same way as a Hunyuan3DDiT."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __call__(self, latents: Tensor, t: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        extra = {} if guidance is None else {"guidance": guidance}
        return self._runner.run(contract.DIT, {"latents": latents, "t": t, "context": context, **extra})["velocity"]

    def guided(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        tensors = {"latents": latents, "t": t, "context": context, "guidance_scale": guidance_scale}
        return self._runner.run(contract.DIT_GUIDED, tensors)["velocity"]


class OnnxDenoiser(RunnerDenoiser):
    """The denoiser graphs below an artifacts folder, which run on ONNX Runtime."""

    def __init__(self, artifacts: Path) -> None:
        super().__init__(OnnxRunner(artifacts))


def sigmas(schedule: str, steps: int) -> list[float]:
    """The steps + 1 flow times from 0 (noise) to 1 (data).

    flow_match: linspace(0, 1, steps), then 1 again. consistency: `steps` points of the 100-point grid that the turbo weights
    were distilled on (training times 0, 9, 19, ..., 989 of 0..999), then 1.

    Raises ValueError for an unknown schedule.
    """
    if schedule == "flow_match":
        return [*torch.linspace(0, 1, steps, dtype=torch.float64).tolist(), 1.0]
    if schedule == "consistency":
        picks = [(100 * i) // steps for i in range(steps)]
        return [*(max(10 * pick - 1, 0) / 999 for pick in picks), 1.0]
    raise ValueError(f"schedule must be flow_match or consistency, got {schedule!r}")


def sample(
    denoiser: Denoiser,
    context: Tensor,
    latents: Tensor,
    times: list[float],
    *,
    guidance_scale: float,
    path: SamplingPath = "two-batch",
    negative_context: Tensor | None = None,
) -> Tensor:
    """Integrates the velocity by Euler's method from noise to data. Returns [B, L, 64] float32.

    latents: the noise [B, L, 64]. times: see sigmas(). context: [B, T, 1536]. negative_context: zeros by default.

    Raises ValueError for an unknown path.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    negative = torch.zeros_like(context) if negative_context is None else negative_context
    state = latents.float()
    for now, later in zip(times[:-1], times[1:], strict=True):
        if later != now:
            state = state + (later - now) * _velocity(denoiser, state, now, context, negative, guidance_scale, path)
    return state


def _velocity(
    denoiser: Denoiser,
    latents: Tensor,
    now: float,
    context: Tensor,
    negative: Tensor,
    guidance_scale: float,
    path: SamplingPath,
) -> Tensor:
    t = torch.full((len(latents),), now, device=latents.device)
    scale = torch.full((len(latents),), guidance_scale, device=latents.device)
    if path == "guided":
        return denoiser.guided(latents, t, context, scale)
    if path == "distilled":
        return denoiser(latents, t, context, scale)
    conditional = denoiser(latents, t, context)
    if path == "plain":
        return conditional
    unconditional = denoiser(latents, t, negative)
    return unconditional + guidance_scale * (conditional - unconditional)

"""The reference loop, with which all served samples are compared, on velocities whose trajectories are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hunyuan3d_export.dit.reference_sampler import PATHS, sample, sigmas

CONTEXT, NOISE = torch.full((2, 3, 8), 2.0), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


class Known:
    """velocity = mean of the context + guidance - latents. `guided` is its exact classifier-free guidance against zeros.

    `times` lists the t of each evaluation.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, latents: Tensor, t: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        assert latents.dtype == torch.float32 and t.shape == (len(latents),)
        self.times.append(float(t[0]))
        extra = 0 if guidance is None else guidance[:, None, None]
        return context.mean(dim=(1, 2))[:, None, None] + extra - latents

    def guided(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return guidance_scale[:, None, None] * context.mean(dim=(1, 2))[:, None, None] - latents


def euler(target: float, times: list[float]) -> Tensor:
    state = NOISE
    for now, later in zip(times[:-1], times[1:], strict=True):
        state = state + (later - now) * (target - state)
    return state


# The velocity pulls the latents to a target. For a context of 2 and the scale s = 3 it is 2 on the plain path,
# 0 + s (2 - 0) with two batches, s times 2 in the guided graph, and 2 + s for distilled weights.
@pytest.mark.parametrize(("path", "target"), [("plain", 2.0), ("two-batch", 6.0), ("guided", 6.0), ("distilled", 5.0)])
@pytest.mark.parametrize("schedule", ["flow_match", "consistency"])
def test_paths(path: str, target: float, schedule: str) -> None:
    times, denoiser = sigmas(schedule, 6), Known()
    found = sample(denoiser, CONTEXT, NOISE, times, guidance_scale=3.0, path=path)
    torch.testing.assert_close(found, euler(target, times), rtol=1e-5, atol=1e-5)
    evaluated = [time for time, later in zip(times[:-1], times[1:], strict=True) if later > time]
    assert denoiser.times == pytest.approx([time for time in evaluated for _ in range(2 if path == "two-batch" else 1)])
    assert len(evaluated) == (5 if schedule == "flow_match" else 6)


def test_negative_context() -> None:
    times = sigmas("flow_match", 4)
    found = sample(Known(), CONTEXT, NOISE, times, guidance_scale=3.0, negative_context=torch.ones_like(CONTEXT))
    torch.testing.assert_close(found, euler(1 + 3 * (2 - 1), times), rtol=1e-5, atol=1e-5)


def test_half_precision_noise_is_integrated_in_float32() -> None:
    found = sample(Known(), CONTEXT.half(), NOISE.half(), [0.0, 1.0], guidance_scale=1.0, path="plain")
    assert found.dtype == torch.float32


def test_unknown_path() -> None:
    with pytest.raises(ValueError, match=f"path must be one of {', '.join(PATHS)}, got 'fast'"):
        sample(Known(), CONTEXT, NOISE, [0.0, 1.0], guidance_scale=1.0, path="fast")

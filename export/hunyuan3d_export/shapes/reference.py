"""The plainest sampler there is, in torch: what every other path is compared with."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dit import Hunyuan3DDiT
from .quality import Latents, Sample

Guidance = Literal["two-batch", "guided"]


def flow_sigmas(steps: int) -> list[float]:
    """The flow times of `steps` evaluations and the end, [steps + 1]; the last step has size 0, as in upstream."""
    return [*np.linspace(0.0, 1.0, steps).tolist(), 1.0]


def guided_velocity(
    model: Hunyuan3DDiT, latents: Tensor, t: Tensor, context: Tensor, scale: float, guidance: Guidance
) -> Tensor:
    """v_u + scale (v_c - v_u) for latents [B, L, 64], t [B], context [B, T, 1536]: in one sequence or in a batch of two."""
    if guidance == "guided":
        return model.guided(latents, t, context, torch.full_like(t, scale))
    twice = [torch.cat([part, part]) for part in (latents, t)]
    conditional, unconditional = model(*twice, torch.cat([context, torch.zeros_like(context)])).chunk(2)
    return unconditional + scale * (conditional - unconditional)


def torch_sampler(model: Hunyuan3DDiT, *, steps: int = 50, guidance: Guidance = "two-batch") -> Sample:
    """A sampler as quality.evaluate wants it: Euler steps in float32 over flow_sigmas(steps).

    At scale 1 the two-batch path evaluates the conditional branch alone, which is the same.
    """
    sigmas = flow_sigmas(steps)

    @torch.inference_mode()
    def sample(context: NDArray[np.float16], latents: Latents, guidance_scale: float) -> Latents:
        x, condition = torch.from_numpy(latents).float(), torch.from_numpy(context)
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            if following == sigma:
                continue  # the last evaluation changes nothing
            t = torch.full((len(x),), sigma)
            if guidance_scale == 1.0 and guidance == "two-batch":
                velocity = model(x, t, condition)
            else:
                velocity = guided_velocity(model, x, t, condition, guidance_scale, guidance)
            x = x + (following - sigma) * velocity
        return x.numpy()

    return sample

"""The reference sampler in the form that the quality gate takes. Every other path is compared with it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..dit.reference_sampler import Denoiser, sigmas
from ..dit.reference_sampler import sample as integrate
from .quality import Latents, Sample

Guidance = Literal["two-batch", "guided"]


def torch_sampler(denoiser: Denoiser, *, steps: int = 50, guidance: Guidance = "two-batch") -> Sample:
    """A sampler for quality.evaluate: flow_match Euler steps with a Hunyuan3DDiT or an OnnxDenoiser.

    At scale 1 guidance changes nothing, so two-batch then evaluates the conditional branch alone.
    """
    times = sigmas("flow_match", steps)

    @torch.inference_mode()
    def sample(context: NDArray[np.float16], latents: Latents, guidance_scale: float) -> Latents:
        path = "plain" if guidance_scale == 1.0 and guidance == "two-batch" else guidance
        tensors = torch.from_numpy(context), torch.from_numpy(latents)
        return integrate(denoiser, *tensors, times, guidance_scale=guidance_scale, path=path).numpy()

    return sample

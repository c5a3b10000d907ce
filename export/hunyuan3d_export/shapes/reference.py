"""The reference sampler as the quality gate wants it: what every other path is compared with."""

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
    """A sampler as quality.evaluate wants it: flow_match Euler steps of a Hunyuan3DDiT or an OnnxDenoiser.

    At scale 1 the two-batch path evaluates the conditional branch alone, which is the same.
    """
    times = sigmas("flow_match", steps)

    @torch.inference_mode()
    def sample(context: NDArray[np.float16], latents: Latents, guidance_scale: float) -> Latents:
        path = "plain" if guidance_scale == 1.0 and guidance == "two-batch" else guidance
        tensors = torch.from_numpy(context), torch.from_numpy(latents)
        return integrate(denoiser, *tensors, times, guidance_scale=guidance_scale, path=path).numpy()

    return sample

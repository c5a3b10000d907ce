"""The quality gate's way to a running server."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hunyuan3d_client import Client

from .quality import Latents, Sample
from .reference import Guidance


def served_sampler(client: Client, *, steps: int = 50, guidance: Guidance = "guided", timeout_s: float = 600) -> Sample:
    """A sampler as quality.evaluate wants it, through hunyuan3d_sampler.

    An explicit all-zero negative context makes the server take the two-batch path for the same result.
    """

    def sample(context: NDArray[np.float16], latents: Latents, guidance_scale: float) -> Latents:
        negative = np.zeros_like(context) if guidance == "two-batch" and guidance_scale != 1.0 else None
        return client.sample(
            context,
            latents=latents,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_context=negative,
            timeout_s=timeout_s,
        )

    return sample

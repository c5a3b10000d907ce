"""The sampler of the quality gate that draws from a running server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from hunyuan3d_client import Client, contract

from .quality import Latents, Sample
from .reference import Guidance

_USUAL_LARGEST = 8  # of a server that does not tell its sampler's settings


def served_sampler(
    client: Client, *, steps: int = 50, guidance: Guidance = "guided", tolerance: float = 0.0, timeout_s: float = 600
) -> Sample:
    """A sampler for quality.evaluate that calls the server's model hunyuan3d_sampler, by requests of as many samples as it takes.

    For two-batch guidance it sends an all-zero negative context: the server then takes the two-batch path, and the result is
    the same as that of the guided path.
    """

    most = int(client.model_info(contract.SAMPLER).parameters.get("largest_request", _USUAL_LARGEST))

    def sample(context: NDArray[np.float16], latents: Latents, guidance_scale: float) -> Latents:
        firsts = range(0, len(context), most)
        with ThreadPoolExecutor(len(firsts)) as pool:
            parts = pool.map(lambda i: part(context[i : i + most], latents[i : i + most], guidance_scale), firsts)
            return np.concatenate(list(parts))

    def part(context: NDArray[np.float16], latents: Latents, guidance_scale: float) -> Latents:
        negative = np.zeros_like(context) if guidance == "two-batch" and guidance_scale != 1.0 else None
        return client.sample(
            context,
            latents=latents,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_context=negative,
            tolerance=tolerance or None,  # a server that knows no tolerance refuses even 0
            timeout_s=timeout_s,
        )

    return sample

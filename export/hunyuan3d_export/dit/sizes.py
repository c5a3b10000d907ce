"""The sizes of the denoiser's calls on a server: the limits of the sampler, and from them the profile of a plan."""

from __future__ import annotations

import numpy as np

from hunyuan3d_client import contract

from .config import Preset

_MOST_ROWS = contract.AXES["B"].max
# The sampler's token limit: rows x (L + T) of one call. It is a full batch at the usual sizes. Longer sequences get fewer rows,
# which bounds the latency of a step.
MAX_TOKENS = _MOST_ROWS * (contract.AXES["L"].opt + contract.AXES["T"].opt)
# Triton's own size of the pool, which a smaller one would not improve.
_LEAST_POOL_BYTES = 64 << 20


def plan_profile(preset: Preset) -> dict[str, contract.AxisRange]:
    """The ranges of B, L and T that a plan of these weights is built for. Their opt sizes are the preset's own L and T.

    TensorRT allocates memory for the largest B, L and T at once, so they keep to the token limit together: B is what the limit
    allows at the preset's sizes, and L takes what is left. T is the preset's, but at least the usual T, so that the plans of all
    base presets accept the warm-up of the configs in git.
    """
    context_tokens = max(preset.context_tokens, contract.AXES["T"].opt)
    rows = max(1, min(_MOST_ROWS, MAX_TOKENS // (preset.num_latents + context_tokens)))
    latent_tokens = max(preset.num_latents, min(contract.AXES["L"].max, MAX_TOKENS // rows - context_tokens))
    return {
        "B": contract.AxisRange(1, min(contract.AXES["B"].opt, rows), rows),
        "L": contract.AxisRange(1, preset.num_latents, latent_tokens),
        "T": contract.AxisRange(1, preset.context_tokens, context_tokens),
    }


def memory_pool_bytes(preset: Preset) -> int:
    """The size of Triton's CUDA memory pool, from which calls between models take their tensors.

    It holds two of the largest calls: while the tensors of one are still in use, the sampler fills the next one's.
    """
    sizes = {axis: size.max for axis, size in plan_profile(preset).items()}
    calls = [
        sum(
            int(np.prod(tensor.shape(sizes))) * np.dtype(tensor.numpy_dtype).itemsize
            for tensor in (*spec.inputs, *spec.outputs)
        )
        for spec in preset.specs.values()
    ]
    return max(_LEAST_POOL_BYTES, 2 * max(calls))

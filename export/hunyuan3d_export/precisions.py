"""The precisions of weights and activations, by the names that the command line and the manifests use."""

from __future__ import annotations

from collections.abc import Mapping

import torch

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The contract's name of a dtype -> torch's dtype.
WIRE_DTYPES: Mapping[str, torch.dtype] = {"FP16": torch.float16, "FP32": torch.float32}


def check_precision(name: str) -> str:
    """Returns the name. Raises ValueError when no such precision exists."""
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    return name

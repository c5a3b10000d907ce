"""Savings of the guided graph over a batch of two: time, with ONNX Runtime on the CPU, and counted operations.

The network has the widths of v2 but few blocks, so that an evaluation takes seconds on two cores. Every block saves the same
share, so the ratio holds for the whole network.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import serving
import torch
from rich.console import Console
from rich.table import Table

from hunyuan3d_export.dit import PRESETS, compute
from hunyuan3d_export.dit.network import example_inputs
from hunyuan3d_export.dit.reference_sampler import OnnxDenoiser

_PAIRS = 5
# Name, L, T, largest acceptable ratio. The first row has mini's own sizes. The second has half of v2-0's, where attention has a
# smaller share of the work than at full size.
_SIZES = (("mini, L:T = 512:1370", 512, 1370, 0.66), ("v2-0, L:T = 3072:1370 at a half", 1536, 685, 0.88))
# Preset, L, T.
_COUNTED = (("v2-mini", 512, 1370), ("v2-0", 3072, 1370), ("v2-mv", 3072, 5480))


def _ratio(denoiser: OnnxDenoiser, latent_tokens: int, context_tokens: int) -> float:
    """The median ratio of guided to two-batch time. Each pair is timed back to back, and the first pair is discarded."""
    inputs = example_inputs((1, latent_tokens, context_tokens))
    both = {
        "latents": inputs["latents"].repeat(2, 1, 1),
        "t": inputs["t"].repeat(2),
        "context": torch.cat([inputs["context"], torch.zeros_like(inputs["context"])]),
    }
    scale = torch.tensor([5.0])
    ratios = []
    for _ in range(_PAIRS + 1):
        start = time.perf_counter()
        denoiser.guided(**inputs, guidance_scale=scale)
        middle = time.perf_counter()
        denoiser(**both)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios[1:])


def main() -> int:
    denoiser = OnnxDenoiser(serving.artifacts())
    console = Console()
    measured = Table("measured, ONNX Runtime CPU", "guided / two-batch", "at most")
    report = {}
    passed = True
    for name, latent_tokens, context_tokens, most in _SIZES:
        ratio = _ratio(denoiser, latent_tokens, context_tokens)
        report[name] = ratio
        passed &= ratio <= most
        measured.add_row(name, f"{ratio:.2f}", f"{most:.2f}")
    console.print(measured)
    counted = Table("counted from shapes", "guided / two-batch")
    for preset, latent_tokens, context_tokens in _COUNTED:
        config = PRESETS[preset].config
        sizes = {"latent_tokens": latent_tokens, "context_tokens": context_tokens}
        ratio = compute.guided(config, **sizes).total / (2 * compute.plain(config, **sizes).total)
        report[f"counted {preset}"] = ratio
        counted.add_row(f"{preset}, L {latent_tokens}, T {context_tokens}", f"{ratio:.2f}")
    console.print(counted)
    (serving.BUILD / "guided.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the guided graph saves: time against two batches, pairwise in one run on ONNX Runtime CPU, and counted FLOP.

Networks have v2 widths and few blocks, so that an evaluation takes seconds on two cores; the ratio is the same per block.
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
# name, L, T, largest acceptable ratio: mini's own sizes; v2-0's at a half, where attention weighs less than at full size
_SIZES = (("mini, L:T = 512:1370", 512, 1370, 0.66), ("v2-0, L:T = 3072:1370 at a half", 1536, 685, 0.88))
# preset, L, T
_COUNTED = (("v2-mini", 512, 1370), ("v2-0", 3072, 1370), ("v2-mv", 3072, 5480))


def _ratio(denoiser: OnnxDenoiser, latent_tokens: int, context_tokens: int) -> float:
    """Median of guided / two-batch, each pair timed back to back after one warm-up."""
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

"""What the guided graph saves: time against two batches, pairwise in one run on ONNX Runtime CPU, and counted FLOP.

Networks have v2 widths and few blocks, so that an evaluation takes seconds on two cores; the ratio is the same per block.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hunyuan3d_export import compute
from hunyuan3d_export.dit import PRESETS, random_model, save_checkpoint
from hunyuan3d_export.onnx_from_torch import export_onnx
from hunyuan3d_export.parity import OnnxDenoiser, example_inputs
from hunyuan3d_export.weights import Weights

BUILD = Path("build") / "bench"
_PAIRS = 5
# name, L, T, largest acceptable ratio: mini's own sizes; v2-0's at a half, where attention weighs less than at full size
_SIZES = (("mini, L:T = 512:1370", 512, 1370, 0.66), ("v2-0, L:T = 3072:1370 at a half", 1536, 685, 0.88))
# preset, L, T
_COUNTED = (("v2-mini", 512, 1370), ("v2-0", 3072, 1370), ("v2-mv", 3072, 5480))


def _artifacts() -> Path:
    """One double and two single blocks of v2 widths, exported once."""
    config = dataclasses.replace(PRESETS["v2-0"].config, depth=1, depth_single_blocks=2)
    checkpoint = BUILD / "few-blocks.safetensors"
    if not checkpoint.is_file():
        save_checkpoint(random_model(config, seed=3), checkpoint, dtype=torch.float32)
    export_onnx(Weights(checkpoint=checkpoint), BUILD / "few-blocks")
    return BUILD / "few-blocks"


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
    denoiser = OnnxDenoiser(_artifacts())
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
    (BUILD / "guided.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Savings of both forms of the guided graph over a batch of two: time, with ONNX Runtime on the CPU, and counted operations.

The network has the widths of v2 but few blocks, so that an evaluation takes seconds on two cores. Every block saves the same
share, so the ratio holds for the whole network.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import serving
import torch
from rich.console import Console
from rich.table import Table

from hunyuan3d_export.dit import PRESETS, compute
from hunyuan3d_export.dit.config import GUIDED_FORMS
from hunyuan3d_export.dit.network import example_inputs
from hunyuan3d_export.dit.reference_sampler import OnnxDenoiser

_PAIRS = 5
# Name, L, T, largest acceptable ratio of each form. The first row has mini's own sizes. The second has half of v2-0's, where
# attention has a smaller share of the work than at full size.
_SIZES = (
    ("mini, L:T = 512:1370", 512, 1370, {"bias": 0.66, "repeat": 0.70}),
    ("v2-0, L:T = 3072:1370 at a half", 1536, 685, {"bias": 0.88, "repeat": 0.92}),
)
# Preset, L, T.
_COUNTED = (("v2-mini", 512, 1370), ("v2-0", 3072, 1370), ("v2-mv", 3072, 5480))


def _seconds(evaluate: Callable[[], object]) -> float:
    start = time.perf_counter()
    evaluate()
    return time.perf_counter() - start


def _ratios(denoisers: Mapping[str, OnnxDenoiser], latent_tokens: int, context_tokens: int) -> dict[str, float]:
    """Form -> the median ratio of guided to two-batch time. All are timed back to back, and the first round is discarded."""
    inputs = example_inputs((1, latent_tokens, context_tokens))
    both = {
        "latents": inputs["latents"].repeat(2, 1, 1),
        "t": inputs["t"].repeat(2),
        "context": torch.cat([inputs["context"], torch.zeros_like(inputs["context"])]),
    }
    scale = torch.tensor([5.0])
    ratios: dict[str, list[float]] = {form: [] for form in denoisers}
    for _ in range(_PAIRS + 1):
        two_batch = _seconds(lambda: denoisers["bias"](**both))
        for form, denoiser in denoisers.items():
            guided = _seconds(functools.partial(denoiser.guided, **inputs, guidance_scale=scale))
            ratios[form].append(guided / two_batch)
    return {form: statistics.median(found[1:]) for form, found in ratios.items()}


def main() -> int:
    denoisers = {form: OnnxDenoiser(serving.artifacts(form)) for form in GUIDED_FORMS}
    console = Console()
    measured = Table("measured, ONNX Runtime CPU", "form", "guided / two-batch", "at most")
    report = {}
    passed = True
    for name, latent_tokens, context_tokens, most in _SIZES:
        for form, ratio in _ratios(denoisers, latent_tokens, context_tokens).items():
            report[f"{name}, {form}"] = ratio
            passed &= ratio <= most[form]
            measured.add_row(name, form, f"{ratio:.2f}", f"{most[form]:.2f}")
    console.print(measured)
    counted = Table("counted from shapes", "form", "guided / two-batch")
    for preset, latent_tokens, context_tokens in _COUNTED:
        config = PRESETS[preset].config
        sizes = {"latent_tokens": latent_tokens, "context_tokens": context_tokens}
        for form in GUIDED_FORMS:
            ratio = compute.guided(config, **sizes, form=form).total / (2 * compute.plain(config, **sizes).total)
            report[f"counted {preset}, {form}"] = ratio
            counted.add_row(f"{preset}, L {latent_tokens}, T {context_tokens}", form, f"{ratio:.3f}")
    console.print(counted)
    (serving.BUILD / "guided.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

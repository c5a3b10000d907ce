"""Exports what many tests share, side by side: one export keeps one core busy. Without this each is made by the first test that wants it."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from conftest import exported

FORMS = [(precision, attention) for precision in ("fp16", "bf16") for attention in ("op", "decomposed")]
SHARED: list[dict[str, Any]] = [
    {},
    {"precision": "fp16"},
    {"distilled": True},
    {"seed": 1},
    {"precision": "fp16", "seed": 1},
    {"precision": "bf16"},
    {"attention": "decomposed"},
    {"precision": "fp16", "attention": "decomposed"},
    {"precision": "fp16", "distilled": True},
    *({"preset": "tiny", "precision": precision, "attention": attention} for precision, attention in FORMS),
]


def export(options: dict[str, Any]) -> None:
    import torch

    from hunyuan3d_export.weights import Weights

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    preset = options.pop("preset", None)
    exported(preset and Weights(preset=preset), **options)


def main() -> None:
    with ProcessPoolExecutor(max_workers=min(len(SHARED), os.cpu_count() or 1, 8)) as pool:
        list(pool.map(export, SHARED))


if __name__ == "__main__":
    main()

"""Exports the artifacts that many tests share in parallel, because one export keeps only one core busy.

Without this script, the first test that needs an artifact exports it.
"""

from __future__ import annotations

import os
import sys
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
    {"choices": "guided_form=repeat"},
    {"precision": "fp16", "choices": "guided_form=repeat"},
    {"precision": "fp16", "choices": "attention_accumulation=fp32,residual=fp32"},
    *({"preset": "tiny", "precision": precision, "choices": "guided_form=repeat"} for precision in ("fp16", "bf16")),
    *({"preset": "tiny", "precision": precision, "attention": attention} for precision, attention in FORMS),
]


def export(options: dict[str, Any]) -> None:
    import torch

    from hunyuan3d_export.dit.weights import Weights

    warnings.simplefilter("error")  # as pytest is configured
    torch.set_num_threads(1)
    preset = options.pop("preset", None)
    exported(preset and Weights(preset=preset), **options)


def main() -> None:
    with ProcessPoolExecutor(max_workers=min(len(SHARED), os.cpu_count() or 1, 8)) as pool:
        for options, done in [(options, pool.submit(export, options)) for options in SHARED]:
            if (error := done.exception()) is not None:  # the first test that needs the artifact will fail with it too
                sys.stderr.write(f"{options}: {error!r}\n")


if __name__ == "__main__":
    main()

"""Proof that an image encoder's graph computes what its weights mean: ONNX Runtime against torch in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch

from ..files import ONNX_FILE
from ..manifest import Manifest, ManifestError
from ..parity import Check, relative_l2
from .export import ConditionerSource

# Of the context, which is float16: two float32 results on either side of a rounding boundary differ by one bit in 1024.
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3}
_SEED = 2025


def checks(folder: Path, manifest: Manifest, checkpoint: Path | None) -> Iterator[Check]:
    """One request of every number of views it takes, but at most 2 pictures each: a CPU needs seconds for one.

    Raises ManifestError when the weights, needed for those of a checkpoint, are not given or not these.
    """
    precision, identity = manifest.made_from["precision"], manifest.made_from["weights"]
    if precision not in TOLERANCES:
        return
    random = {name: identity[name] for name in ("variant", "seed") if name in identity}
    source = ConditionerSource(path=None if random else checkpoint, **random, **manifest.serving)
    if source.identity() != identity:
        hint = "hint: --checkpoint FILE"
        raise ManifestError(f"{manifest.model} must be checked with its own weights, got {source.identity()}\n{hint}")
    model = source.load()
    session = onnxruntime.InferenceSession(str(folder / ONNX_FILE), providers=["CPUExecutionProvider"])
    for batch, views in ((2, 1), *([(1, 2)] if source.views > 1 else [])):
        size = source.image_size
        pixels = torch.randn(batch, views, 3, size, size, generator=torch.Generator().manual_seed(_SEED))
        with torch.no_grad():
            expected = model(pixels)
        found = torch.from_numpy(session.run(["context"], {"pixels": pixels.numpy()})[0])
        worst = float((found - expected).abs().max())
        yield Check(
            f"{views} x {size} px", (batch, 0, found.shape[1]), relative_l2(found, expected), worst, TOLERANCES[precision]
        )

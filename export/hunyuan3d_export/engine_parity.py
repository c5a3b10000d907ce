"""Proof that a plan computes what the weights mean: TensorRT on this machine's GPU against torch and ONNX Runtime."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor

from .engine_runtime import EngineDenoiser, PlanLoadError
from .gpu import first_gpu
from .manifest import Manifest, read_artifacts
from .parity import Check, OnnxDenoiser, compare, weights_of, write_receipt
from .reference_sampler import Denoiser
from .tensorrt_targets import TargetMissing, find_target
from .weights import Weights

_BUILD = "build them again with: hunyuan3d-export engine"


class _Moved:
    """A denoiser of another device, called with CPU tensors."""

    def __init__(self, denoiser: Denoiser, device: str) -> None:
        self._denoiser = denoiser
        self._device = device

    def __call__(self, latents: Tensor, t: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        there = self._device
        scale = None if guidance is None else guidance.to(there)
        return self._denoiser(latents.to(there), t.to(there), context.to(there), scale).cpu()

    def guided(self, latents: Tensor, t: Tensor, context: Tensor, guidance_scale: Tensor) -> Tensor:
        there = self._device
        return self._denoiser.guided(latents.to(there), t.to(there), context.to(there), guidance_scale.to(there)).cpu()


def why_skipped(plans: Path) -> str | None:
    """Why the plans below `plans` cannot run on this machine at all, in one line; None when they can be tried.

    Raises ManifestError for damaged artifacts.
    """
    manifests = read_artifacts(plans, hint=_BUILD)
    if first_gpu() is None:
        return "a plan runs on a GPU, and this machine has none"
    for manifest in manifests.values():
        try:
            find_target(manifest.made_from["target"])
        except TargetMissing as error:
            return str(error).splitlines()[0]
    return None


def verify_engines(plans: Path, weights: Weights | None = None, onnx: Path | None = None) -> dict[str, list[Check]]:
    """Compares every plan below `plans` with float32 torch on the GPU, and with the ONNX artifacts below `onnx` on the CPU.

    Writes a receipt beside each plan's manifest. weights: as in parity.verify. Returns the checks by model.

    Raises ManifestError for damaged artifacts or other weights, PlanLoadError for a plan that does not load here.
    """
    results = {}
    sources = read_artifacts(onnx, hint="export again with: hunyuan3d-export onnx") if onnx else {}
    for folder, manifest in read_artifacts(plans, hint=_BUILD).items():
        _check_loadable(folder, manifest, [source.files for source in sources.values()])
        profile = manifest.made_from["profile"]
        engine = _Moved(EngineDenoiser(plans, find_target(manifest.made_from["target"])), "cuda")
        reference = weights_of(manifest, weights).load(torch.float32).to("cuda")
        checks = list(compare(manifest, engine, _Moved(reference, "cuda"), profile=profile, against=", torch"))
        del reference
        if onnx is not None and manifest.made_from["precision"] != "bf16":  # which ONNX Runtime has not on a CPU
            checks += compare(manifest, engine, OnnxDenoiser(onnx), profile=profile, against=", ONNX Runtime")
        write_receipt(folder, manifest, checks)
        results[manifest.model] = checks
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return results


def _check_loadable(folder: Path, manifest: Manifest, sources: list[object]) -> None:
    if manifest.made_from.get("weight_stripped"):
        raise PlanLoadError(
            f"{folder} must hold a plan with weights, got a weight-stripped one\n"
            "hint: hunyuan3d-export refit --plan DIR --onnx DIR --out DIR"
        )
    if sources and manifest.made_from["onnx"] not in sources:
        raise PlanLoadError(
            f"{folder} must be compared with the ONNX artifact it was built from, got another\nhint: --artifacts DIR of that export"
        )

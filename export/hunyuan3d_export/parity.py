"""Proof that an artifact computes what the weights mean: ONNX Runtime against torch, written down as a receipt."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from hunyuan3d_client import contract

from .files import atomic_path, sha256
from .manifest import NAME as MANIFEST
from .manifest import Manifest, ManifestError, read_artifacts, versions_of
from .onnx_from_torch import MODEL_FILE
from .reference_sampler import Denoiser, NamedDenoiser, sample, sigmas
from .weights import SHIPPED, Weights, preset_from_json

RECEIPT = "parity.json"
# (B, L, T) of the checks: all different from each other and from the traced example.
CASES = ((1, 40, 19), (2, 33, 130), (3, 96, 7))
_SAMPLING_SIZES = (2, 48, 23)
# (min, ..., max) of each axis, as a plan's manifest has it.
Profile = Mapping[str, Sequence[int]]
WHOLE_PROFILE: Profile = {axis: (size.min, size.max) for axis, size in contract.AXES.items()}
# Steps of the full sampling check; enough for errors to add up, whatever the preset's own number.
_MOST_STEPS = 50
_SEED = 2025

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest relative L2 error against float32 torch: of one evaluation, and of a whole sampling."""

    evaluation: float
    sampling: float


TOLERANCES = {"fp32": Tolerance(1e-5, 1e-4), "fp16": Tolerance(5e-3, 3e-2), "bf16": Tolerance(4e-2, 2e-1)}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: what was compared, at which (B, L, T), the relative L2 and largest absolute error found."""

    name: str
    sizes: tuple[int, int, int]
    relative_l2: float
    max_abs: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative_l2 <= self.tolerance


class OnnxDenoiser(NamedDenoiser):
    """The graphs below an artifacts folder on ONNX Runtime, called like a Hunyuan3DDiT. Graphs load on first use."""

    def __init__(self, artifacts: Path) -> None:
        self._artifacts = artifacts
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def _run(self, model: str, tensors: dict[str, Tensor]) -> Tensor:
        if model not in self._sessions:
            path = self._artifacts / model / MODEL_FILE
            self._sessions[model] = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (velocity,) = self._sessions[model].run(["velocity"], {name: value.numpy() for name, value in tensors.items()})
        return torch.from_numpy(velocity)


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def verify(artifacts: Path, weights: Weights | None = None) -> dict[str, list[Check]]:
    """Compares every ONNX artifact below `artifacts` with torch and writes a receipt beside each manifest.

    weights: where the artifacts' weights are; needed only for those of a checkpoint. Returns the checks by model; bf16
    graphs, which ONNX Runtime cannot run on a CPU, get none.

    Raises ManifestError when an artifact is damaged or was made from other weights.
    """
    results = {}
    for folder, manifest in read_artifacts(artifacts, hint="export again with: hunyuan3d-export onnx").items():
        if manifest.model == contract.CONDITIONER:
            from .conditioner.parity import checks as conditioner_checks  # needs the extra `conditioner`

            checks = list(conditioner_checks(folder, manifest, weights.checkpoint if weights else None))
        else:
            checks = list(_checks(artifacts, manifest, weights_of(manifest, weights)))
        write_receipt(folder, manifest, checks)
        results[manifest.model] = checks
        gc.collect()  # a full-size model is gigabytes: free it before the next one loads
    return results


def weights_of(manifest: Manifest, given: Weights | None) -> Weights:
    """The weights an artifact was made from: those given, which must be the same, or the ones its manifest names.

    Raises ManifestError when they are others, or of a checkpoint that was not given.
    """
    if manifest.model == contract.CONDITIONER:
        hint = "hint: its ONNX artifact can be: hunyuan3d-export verify --artifacts DIR"
        raise ManifestError(f"plan must be a denoiser's to be compared, got {manifest.model}\n{hint}")
    identity = manifest.made_from["weights"]
    if given is None and "checkpoint_sha256" in identity and identity["preset"] not in SHIPPED:
        raise ManifestError(
            f"{manifest.model} was made from a checkpoint, which must be given, got none\nhint: --checkpoint FILE"
        )
    weights = given or Weights(preset=identity["preset"], seed=identity.get("seed", 0))
    # A file is known by its digest, whatever preset it is called by.
    found, digest = weights.identity(), identity.get("checkpoint_sha256")
    if (found.get("checkpoint_sha256") if digest else found) != (digest or identity):
        raise ManifestError(f"{manifest.model} must be made from these weights, got {identity}\nhint: export again from them")
    return weights


def _checks(artifacts: Path, manifest: Manifest, weights: Weights) -> Iterator[Check]:
    if manifest.made_from["precision"] == "bf16":
        logger.info("%s: ONNX Runtime has no bf16 kernels on a CPU; nothing to compare", manifest.model)
        return
    yield from compare(manifest, OnnxDenoiser(artifacts), weights.load(torch.float32))


def compare(
    manifest: Manifest, found_by: Denoiser, expected_by: Denoiser, *, profile: Profile = WHOLE_PROFILE, against: str = ""
) -> Iterator[Check]:
    """Evaluations at several sizes within `profile`, then a whole sampling, all on CPU tensors, of one artifact's model.

    against: what the checks' names say of expected_by.
    """
    tolerance = TOLERANCES[manifest.made_from["precision"]]
    guided = manifest.model == contract.DIT_GUIDED
    preset = preset_from_json(manifest.serving)
    scale_input = "guidance_scale" if guided else "guidance" if preset.config.guidance_embed else None
    for sizes in dict.fromkeys(_within(profile, case) for case in CASES):
        found, expected = (_evaluate(run, sizes, scale_input) for run in (found_by, expected_by))
        yield _compare(f"evaluation{against}", sizes, found, expected, tolerance.evaluation)
    times = sigmas(preset.schedule, min(preset.steps, _MOST_STEPS))
    expected_path = "distilled" if preset.config.guidance_embed else "two-batch"
    path = "guided" if guided else expected_path
    sizes = _within(profile, _SAMPLING_SIZES)
    inputs = example_inputs(sizes)
    found, expected = (
        sample(run, inputs["context"], inputs["latents"], times, guidance_scale=preset.guidance_scale, path=how)
        for run, how in ((found_by, path), (expected_by, expected_path))
    )
    yield _compare(f"{len(times) - 1} steps, {path}{against}", sizes, found, expected, tolerance.sampling)


def _within(profile: Profile, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """(B, L, T), each moved to the nearest size the profile has."""
    batch, latents, context = (
        min(max(size, profile[axis][0]), profile[axis][-1]) for axis, size in zip("BLT", sizes, strict=True)
    )
    return batch, latents, context


def example_inputs(sizes: tuple[int, int, int], seed: int = _SEED) -> dict[str, Tensor]:
    """latents, t, context of a seeded example; every context value is representable in float16."""
    batch, latent_tokens, context_tokens = sizes
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(batch, latent_tokens, contract.LATENT_CHANNELS, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "context": torch.randn(batch, context_tokens, contract.CONTEXT_WIDTH, generator=generator).half(),
    }


def _evaluate(denoiser: Denoiser, sizes: tuple[int, int, int], scale_input: str | None) -> Tensor:
    inputs = example_inputs(sizes)
    if scale_input is not None:
        inputs[scale_input] = torch.linspace(0.5, 7.5, sizes[0])
    return denoiser.guided(**inputs) if scale_input == "guidance_scale" else denoiser(**inputs)


def _compare(name: str, sizes: tuple[int, int, int], found: Tensor, expected: Tensor, tolerance: float) -> Check:
    return Check(name, sizes, relative_l2(found, expected), float((found - expected).abs().max()), tolerance)


def write_receipt(folder: Path, manifest: Manifest, checks: list[Check]) -> None:
    """Writes the checks beside the manifest, bound to it by its digest."""
    receipt = {
        "model": manifest.model,
        "manifest_sha256": sha256(folder / MANIFEST),
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
        "versions": {**manifest.versions, **versions_of("torch", "onnxruntime", "onnxruntime-gpu")},
    }
    with atomic_path(folder / RECEIPT) as temporary:
        temporary.write_text(json.dumps(receipt, indent=2) + "\n")

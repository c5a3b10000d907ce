"""The denoiser's row in the table of networks: its graphs, the checks against torch, and its deployment."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hunyuan3d_client import contract

from ..checks import Check, Profile, compare, within
from ..graphs import Graph, GraphOption, Source
from ..manifest import Manifest, ManifestError
from ..runners import Runner
from . import compute
from .config import GUIDED_FORMS, PART_PRECISIONS, Arithmetic, DiTConfig, Preset
from .model import Hunyuan3DDiT
from .reference_sampler import Denoiser, RunnerDenoiser, sample, sigmas
from .served import MODULES
from .sizes import memory_pool_bytes, plan_profile
from .weights import SHIPPED, Weights

PRESET_FILE = "preset.json"  # lies beside the sampler's model.py; holds facts() of the deployed weights
# Form of attention in the graph -> the torch backend whose trace has this form.
ATTENTION_FORMS = {"op": "sdpa", "decomposed": "standard"}
# The fields of Arithmetic. NVIDIA's fused attention kernels take no mask, so plans get the guided form without one.
OPTIONS = {
    "guided_form": GraphOption(values=GUIDED_FORMS, default="bias", for_plans="repeat", graphs=("guided",)),
    "attention_accumulation": GraphOption(values=PART_PRECISIONS, default="native", halves_only=True),
    "residual": GraphOption(values=PART_PRECISIONS, default="native", halves_only=True),
}
EXAMPLE_SIZES = {"B": 2, "L": 24, "T": 37}
# (B, L, T) of the checks. B, L and T differ from each other and from the sizes of the traced example.
CASES = ((1, 40, 19), (2, 33, 130), (3, 96, 7))
_SAMPLING_SIZES = (2, 48, 23)
# Most steps of the check of a whole sampling: enough for errors to add up. A preset with more steps is checked with this many.
_MOST_STEPS = 50
_SEED = 2025


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The largest relative L2 error against float32 torch, of one evaluation and of a whole sampling."""

    evaluation: float
    sampling: float


TOLERANCES = {"fp32": Tolerance(1e-5, 1e-4), "fp16": Tolerance(5e-3, 3e-2), "bf16": Tolerance(4e-2, 2e-1)}


def preset_from_json(serving: Mapping[str, Any]) -> Preset:
    """The Preset that a manifest's `serving` holds."""
    return Preset(**{**serving, "config": DiTConfig(**serving["config"])})


def label(preset: Preset) -> str:
    """The name of these weights in messages."""
    return f"guidance-distilled weights ({preset.name})" if preset.config.guidance_embed else preset.name


def sizes(preset: Preset) -> str:
    """The sizes of the network in words."""
    config = preset.config
    blocks = f"{config.depth} double and {config.depth_single_blocks} single blocks"
    kind = "guidance-distilled" if config.guidance_embed else "base"
    return f"{preset.name} ({kind}), {compute.parameters(config):,} parameters, width {config.hidden_size}, {blocks}"


# --- graphs


def graphs(preset: Preset) -> dict[str, Graph]:
    """The graph `plain` and, for a base model, the graph `guided`."""
    return {
        name: Graph(spec=spec, axes=spec.axes, example=EXAMPLE_SIZES, module=MODULES[name])
        for name, spec in preset.specs.items()
    }


def prepare(model: Hunyuan3DDiT, options: Mapping[str, str]) -> Hunyuan3DDiT:
    """The model with the arithmetic that `options` name (see OPTIONS) and with its weights as graphs hold them."""
    model.arithmetic = Arithmetic(**options)
    model.prepare_for_graph()
    return model


# --- comparison with torch


def weights_of(manifest: Manifest, given: Source | None) -> Weights:
    """The weights that an artifact was made from: the given weights, or else the weights that its manifest names.

    Raises ManifestError when the given weights are others, or when none were given and the artifact needs a checkpoint.
    """
    identity = manifest.made_from["weights"]
    if given is None and "checkpoint_sha256" in identity and identity["preset"] not in SHIPPED:
        raise ManifestError(
            f"{manifest.model} was made from a checkpoint, which must be given, got none\nhint: --checkpoint FILE"
        )
    weights = given if isinstance(given, Weights) else Weights(preset=identity["preset"], seed=identity.get("seed", 0))
    # A file is identified by its digest alone, because the same file may be used under different presets.
    found, digest = weights.identity(), identity.get("checkpoint_sha256")
    if (found.get("checkpoint_sha256") if digest else found) != (digest or identity):
        raise ManifestError(f"{manifest.model} must be made from these weights, got {identity}\nhint: export again from them")
    return weights


def checks(manifest: Manifest, found_by: Runner, expected_by: Runner, *, profile: Profile, against: str) -> Iterator[Check]:
    """The checks of compare_denoisers() for two runners."""
    denoisers = RunnerDenoiser(found_by), RunnerDenoiser(expected_by)
    yield from compare_denoisers(manifest, *denoisers, profile=profile, against=against)


def compare_denoisers(
    manifest: Manifest, found_by: Denoiser, expected_by: Denoiser, *, profile: Profile | None = None, against: str = ""
) -> Iterator[Check]:
    """Compares evaluations at several sizes within `profile`, then a whole sampling, of one artifact's model, with CPU tensors.

    profile: the ranges of a plan's axes, or narrower ones; with a profile, one evaluation is at the preset's own L and T.
    against: the end of each check's name; it says which runtime expected_by uses.
    """
    tolerance = TOLERANCES[manifest.made_from["precision"]]
    guided = manifest.model == contract.DIT_GUIDED
    preset = preset_from_json(manifest.serving)
    scale_input = "guidance_scale" if guided else "guidance" if preset.config.guidance_embed else None
    # A plan is also compared at the sizes that it serves: FP16 sums in attention lose accuracy as the number of keys grows.
    served = within(profile, (1, preset.num_latents, preset.context_tokens)) if profile else None
    cases = [within(profile, case) for case in CASES] + ([served] if served else [])
    for sizes in dict.fromkeys(cases):
        amplified = 1.0
        if guided and sizes == served:
            found, expected, amplified = _at_served_scale(found_by, expected_by, sizes, preset.guidance_scale)
        else:
            found, expected = (_evaluate(run, sizes, scale_input) for run in (found_by, expected_by))
        yield compare(f"evaluation{against}", sizes, found, expected, tolerance=amplified * tolerance.evaluation)
    times = sigmas(preset.schedule, min(preset.steps, _MOST_STEPS))
    expected_path: contract.SamplingPath = "distilled" if preset.config.guidance_embed else "two-batch"
    path: contract.SamplingPath = "guided" if guided else expected_path
    sizes = within(profile, _SAMPLING_SIZES)
    inputs = example_inputs(sizes)
    found, expected = (
        sample(run, inputs["context"], inputs["latents"], times, guidance_scale=preset.guidance_scale, path=how)
        for run, how in ((found_by, path), (expected_by, expected_path))
    )
    yield compare(f"{len(times) - 1} steps, {path}{against}", sizes, found, expected, tolerance=tolerance.sampling)


def example_inputs(sizes: tuple[int, ...], seed: int = _SEED) -> dict[str, Tensor]:
    """latents, t and context of sizes (B, L, T), drawn from `seed`. The context is float16."""
    batch, latent_tokens, context_tokens = sizes
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(batch, latent_tokens, contract.LATENT_CHANNELS, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "context": torch.randn(batch, context_tokens, contract.CONTEXT_WIDTH, generator=generator).half(),
    }


def _evaluate(denoiser: Denoiser, sizes: tuple[int, ...], scale_input: str | None) -> Tensor:
    inputs = example_inputs(sizes)
    if scale_input is not None:
        inputs[scale_input] = torch.linspace(0.5, 7.5, sizes[0])
    return denoiser.guided(**inputs) if scale_input == "guidance_scale" else denoiser(**inputs)


def _at_served_scale(
    found_by: Denoiser, expected_by: Denoiser, sizes: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor, float]:
    """The guided velocities at the scale that is served, and the amplification of their errors."""
    inputs, scales = example_inputs(sizes), torch.full(sizes[:1], scale)
    found, expected = (run.guided(**inputs, guidance_scale=scales) for run in (found_by, expected_by))
    unconditional = expected_by.guided(**inputs, guidance_scale=0 * scales)
    conditional = unconditional + (expected - unconditional) / scale
    return found, expected, amplification(scale, conditional, unconditional)


def amplification(scale: float, conditional: Tensor, unconditional: Tensor) -> float:
    """How much larger the relative error of a guided velocity is than that of its two velocities, if their errors are independent.

    The guided velocity is scale * conditional - (scale - 1) * unconditional, so it has the errors of both. At least 1.
    """
    errors = math.hypot(float((scale * conditional).norm()), float(((scale - 1) * unconditional).norm()))
    guided = float((unconditional + scale * (conditional - unconditional)).norm())
    return max(1.0, errors / guided) if guided else 1.0


# --- deployment


def plan_sizes(preset: Preset) -> dict[str, tuple[int, ...]]:
    """The sizes of B, L and T that a plan must accept: Triton's batches, and the preset's defaults, which also warm it up."""
    return {"B": (1, plan_profile(preset)["B"].max), "L": (preset.num_latents,), "T": (preset.context_tokens,)}


def config_files(preset: Preset, torch: Mapping[str, str] | None = None) -> dict[str, str]:
    """See configs.config_files."""
    from .configs import config_files as render  # needs tritonclient, which a machine for gpu-check may lack

    return render(preset, torch)


def facts(preset: Preset) -> dict[str, str]:
    """Path inside the repository -> text that each deployment writes anew: the preset's name, its L, its scale factor and
    the size of the CUDA memory pool as JSON."""
    values = {
        "preset": preset.name,
        "num_latents": preset.num_latents,
        "scale_factor": preset.scale_factor,
        "cuda_memory_pool_bytes": memory_pool_bytes(preset),
    }
    return {f"{contract.SAMPLER}/1/{PRESET_FILE}": json.dumps(values) + "\n"}

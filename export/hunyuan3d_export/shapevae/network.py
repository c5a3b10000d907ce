"""The shape decoder's row in the table of networks: its graphs, the checks against torch, and its deployment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hunyuan3d_client import contract

from ..checks import Check, Profile, compare, within
from ..graphs import Graph, Source
from ..manifest import Manifest, ManifestError
from ..precisions import WIRE_DTYPES
from ..runners import Runner
from .config import ShapeVAEPreset
from .model import ShapeVAEDecoder
from .served import MODULES
from .served import preset_from_json as preset_from_json
from .weights import ShapeVAESource

# Form of attention in the graph -> the torch backend whose trace has this form.
ATTENTION_FORMS = {"op": "sdpa", "decomposed": "standard"}
EXAMPLE_SIZES = {"B": 2, "L": 24, "P": 37}
# (B, L, P) of the checks; they differ from each other and from the sizes of the traced example.
CASES = ((1, 40, 190), (2, 33, 65), (3, 96, 7))
# Relative L2 error of a graph's outputs against float32 torch. k and v have passed all blocks; the field is that of given k and v.
TOLERANCES = {
    contract.VAE: {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2},
    contract.FIELD: {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-2},
}
_SEED = 2025


def in_precision(preset: ShapeVAEPreset, precision: str) -> ShapeVAEPreset:
    """The preset for graphs of this precision: the wire carries k and v in float32 only between fp32 graphs."""
    return dataclasses.replace(preset, keys_values="FP32" if precision == "fp32" else "FP16")


def sizes(preset: ShapeVAEPreset) -> str:
    """The sizes of the decoder in words."""
    config, pi = preset.config, "with" if preset.include_pi else "without"
    sizes = f"width {config.width}, {config.num_decoder_layers} layers, geometry width {config.geo_width}"
    return f"{preset.name}, {sizes}; scale factor {preset.scale_factor:g}, {pi} pi"


# --- graphs


def graphs(preset: ShapeVAEPreset) -> dict[str, Graph]:
    """The graphs `vae` (latents -> k, v) and `field` (queries, k, v -> field); the number of heads is fixed in both."""
    return {
        name: Graph(
            spec=spec, axes=spec.axes, example=EXAMPLE_SIZES, module=functools.partial(_module, preset=preset, graph=name)
        )
        for name, spec in preset.specs.items()
    }


def _module(decoder: ShapeVAEDecoder, *, preset: ShapeVAEPreset, graph: str) -> nn.Module:
    return MODULES[graph](decoder, preset)


# --- comparison with torch


def weights_of(manifest: Manifest, given: Source | None) -> ShapeVAESource:
    """The weights that an artifact was made from: shipped or random weights, or those of the given checkpoint.

    Raises ManifestError when the given checkpoint is another one, or when none was given and the artifact needs one.
    """
    identity = manifest.made_from["weights"]
    named = {name: identity[name] for name in ("preset", "seed") if name in identity}
    path = None if named or given is None else given.checkpoint
    if not named and path is None:
        raise ManifestError(
            f"{manifest.model} was made from a checkpoint, which must be given, got none\nhint: --checkpoint FILE"
        )
    source = ShapeVAESource(path=path, **named, scale_factor=identity["scale_factor"], include_pi=identity["include_pi"])
    if source.identity() != identity:
        raise ManifestError(f"{manifest.model} must be made from these weights, got {identity}\nhint: --checkpoint FILE")
    return source


def checks(manifest: Manifest, found_by: Runner, expected_by: Runner, *, profile: Profile, against: str) -> Iterator[Check]:
    """Compares every output of the artifact's model at several sizes within `profile`."""
    tolerance = TOLERANCES[manifest.model][manifest.made_from["precision"]]
    preset = preset_from_json(manifest.serving)
    for sizes in dict.fromkeys(within(profile, case, "BLP") for case in CASES):
        inputs = example_inputs(preset, manifest.model, sizes)
        found, expected = (run.run(manifest.model, inputs) for run in (found_by, expected_by))
        shown = sizes if manifest.model == contract.FIELD else (*sizes[:2], 0)
        for name in found:
            yield compare(f"{name}{against}", shown, found[name], expected[name], tolerance=tolerance, axes="BLP")


def example_inputs(preset: ShapeVAEPreset, model: str, sizes: tuple[int, ...], seed: int = _SEED) -> dict[str, Tensor]:
    """The inputs of `model` at sizes (B, L, P), drawn from `seed`: normal latents, k and v, and points in the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    spec = next(spec for spec in preset.specs.values() if spec.name == model)
    named = dict(zip("BLP", sizes, strict=True))
    inputs = {}
    for tensor in spec.inputs:
        value = torch.randn(tensor.shape(named), generator=generator)
        inputs[tensor.name] = (value.clamp(-1, 1) if tensor == contract.QUERIES else value).to(WIRE_DTYPES[tensor.dtype])
    return inputs


# --- deployment


def plan_sizes(preset: ShapeVAEPreset) -> dict[str, tuple[int, ...]]:
    """The sizes of B, L and P that a plan must accept: Triton's batches, the warm-up, the preset's L, and all buckets."""
    return {
        "B": (1, contract.AXES["B"].max),
        "L": (preset.num_latents, contract.AXES["L"].opt),
        "P": contract.POINT_BUCKETS,
    }


def config_files(preset: ShapeVAEPreset, torch: Mapping[str, str] | None = None) -> dict[str, str]:
    """See configs.config_files."""
    from .configs import config_files as render  # needs tritonclient, which a machine for gpu-check may lack

    return render(preset, torch)
